"""What each rank says of itself while it runs, in RUN/logs/ranks/NNNNN.json, for the other ranks and the launcher.

Files, not the TCPStore of torch: they outlive any rank, while the store dies with the process that holds it (or stops
with it); the launcher can read them without torch, and so can a person. They cost one small write per rank every few
seconds, in the folder that the checkpoints go to anyway.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_xact.pretraining.checkpointing.folder import tracked

SLOWEST_BEAT = 10.0  # seconds
_LONG_AGO = 3600.0  # seconds; more than clocks of two hosts differ by
FLAG = "requeue"  # RUN/requeue: a signal ended the run in order, it is saved and to go on


@dataclass
class Status:
    attempt: str  # which start of the run this rank belongs to (XACT_ATTEMPT)
    rank: int
    host: str
    pid: int
    beat: int = 0  # counts up; clocks of different hosts need not agree
    step: int = -1  # completed steps; -1 before the first
    time: float = 0.0  # of the last beat, seconds since the epoch
    signal: str | None = None  # received, e.g. by torchrun when another rank failed
    where: str = ""  # the innermost call of the main thread, once no step was completed in time
    waiting: bool = False  # that call waits for other ranks
    kind: str | None = None  # how it ended: "done", or a kind of failures.py; None: it has not said
    reason: str = ""
    culprit: int | None = None  # the rank whose fault it is, where it is not this one's

    def write(self, folder: Path) -> None:
        write_json(path(folder, self.rank), asdict(self))


def path(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}.json"


def folder_of(run: Path) -> Path:
    return run / "logs" / "ranks"


def read(folder: Path, attempt: str, ranks: range) -> dict[int, Status]:
    """The statuses of those of `ranks` that have written one in this attempt."""
    found = {rank: _status(path(folder, rank)) for rank in ranks}
    return {rank: s for rank, s in found.items() if s is not None and s.attempt == attempt}


def at_work(run: Path) -> Status | None:
    """A rank that trains into this folder now, of a run that was started before: two at once would undo one another.

    On this host its launcher's mark in its process tells. One on another host, or without a launcher, may have died
    without a last word: it is at work if it beats while this looks, for half a minute at most.
    """
    unended = [s for s in map(_status, folder_of(run).glob("*.json")) if s is not None and s.kind is None]
    for s in unended:
        if s.host == host_name() and s.pid in processes_of(s.attempt):
            return s
    unmarked = [s for s in unended if s.host != host_name() or (not s.attempt and Path(f"/proc/{s.pid}").exists())]
    unsure = [s for s in unmarked if abs(time.time() - s.time) < _LONG_AGO]
    if not unsure:
        return None
    latest = max(unsure, key=lambda s: s.time)
    print(f"xact: looking whether rank {latest.rank} on {latest.host}, which has not said how it ended, is at work ...",
          file=sys.stderr, flush=True)  # fmt: skip
    until = time.monotonic() + 2.5 * SLOWEST_BEAT
    while time.monotonic() < until:
        time.sleep(0.5)
        now = _status(path(folder_of(run), latest.rank))
        if now is not None and now.kind is None and (now.attempt, now.beat) != (latest.attempt, latest.beat):
            return now
    return None


def why_taken(run: Path) -> str | None:
    """Why no other run may start in this folder: one is at work in it; None: none is."""
    other = at_work(run)
    if other is None:
        return None
    return (
        f"a run is at work in {run}: rank {other.rank} on {other.host} (process {other.pid}), at step "
        f"{max(other.step, 0)}; wait for its end, or name another folder by --save"
    )


def _status(file: Path) -> Status | None:
    try:
        return Status(**read_json(file))
    except TypeError:  # no whole status, or another version's
        return None


def host_name() -> str:
    """Of this node, as the scheduler calls it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def write_json(file: Path, content: dict) -> None:
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(partial, file)


def read_json(file: Path) -> dict:
    """{} where there is no such file, or not a whole one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def latest_step(run: Path) -> int:
    """The step of the newest complete checkpoint, by Megatron's tracker file; 0: there is none."""
    try:
        step = tracked(run)
    except (OSError, ValueError):
        return 0
    return step if isinstance(step, int) else 0


def interrupted(run: Path | None) -> str:
    """What Ctrl-C leaves behind, and what would have saved."""
    step = latest_step(run) if run is not None else 0
    left = f"the same command goes on from step {step}, the last checkpoint" if step else "there is no checkpoint yet"
    return f"xact: interrupted without saving: {left}; SIGTERM (kill PID) would save first"


def processes_of(attempt: str) -> list[int]:
    """The processes of this host that belong to an attempt, by their environment; [] where there is no /proc."""
    mark, found = f"XACT_ATTEMPT={attempt}\0".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found
