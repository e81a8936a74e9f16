"""What each rank says of itself while it runs, in RUN/logs/ranks/NNNNN.json, for the other ranks and the launcher.

Files, not the TCPStore of torch: they outlive any rank, while the store dies with the process that holds it (or stops
with it); the launcher can read them without torch, and so can a person. They cost one small write per rank every few
seconds, in the folder that the checkpoints go to anyway.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_xact.pretraining.checkpointing.folder import tracked

SLOWEST_BEAT = 10.0  # seconds
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
    kind: str | None = None  # how it ended: "done", "interrupted", or one of failures.py; None: not said
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
    found = {rank: of_file(path(folder, rank)) for rank in ranks}
    return {rank: s for rank, s in found.items() if s is not None and s.attempt == attempt}


def crash_path(folder: Path, rank: int) -> Path:
    """What Python's faulthandler writes when a fatal signal ends a rank, which then has no last word."""
    return path(folder, rank).with_suffix(".crash")


def crash(folder: Path, rank: int) -> str | None:
    """What ended it so, in Python's words, e.g. "Aborted" or "Segmentation fault"; None: nothing did."""
    try:
        first = crash_path(folder, rank).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return None
    return first.removeprefix("Fatal Python error: ") or None


def of_file(file: Path) -> Status | None:
    """None where there is no whole status, or another version's."""
    try:
        return Status(**read_json(file))
    except TypeError:
        return None


def host_name() -> str:
    """Of this node, as the scheduler calls it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def write_json(file: Path, content: dict) -> None:
    """As `whole.write_text`, but every rank does it all the time: it does not wait for the disk, or list the folder."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


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
