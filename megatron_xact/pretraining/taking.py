"""A run's folder takes one run at a time: two at once would undo one another's checkpoints.

Who starts ranks holds a lock as long as it lives, from before they begin to import, one per node. It is believed on the
host it was taken on, where the kernel gives it back at any end; a file server may keep that of a host that is gone.
Ranks on other hosts, and those that have outlived their launcher, are found by what they write: they are at work if
their beat changes as seen from here. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_xact.pretraining import status
from megatron_xact.pretraining.status import Status

_PAUSE = 0.5  # seconds before the second look at those that may be at work; each next one takes twice as long
_WAYS_OUT = "wait for its end, or name another folder by --save"


class Taken(Exception):
    """Another run is at work in the folder; the message names it."""


@contextlib.contextmanager
def taking(run: Path | None, node: int = 0) -> Iterator[None]:
    """Inside, this process starts the ranks of this node, and no other one does. Taken: another run is at work."""
    if run is None:
        yield
        return
    file = run / "logs" / f"launcher-{node}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+", encoding="utf-8") as lock:
        if holder := _locked_by(lock):
            raise Taken(f"a run is at work in {run}: it was started by {holder}; {_WAYS_OUT}")
        if rank := at_work(run):
            raise Taken(
                f"a run is at work in {run}: rank {rank.rank} on {rank.host} (process {rank.pid}), at step "
                f"{max(rank.step, 0)}; {_WAYS_OUT}"
            )
        if node == 0:
            # As has just been seen: the next start need not look again. Some were killed while they wrote.
            for dead in [*_unended(run), *status.folder_of(run).glob("*.partial")]:
                dead.unlink(missing_ok=True)
        yield


def at_work(run: Path) -> Status | None:
    """A rank that trains into this folder now: two runs at once would undo one another.

    On this host its launcher's mark in its process tells. One on another host, or without a launcher, may have died
    without a last word: it is at work if it beats while this looks, for half a minute at most.
    """
    unended = _unended(run)
    for s in unended.values():
        if s.host == status.host_name() and s.pid in status.processes_of(s.attempt):
            return s
    unsure = {file: s for file, s in unended.items() if _may_live(s)}
    if not unsure:
        return None
    one, others = next(iter(unsure.values())), len(unsure) - 1
    who = f"or one of {others} others, which have not said how they" if others else "which has not said how it"
    print(f"xact: looking whether rank {one.rank} on {one.host}, {who} ended, is at work ...",
          file=sys.stderr, flush=True)  # fmt: skip
    left, pause = 2.5 * status.SLOWEST_BEAT, _PAUSE
    while left > 0:
        time.sleep(min(pause, left))
        for file, s in unsure.items():
            now = status.of_file(file)
            if now is not None and now.kind is None and (now.attempt, now.beat) != (s.attempt, s.beat):
                return now
        left, pause = left - pause, 2 * pause
    return None


def _unended(run: Path) -> dict[Path, Status]:
    """The ranks that have not said how they ended, by their files."""
    found = {file: status.of_file(file) for file in sorted(status.folder_of(run).glob("*.json"))}
    return {file: s for file, s in found.items() if s is not None and s.kind is None}


def _may_live(s: Status) -> bool:
    return s.host != status.host_name() or (not s.attempt and Path(f"/proc/{s.pid}").exists())


def _locked_by(lock: TextIO) -> str | None:
    """The process of this host that holds this lock; None: it is ours from now on, or not to be had here."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in forks: a killed rank leaves some
    except BlockingIOError:
        lock.seek(0)
        host, _, process = lock.read().strip().partition(" ")
        return f"process {process or 'unknown'}" if host in ("", status.host_name()) else None
    except OSError:  # a file system without locks
        return None
    lock.truncate(0)
    print(status.host_name(), os.getpid(), file=lock, flush=True)
    return None
