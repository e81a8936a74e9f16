"""How far a run is, from what it has written; and the command that trains it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_xact.pretraining.planning.counts import flops_per_token
from megatron_xact.studies.ladder import Cell

REPORT = "report.json"
SPEEDS = "speeds.json"  # of `xact study plan --measure`: {size: {activation: tokens per second}}


@dataclass(frozen=True)
class Run:
    """One run of `xact pretrain`: what to call it, and how far it is."""

    name: str
    folder: Path
    words: tuple[str, ...]  # behind `xact pretrain`
    log: Path
    last: int  # step at which it ends
    first: int = 0  # step at which it begins: a branch's, where it leaves its trunk
    work: float = 1.0  # of one step, in a unit that the runs of a study share: FLOPs, say

    @property
    def steps(self) -> int:
        """That it trains itself."""
        return self.last - self.first

    @property
    def done(self) -> int:
        """Of `steps`, how many are trained, by what it has told last."""
        told = self._told("progress.jsonl", "step")
        return min(int(told[-1]["step"]), self.last) - self.first if told else 0

    @property
    def seconds_left(self) -> float | None:
        """At the pace of its last records; the median, since evaluations and restarts lie between some of them."""
        pairs = pairwise(self._told("progress.jsonl", "step", "time"))
        paces = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairs if b["step"] > a["step"]]
        return statistics.median(paces) * (self.steps - self.done) if paces else None

    @property
    def is_finished(self) -> bool:
        """Written at a run's end, also of one that was asked to end early: so the step counts too."""
        return report_of(self.folder).get("step") == self.last

    @property
    def diverged(self) -> str:
        """What ended it for good, where that was a loss or gradient that is not finite; "" where it was not."""
        told = self._told("failures.jsonl", "kind", "reason", "decision")
        ended = told and not self.is_finished and not told[-1]["decision"].startswith("restart")
        return told[-1]["reason"] if ended and told[-1]["kind"] == "nan" else ""

    def _told(self, file: str, *keys: str) -> list[dict]:
        """The last records of a file of the run that have these keys; some lines may be broken."""
        records = []
        for line in _tail(self.folder / file):
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return [r for r in records if isinstance(r, dict) and all(r.get(key) is not None for key in keys)]


def run_of(cell: Cell, study: Path) -> Run:
    leaf = f"+{cell.budget.steps}" if cell.is_branch else ""
    return Run(
        name=cell.name, folder=study / cell.folder, words=_words(cell, study),
        log=study / "logs" / f"{cell.trunk.name}{leaf}.log", last=cell.budget.steps,
        first=cell.budget.leaves if cell.is_branch else 0,
        work=flops_per_token(cell.trunk.shape) * cell.trunk.batch,
    )  # fmt: skip


def _words(cell: Cell, study: Path) -> tuple[str, ...]:
    """Behind `xact pretrain`."""
    trunk = str(study / "runs" / cell.trunk.name)
    given = (str(study / "configs" / f"{cell.trunk.name}.toml"), "--quiet", "--load", trunk)
    if not cell.is_branch:
        return *given, "--save", trunk
    return (*given, "--save", str(study / cell.folder), "--branch-from", str(cell.budget.leaves),
            "--cooldown-steps", str(cell.budget.cooldown))  # fmt: skip


def last_word(log: Path, speakers: tuple[str, ...] = ("xact: ",)) -> str:
    """The last line of a log by one of these; "": there is none."""
    return next((line for line in reversed(_tail(log)) if line.startswith(speakers)), "")


def _tail(file: Path) -> list[str]:
    try:
        with open(file, "rb") as content:
            content.seek(0, 2)
            content.seek(max(0, content.tell() - 4096))
            return content.read().decode(errors="replace").splitlines()
    except OSError:
        return []


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """ValueError: another command starts or submits runs of this folder."""
    with open(folder / ".running", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another `xact study` is at work in {folder}") from None
        except OSError:  # a file system without locks
            pass
        yield


def report_of(folder: Path) -> dict:
    """The run's result; {}: it has not ended."""
    try:
        content = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def measured_speeds(study: Path) -> dict[tuple[str, str], float]:
    """Tokens per second of (size, activation), as `xact study plan --measure` found them; {}: it has not.

    ValueError: the file is damaged.
    """
    path = study / SPEEDS
    if not path.is_file():
        return {}
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
        return {(size, name): float(speed) for size, speeds in sizes.items() for name, speed in speeds.items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: delete it, or measure again (xact study plan --measure)") from None


def is_finished(cell: Cell, study: Path) -> bool:
    return run_of(cell, study).is_finished
