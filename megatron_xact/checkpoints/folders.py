"""An output folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(out: Path, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder next to `out`, which becomes `out` when the block ends, and is removed if it fails.

    needed: bytes that will be written. FileExistsError: `out` is there (`overwrite` moves it aside). OSError: no room.
    """
    out = out.absolute()
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists already; choose another name, or --overwrite to move it aside")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(f"not enough room in {out.parent}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):  # folders too: they hold the files' names
            sync(path)
        if out.exists():
            out.rename(_aside(out))
        partial.rename(out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """On disk, not only in memory: the rename must not survive a crash that the contents do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(out: Path) -> Path:
    number = 1
    while (aside := out.with_name(f"{out.name}.replaced-{number}")).exists():
        number += 1
    return aside
