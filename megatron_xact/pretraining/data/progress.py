"""Progress over bytes: a tqdm bar on a terminal, one plain line per interval anywhere else (a log, SLURM)."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_INTERVAL = 10.0  # seconds between lines where there is no terminal


class Progress:
    """`with Progress("encode", total) as progress: progress.update(n)`; `total` in bytes, None if unknown."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total = what, total
        self.done = 0
        self.started = self.last_line = time.monotonic()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=what, unit="B", unit_scale=True) if terminal else None

    def update(self, num_bytes: int) -> None:
        self.done += num_bytes
        if self.bar is not None:
            self.bar.update(num_bytes)
        elif time.monotonic() - self.last_line >= LINE_INTERVAL:
            self.last_line = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        speed = self.done / max(time.monotonic() - self.started, 1e-9)
        text = f"{self.what}: {self.done / 1e6:.1f} MB, {speed / 1e6:.2f} MB/s"
        if self.total and speed > 0:
            seconds = max(self.total - self.done, 0) / speed
            share = min(self.done / self.total, 1.0)
            text += f", {share:.0%} of {self.total / 1e6:.1f} MB, ETA {seconds:.0f} s"
        return text

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
