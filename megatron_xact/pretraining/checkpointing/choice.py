"""The checkpoint a run goes on from: the one that the tracker names, or else the newest whole one, said aloud.

Every rank validates its config by itself, and reads only indices for it (`pick`). Whether the bytes are those that were
saved is then found out by all ranks together, a part of the files each, and the first rank decides for all of them
(`settle`): ranks that go on from different steps would train a model that nobody described.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from megatron_xact.pretraining import resume
from megatron_xact.pretraining.checkpointing import checksums, retention
from megatron_xact.pretraining.checkpointing.folder import (
    TRACKER,
    check_checkpoint,
    damage,
    is_cut_off,
    name_of,
    saved_steps,
    tracked,
)
from megatron_xact.pretraining.files import why_not
from megatron_xact.whole import write_text

_PATIENCE = timedelta(minutes=30)  # for the slowest rank to read its part of a checkpoint


@dataclass(frozen=True)
class Choice:
    """A checkpoint to load, None to start from random weights, and why others were passed over."""

    checkpoint: Path | None
    passed_over: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        """None for no checkpoint, and for Megatron's `release`, which has no step."""
        name = self.checkpoint.name if self.checkpoint else ""
        return int(name.removeprefix("iter_")) if name.startswith("iter_") else None


def pick(args: Namespace, trunk: tuple[Path, int] | None, rejected: Mapping[str, str] | None = None) -> Choice:
    """What a run with these arguments (`load`, `save`, `ckpt_step`) would load, by the indices.

    trunk: (folder, step) of the checkpoint that a branch starts from while it has none of its own.
    rejected: names of checkpoints that were found damaged otherwise -> what is wrong with them.
    FileNotFoundError, ValueError: what was asked for is not there or not whole, or nothing whole is there at all.
    """
    folder, rejected = Path(args.load), rejected or {}
    choice = Choice(None)
    if args.ckpt_step is not None:
        choice = Choice(check_checkpoint(folder, args.ckpt_step))
    elif resumes(args) or (folder / TRACKER).is_file():
        choice = _newest_whole(folder, rejected)
    else:
        raise FileNotFoundError(
            f"load: no checkpoint in {folder} (no {TRACKER}); leave load out to start from random "
            "weights, or set it equal to save to resume when there is one"
        )
    if choice.checkpoint is None and trunk is not None:
        choice = Choice(check_checkpoint(*trunk), choice.passed_over)
    if choice.checkpoint is not None and (problem := rejected.get(choice.checkpoint.name)):
        raise ValueError(f"checkpoint {choice.checkpoint} {problem}; ask for another step")
    return choice


def resumes(args: Namespace) -> bool:
    """load = save, the idiom for "go on where this run was, if it was anywhere"."""
    if args.save is None or args.load is None or "://" in args.load:
        return False
    return Path(args.load).resolve() == Path(args.save).resolve()


def _newest_whole(folder: Path, rejected: Mapping[str, str]) -> Choice:
    steps = saved_steps(folder)
    passed_over = []
    try:
        named = tracked(folder)
        if named == "release":
            return Choice(check_checkpoint(folder))
        if named is None and steps:
            passed_over.append(f"{TRACKER} is missing")
    except ValueError as error:
        named = None
        passed_over.append(f"{TRACKER} {error}")
    order = [step for step in reversed(steps) if step != named]
    for step in order if named is None else [named, *order]:
        checkpoint = folder / name_of(step)
        problem = rejected.get(checkpoint.name) or damage(checkpoint) or resume.unreadable(checkpoint)
        if problem is None:
            return Choice(checkpoint, tuple(passed_over))
        passed_over.append(f"{checkpoint.name} {problem}")
    if not (folder / TRACKER).is_file() and all(is_cut_off(folder / name_of(step)) for step in steps):
        return Choice(None, tuple(passed_over))  # nothing was ever complete
    raise ValueError(
        f"no whole checkpoint in {folder}: {'; '.join(passed_over)}. Put one back, or train in another folder"
    )


