"""Whether the disk has room for one more checkpoint. Quotas are not seen: the file system does not tell them."""

from __future__ import annotations

import errno
import shutil
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_xact.pretraining.checkpointing.folder import damage, name_of, saved_steps
from megatron_xact.pretraining.files import why_not

if TYPE_CHECKING:
    from torch.distributed.checkpoint import CheckpointException

_SLACK = 1.02  # of the index and the common state, which grow with the number of ranks, not of weights


class NoSpace(RuntimeError):
    """No room for one more checkpoint; the message says what to do."""


def size_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def size_of_newest(folder: Path) -> int | None:
    """Bytes of the newest whole checkpoint, None if there is none."""
    for step in reversed(saved_steps(folder)):
        if damage(folder / name_of(step)) is None:
            return size_of(folder / name_of(step))
    return None


def free(folder: Path) -> int:
    """Bytes free where `folder` is, or would be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def shortage(folder: Path, needed: int) -> str | None:
    """In words, that fewer than `needed` bytes and some slack are free; None: there is room."""
    there = free(folder)
    if there >= needed * _SLACK:
        return None
    return f"{folder} has {_size(there)} free, and a checkpoint takes {_size(needed)}"


def estimate(elements: dict[int, int], args: Namespace) -> int:
    """Bytes of a checkpoint of a model with so many parameters by their bytes each (2: 16-bit, 4: fp32).

    Adam's two moments and the fp32 copy of 16-bit parameters; SGD has its momentum only.
    """
    total = sum(size * number for size, number in elements.items())
    if args.no_save_optim:
        return total
    moments = 8 if args.optimizer == "adam" else 4
    return total + sum(number * (moments + (4 if size < 4 else 0)) for size, number in elements.items())


def is_unwritable(error: Exception) -> bool:
    """Whether the disk is full, or has become read-only, as Linux makes one that fails."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def why_not_written(error: CheckpointException | OSError, folder: Path | None) -> str:
    """A failed save (or load) in one line: Megatron's own words are a traceback per rank."""
    causes = [cause for cause, _ in error.failures.values()] if hasattr(error, "failures") else [error]
    reasons = {why_not(cause) for cause in causes}
    room = f" {folder} has {_size(free(folder))} free." if folder is not None else ""
    return (
        f"a checkpoint could not be written or read: {'; '.join(sorted(reasons))}.{room} What was complete before "
        "still is; once that is mended, the same command goes on from it"
    )


def _size(number: int) -> str:
    unit, divisor = ("GB", 1e9) if number >= 1e8 else ("MB", 1e6)
    return f"{number / divisor:.2f} {unit}"
