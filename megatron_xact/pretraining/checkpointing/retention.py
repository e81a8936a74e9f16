"""Which checkpoints go, and how they go: renamed first, so that no half-deleted folder is ever called iter_*."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_xact.pretraining.checkpointing.folder import (
    TRACKER,
    is_cut_off,
    name_of,
    saved_steps,
    tracked,
)
from megatron_xact.whole import write_text

_DELETED, _SUPERSEDED = "deleted-", "superseded-"


def expendable(steps: list[int], newest: int, keep: int, every: int) -> list[int]:
    """The steps whose checkpoints may go once `newest` is complete.

    Kept are the `keep` newest (0: all), the multiples of `every` (0: none), and what is newer than `newest`: it may be
    being saved.
    """
    if keep == 0:
        return []
    older = [step for step in steps if step < newest]
    return [step for step in older[: max(0, len(older) + 1 - keep)] if not (every and step % every == 0)]


def sweep(folder: Path, newest: int, keep: int, every: int) -> list[int]:
    """Delete what retention does not keep, and what a `sweep` that was cut off left; the steps deleted.

    newest: the step that the tracker names, whose checkpoint the caller has found whole.
    """
    for leftover in folder.glob(f"{_DELETED}iter_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for step in saved_steps(folder, _SUPERSEDED):
        if step <= newest:
            shutil.rmtree(folder / f"{_SUPERSEDED}{name_of(step)}", ignore_errors=True)
    gone = expendable(saved_steps(folder), newest, keep, every)
    for step in gone:
        _remove(folder / name_of(step))
    return gone


def tidy(folder: Path, step: int | None) -> list[str]:
    """Make a run's own folder say what the run does: it goes on from `step` (None: it starts). Tells what was done.

    Checkpoints newer than `step` would be overwritten file by file when training comes past them again, and a kill in
    the middle would leave a mixture that looks whole. They are set aside, until `sweep` finds them overtaken.
    """
    told = []
    if step is not None and (tracker_is_corrupt(folder) or tracked(folder) != step):
        write_text(folder / TRACKER, str(step))
    steps = saved_steps(folder)
    removed = [s for s in steps if s != step and is_cut_off(folder / name_of(s))]
    aside = [s for s in steps if s not in removed and (step is None or s > step)]
    for s in removed:
        _remove(folder / name_of(s))
    for s in aside:
        path = folder / f"{_SUPERSEDED}{name_of(s)}"
        shutil.rmtree(path, ignore_errors=True)
        (folder / name_of(s)).rename(path)
    if removed:
        told.append(f"removed {', '.join(map(name_of, removed))}: saving was cut off")
    if aside:
        told.append(
            f"set aside {', '.join(map(name_of, aside))} as {_SUPERSEDED}iter_*, to be deleted once this run has "
            "come as far"
        )
    for leftover in folder.glob(f"{_DELETED}iter_*"):
        shutil.rmtree(leftover, ignore_errors=True)
        told.append(f"removed {leftover.name}: deleting it was cut off")
    return told


def tracker_is_corrupt(folder: Path) -> bool:
    try:
        tracked(folder)
    except ValueError:
        return True
    return False


def _remove(checkpoint: Path) -> None:
    renamed = checkpoint.with_name(_DELETED + checkpoint.name)
    shutil.rmtree(renamed, ignore_errors=True)
    checkpoint.rename(renamed)
    shutil.rmtree(renamed)