class Ranks:
    """What the ranks of a run tell each other before Megatron makes them a process group, over the same store."""

    def __init__(self):
        """Needs RANK and WORLD_SIZE, and MASTER_ADDR and MASTER_PORT for more than one rank."""
        import torch

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store = None  # for `pretrain`, which would otherwise make the same one once more
        if self.size > 1:
            self.store = next(iter(torch.distributed.rendezvous("env://", timeout=_PATIENCE)))[0]

    def from_first(self, key: str, value: object = None) -> object:
        """The first rank's value on every rank. Each key is used once."""
        if self.size == 1:
            return value
        if self.rank == 0:
            self.store.set(f"xact/{key}", json.dumps(value))
            return value
        return json.loads(self.store.get(f"xact/{key}"))

    def first_does(self, key: str, work: Callable[[], object]) -> object:
        """What `work` returns on the first rank, on every rank; or its ValueError or OSError, as a ValueError."""
        said = None
        if self.rank == 0:
            try:
                said = {"done": work()}
            except (ValueError, OSError) as error:
                said = {"error": why_not(error)}
        said = self.from_first(key, said)
        if "error" in said:
            self.to_first(f"{key}: heard", True)  # with the first rank, the store would end
            raise ValueError(said["error"])
        return said["done"]

    def to_first(self, key: str, value: object) -> list:
        """Every rank's value on the first rank, [] elsewhere."""
        if self.size == 1:
            return [value]
        self.store.set(f"xact/{key}/{self.rank}", json.dumps(value))
        if self.rank:
            return []
        return [json.loads(self.store.get(f"xact/{key}/{rank}")) for rank in range(self.size)]


def settle(args: Namespace, trunk: tuple[Path, int] | None, compare: bool, ranks: Ranks) -> tuple[Choice, list[str]]:
    """`pick`, the same on every rank and with the bytes compared (`compare`); and lines for people, on the first rank.

    In a run's own folder, the tracker then names what was picked, and leftovers are cleared away.
    """
    rejected: dict[str, str] = {}
    ranks.to_first("validated", True)  # and will not look at the folder again
    while True:
        turn = len(rejected)
        choice, comparable = _first_picks(args, trunk, rejected, ranks)
        if not (compare and comparable):
            break
        found = ranks.to_first(f"compared {turn}", checksums.compare(choice.checkpoint, ranks.rank, ranks.size))
        problem = ranks.from_first(f"verdict {turn}", next(filter(None, found), None))
        if problem is None:
            break
        rejected[choice.checkpoint.name] = problem
    done = ranks.first_does("tidied", lambda: _clear_up(args, choice))
    return choice, [_told(choice, unknown=compare and not comparable), *done]


def _first_picks(args: Namespace, trunk: tuple[Path, int] | None, rejected: dict[str, str], ranks: Ranks):
    """`pick` by the first rank, and whether what it picked has checksums to be compared with."""

    def picked() -> list:
        choice = pick(args, trunk, rejected)
        if choice.checkpoint is None:
            return [None, choice.passed_over, False]
        return [str(choice.checkpoint), choice.passed_over, checksums.are_there(choice.checkpoint)]

    name, passed_over, comparable = ranks.first_does(f"picked {len(rejected)}", picked)
    return Choice(name and Path(name), tuple(passed_over)), comparable


def _clear_up(args: Namespace, choice: Choice) -> list[str]:
    if resumes(args) and not (args.finetune or args.skip_train):
        own = choice.checkpoint is not None and choice.checkpoint.parent.resolve() == Path(args.save).resolve()
        return retention.tidy(Path(args.save), choice.step if own else None)
    if choice.step is not None and retention.tracker_is_corrupt(choice.checkpoint.parent):
        write_text(choice.checkpoint.parent / TRACKER, str(choice.step))  # or Megatron exits, with code 0
    return []


def _told(choice: Choice, unknown: bool) -> str:
    reasons = "; ".join(choice.passed_over)
    if choice.checkpoint is None:
        return f"{reasons}: starting from the beginning" if reasons else ""
    remark = f" (not compared with what was saved: it has no {checksums.NAME})" if unknown else ""
    return f"{reasons}{': ' if reasons else ''}going on from {choice.checkpoint}{remark}"
