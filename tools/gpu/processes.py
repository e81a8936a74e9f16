"""Processes that the suite starts: with this repository to be imported, and ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


class Ended(Exception):
    """A command did not end as it should; the message says how."""


def environment() -> dict[str, str]:
    """The repository and what its kernel tests share come first; packages may lie on the PYTHONPATH already."""
    folders = [str(ROOT), str(ROOT / "tests" / "kernels"), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def kill(process: subprocess.Popen) -> None:
    """It and its descendants, whatever sessions these are in."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def xact(*words: object, limit: float = 240.0, accepted: Sequence[int] = (0,)) -> None:
    """`xact WORDS`. Ended: it took longer than `limit` seconds, or its exit code is not one of those `accepted`."""
    command = [sys.executable, "-m", "megatron_xact", *map(str, words)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        kill(process)
        raise Ended(f"xact {words[0]} took longer than {limit:g} s") from None
    if process.returncode not in accepted:
        print(errors[-3000:], file=sys.stderr, flush=True)
        last = errors.strip().splitlines()[-1:] or ["it said nothing"]
        raise Ended(f"xact {words[0]} ended with {process.returncode}: {last[0]}")
