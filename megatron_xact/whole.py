"""Where a file or folder grows that must be there whole or not at all: beside its place, to be renamed at the end.

Its name tells host and process: several may make the same one, and what a killed process left is recognised. For all
rooms; imports none of them.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from pathlib import Path


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
