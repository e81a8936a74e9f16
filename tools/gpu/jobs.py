"""Sections as processes: those that may, side by side; those that are timed, alone and after them.

A section that crashes, hangs or loses the GPU takes no other with it, and what it had found is kept: it writes a file
after every entry, which is read here while it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tools.gpu.processes import ROOT, environment, kill

POLL = 0.5  # seconds


@dataclass
class Job:
    name: str
    command: list[str]  # the file to write is put after it
    limit: float  # seconds
    expected: float = 0.0  # seconds; of those side by side the longest start first
    gib: float = 0.0  # of GPU memory
    alone: bool = False
    file: Path | None = None
    process: subprocess.Popen | None = None
    started: float = 0.0
    read_at: float = field(default=0.0, repr=False)  # modification time of the file when it was last read

    def start(self, file: Path) -> None:
        one_thread = {} if self.alone else {"OMP_NUM_THREADS": "1"}  # of each of as many as there are cores
        self.file, self.started = file, time.monotonic()
        self.process = subprocess.Popen([*self.command, str(file)], cwd=ROOT, env=environment() | one_thread)

    def found(self) -> dict:
        """What its file says now, and since when it runs."""
        found = {"status": "running", "said": "", "targets": {}, "data": {}}
        if self.file.exists():
            self.read_at = self.file.stat().st_mtime
            found |= json.loads(self.file.read_text(encoding="utf-8"))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return found | {"seconds": round(time.monotonic() - self.started, 1), "when": now}

    def has_news(self) -> bool:
        return self.file.exists() and self.file.stat().st_mtime != self.read_at


def run(jobs: Sequence[Job], cores: int, gib: float, tell: Callable[[str, dict], None]) -> None:
    """tell(name, section): whenever one has found more, and when it ended. gib: the GPU's memory."""
    waiting = sorted(jobs, key=lambda job: (job.alone, 0.0 if job.alone else -job.expected))
    running: list[Job] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                for job in [*waiting]:
                    if _fits(job, running, cores, gib):
                        print(f"--- {job.name}", flush=True)
                        job.start(Path(folder, job.name.replace(" ", "-").replace("/", "-of-")).with_suffix(".json"))
                        waiting.remove(job)
                        running.append(job)
                time.sleep(POLL)
                for job in [*running]:
                    if _has_ended(job, tell):
                        running.remove(job)
        finally:  # Ctrl-C, SIGTERM
            for job in running:
                kill(job.process)
                found = job.found()
                tell(job.name, found | ({"status": "interrupted"} if found["status"] == "running" else {}))


def _fits(job: Job, running: list[Job], cores: int, gib: float) -> bool:
    if job.alone or any(other.alone for other in running):
        return not running
    return not running or (len(running) < cores and job.gib + sum(other.gib for other in running) <= gib)


def _has_ended(job: Job, tell: Callable[[str, dict], None]) -> bool:
    code = job.process.poll()
    if code is None and time.monotonic() - job.started > job.limit:
        kill(job.process)
        outcome = {"status": "timed out", "said": f"it took longer than {job.limit:.0f} s; --limit gives it more"}
    elif code is None:
        if job.has_news():
            tell(job.name, job.found())
        return False
    elif job.found()["status"] == "running":  # it could not say how it ended
        outcome = {"status": "died", "said": f"its process ended with {code}" + (" (a signal)" if code < 0 else "")}
    else:
        outcome = {}
    section = job.found() | outcome
    if outcome and (at := section["data"].get("at")):
        section["said"] += f"; it was at {at}"
    tell(job.name, section)
    print(f"--- {job.name}: {section['status']}, {section['seconds']} s: {section['said']}", flush=True)
    return True


def cores() -> int:
    return len(os.sched_getaffinity(0))
