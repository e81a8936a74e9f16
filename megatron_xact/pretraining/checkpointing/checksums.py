"""A SHA-256 of every file of a checkpoint, written beside them once it is complete, compared when it is loaded.

The file is Megatron's own `integrity.json`, as its `--verify-integrity` writes and reads it, with the sizes besides:
each can check the other's. But Megatron's flag holds up training on every rank while one thread of one of them reads
the whole checkpoint, and loads nothing that was saved without it. SHA-256 because processors have instructions for it,
and because `sha256sum` can be asked when we are not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_xact.whole import write_text

NAME = "integrity.json"
_THREADS = 8


def write(checkpoint: Path) -> None:
    """Read every file of a complete checkpoint and write down what was read. The file appears last, and whole."""
    # Nor what a process that was killed in the middle left of this file: `write_text` may remove that.
    names = sorted(path.name for path in checkpoint.iterdir() if path.is_file() and NAME not in path.name)
    sizes = {name: (checkpoint / name).stat().st_size for name in names}
    with _threads() as threads:
        digests = dict(zip(names, threads.map(lambda name: _digest(checkpoint / name), names), strict=True))
    write_text(checkpoint / NAME, json.dumps({"algorithm": "sha256", "files": digests, "sizes": sizes}, indent=1))


def are_there(checkpoint: Path) -> bool:
    return (checkpoint / NAME).is_file()


def compare(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """What differs from the checksums of a checkpoint that has some, in every `shares`-th file; None: nothing."""
    try:
        told = json.loads((checkpoint / NAME).read_text(encoding="utf-8"))
        expected, sizes = dict(told["files"]), told.get("sizes", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is damaged: {NAME} cannot be read ({type(error).__name__})"

    def differs(name: str) -> str | None:
        path = checkpoint / name
        if not path.is_file():
            return f"is damaged: {name} is missing"
        if path.stat().st_size != sizes.get(name, path.stat().st_size):
            return f"is damaged: {name} has {path.stat().st_size} of {sizes[name]} bytes"
        if _digest(path) != expected[name]:
            return f"is damaged: {name} is not what was saved (its checksum differs from {NAME})"
        return None

    with _threads() as threads:
        return next(filter(None, threads.map(differs, sorted(expected)[share::shares])), None)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0))))  # neither reading nor hashing holds the GIL
