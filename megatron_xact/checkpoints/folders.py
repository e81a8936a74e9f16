"""An output folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_xact.whole import partial, sync


@contextlib.contextmanager
def whole_folder(out: Path, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder next to `out`, which becomes `out` when the block ends, and is removed if it fails.

    Where the process is killed it stays, until `out` is made again on this host.

    needed: bytes that will be written. FileExistsError: `out` is there (`overwrite` moves it aside). OSError: no room.
    """
    out = out.absolute()
    refuse_existing(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    growing = partial(out)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(f"not enough room in {out.parent}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
    growing.mkdir()
    try:
        yield growing
        for path in (*growing.rglob("*"), growing):  # folders too: they hold the files' names
            sync(path)
        if out.exists():
            out.rename(_aside(out))
        growing.rename(out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise


def refuse_existing(out: Path, overwrite: bool) -> None:
    """FileExistsError, unless it may be moved aside."""
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out.absolute()} exists already; choose another name, or --overwrite to move it aside")


def _aside(out: Path) -> Path:
    number = 1
    while (aside := out.with_name(f"{out.name}.replaced-{number}")).exists():
        number += 1
    return aside
