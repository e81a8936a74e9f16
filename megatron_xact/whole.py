"""Files and folders that are there whole or not at all: they grow beside their place and are renamed at the end.

The name they grow under tells host and process: several may make the same one, and what a killed process left is
recognised. For all rooms and for launchers, which are ready before torch: imports the standard library only.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """The file with this text, or with what it had before: it is never seen half-written, nor after a crash."""
    with whole_file(path) as growing:
        growing.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name to write under, which becomes `path` when the block ends, and is removed if it fails.

    What a link leads to is replaced, not the link. OSError: it is a device, a pipe or a folder.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no file that could be replaced; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    growing = partial(path)
    try:
        yield growing
        sync(growing)
        os.replace(growing, path)
    except BaseException:
        _remove(growing)
        raise


def sync(path: Path) -> None:
    """On disk, not only in memory: the rename must not survive a crash that the contents do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial(path: Path) -> Path:
    """The name for this process to make `path` under. What ended processes of this host left of the same is removed."""
    host = os.uname().nodename
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        whose, _, process = left.name.rpartition(".partial-")[2].rpartition("-")
        if whose == host and process.isdecimal() and not _lives(int(process)):
            _remove(left)
    return path.with_name(f".{path.name}.partial-{host}-{os.getpid()}")


def _lives(process: int) -> bool:
    """Whether another process has this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return process != os.getpid()


def _remove(left: Path) -> None:
    """As far as that is allowed, and left there: somebody else may be removing it too."""
    if left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            left.unlink()
