"""Processes that the suite starts: with this repository to be imported, and ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


TAIL = 3000  # characters of what a command has printed
# What c10d and NCCL log, before or after the error that ended a rank: "[rank0]:[W1124 03:00:00.0 file.cpp:1] ..."
LOGGED = re.compile(r"(\[rank\d+\]:)?\s*\[[IWEF]\d{4} ")


class Ended(Exception):
    """A command did not end as it should. The message says how, in a line; output: the last that it printed."""

    def __init__(self, how: str, output: str):
        super().__init__(how)
        self.output = output


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


def xact(*words: object, limit: float = 240.0, accepted: Sequence[int] = (0,)) -> str:
    """`xact WORDS`; what it printed. Ended: it took longer than `limit` seconds, or its exit code is not accepted."""
    command = [sys.executable, "-m", "megatron_xact", *map(str, words)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:  # no pipe, which children would hold
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            kill(process)
            code = None
        file.seek(0)
        printed = file.read()
    if code in accepted:
        return printed
    output = printed[-TAIL:]
    print(output, file=sys.stderr, flush=True)
    if code is None:
        raise Ended(f"xact {words[0]} took longer than {limit:g} s", output)
    lines = [line for line in output.strip().splitlines() if not LOGGED.match(line)]
    raise Ended(f"xact {words[0]} ended with {code}: {lines[-1] if lines else 'it said nothing'}", output)
