"""What people see of a running study: a table that is drawn anew on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_xact.studies.state import Run

if TYPE_CHECKING:
    from megatron_xact.studies.running import Task

LINE_EVERY, TABLE_EVERY = 60.0, 2.0  # seconds


class Display:
    def __init__(self, study: Path, tasks: Sequence[Task]):
        self.study, self.tasks = study, tasks
        self.live = sys.stderr.isatty()
        self.drawn = 0  # lines of the table on the screen
        self.started = self.shown = time.monotonic()
        self.at_start = 0.0

    def begin(self) -> None:
        self.at_start = self._work()
        there = sum(t.state == "finished" for t in self.tasks)
        self.note(f"{self.study}: {len(self.tasks)} runs, {there} of them finished before")

    def say(self, task: Task, what: str) -> None:
        self.note(f"{task.run.name}: {what}")

    def note(self, line: str) -> None:
        self._wipe()
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)

    def show(self) -> None:
        now = time.monotonic()
        if now - self.shown < (TABLE_EVERY if self.live else LINE_EVERY):
            return
        self.shown = now
        if not self.live:
            running = [t.run.log.stem for t in self.tasks if t.state == "running"]
            self.note(f"{self._summary()}; running: {', '.join(running)}")
            return
        rows = self._rows()
        self._wipe()
        print("\n".join(rows), file=sys.stderr, flush=True)
        self.drawn = len(rows)

    def close(self) -> None:
        self._wipe()

    def _wipe(self) -> None:
        if self.drawn:
            print(f"\033[{self.drawn}F\033[J", end="", file=sys.stderr, flush=True)
            self.drawn = 0

    def _rows(self) -> list[str]:
        running = [t for t in self.tasks if t.state == "running"]
        width = max((len(t.run.name) for t in running), default=0)
        return [*(row(t.run, width) for t in running), f"  {self._summary()}"]

    def _summary(self) -> str:
        count = {s: sum(t.state == s for t in self.tasks) for s in ("finished", "running", "waiting", "failed")}
        told = ", ".join(f"{n} {name}" for name, n in count.items() if n)
        return f"{told}; {self.left()}"

    def left(self) -> str:
        """The time that is left at the pace so far, by work."""
        work = self._work()
        pace = (work - self.at_start) / max(1e-9, time.monotonic() - self.started)
        rest = sum(_whole(t) for t in self.tasks if t.state != "failed") - work
        return f"ETA {duration(rest / pace)}" if pace > 0 else "ETA not known yet"

    def _work(self) -> float:
        """Done of the runs that have not failed."""
        return sum(_done(t) for t in self.tasks if t.state != "failed")


def _whole(task: Task) -> float:
    return task.run.work * task.run.steps


def _done(task: Task) -> float:
    return _whole(task) if task.state == "finished" else task.run.work * task.run.done


def row(run: Run, width: int) -> str:
    """How far a run is, in one line; width: of its name."""
    share = run.done / run.steps
    return f"  {run.name:{width}}  [{'#' * int(20 * share):20}] {share:4.0%} of {run.steps:,} steps"


def listed(words: Sequence[str], between: str = ", ") -> str:
    """The first few."""
    more = f" and {len(words) - 4} more" if len(words) > 4 else ""
    return between.join(words[:4]) + more


def duration(seconds: float) -> str:
    """1:02:03 or 2:03; days as hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
