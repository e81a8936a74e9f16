"""Progress over bytes or tokens: a tqdm bar on a terminal, a plain line per interval anywhere else (a log, SLURM)."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_INTERVAL = 10.0  # seconds between lines where there is no terminal


class Progress:
    """`with Progress("encode", total) as progress: progress.update(n)`; `total` in `unit`s, None if unknown.

    `done`: those of an earlier run, which count as done but not for the speed.
    """

    def __init__(self, what: str, total: int | None, done: int = 0, unit: str = "B") -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self.done_before = done
        self.detail = ""
        self.started = self.last_line = time.monotonic()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=what, unit=unit, unit_scale=True) if terminal else None

    def update(self, more: int, total: int | None = None, detail: str = "") -> None:
        """`total`: a better estimate of it, if there is one. `detail`: what to say besides."""
        self.done += more
        self.total = total or self.total
        self.detail = detail
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix_str(detail, refresh=False)
            self.bar.update(more)
        elif time.monotonic() - self.last_line >= LINE_INTERVAL:
            self.last_line = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        speed = (self.done - self.done_before) / max(time.monotonic() - self.started, 1e-9)
        text = f"{self.what}: {self._size(self.done)}, {self._size(speed)}/s"
        if self.detail:
            text += f", {self.detail}"
        if self.total and speed > 0:
            seconds = max(self.total - self.done, 0) / speed
            share = min(self.done / self.total, 1.0)
            text += f", {share:.0%} of {self._size(self.total)}, ETA {seconds:.0f} s"
        return text

    def _size(self, number: float) -> str:
        return tqdm.format_sizeof(number, self.unit)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
