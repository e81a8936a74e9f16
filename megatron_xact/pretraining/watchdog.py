"""A thread on every rank that says the rank is alive, and ends it when no step is completed for too long.

When a rank stops, the others wait for it in a collective, for ever or until NCCL's time-out, which names no culprit.
Here each rank first writes its Python stacks to RUN/logs/stacks-rankN.txt. Then a few ranks, spread over the nodes, are
the judges and look at the statuses of all: one that does not beat any more is stopped (or its machine is lost); one
that beats but is not inside a collective, as the rest are, is asleep or busy in Python; else the one with the fewest
steps is behind. The other ranks take over what a judge says; where none speaks, since all of them are stopped or gone,
each looks at all statuses itself. All ranks end with the exit code for a hang, so that the launcher acts.

Over NCCL a collective returns at once. The GPU then waits in it, and the host in the first call after it that wants a
result, be it `.item()`: so a rank whose GPU has work left counts as inside a collective, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from megatron_xact.pretraining import exits, failures, signals
from megatron_xact.pretraining import status as status_files
from megatron_xact.pretraining.files import why_not
from megatron_xact.pretraining.status import Status

if TYPE_CHECKING:
    import torch

PATIENCE = 3  # times longer may take what is slow by nature: the first step (compilation), a save, the pictures
_SLOW = ("save_checkpoint", "_tell_results")  # functions under way
_MEETING = ("Ranks.from_first", "Ranks.to_first")  # where ranks wait for each other before they are a process group
JUDGES = 8  # at most; each reads every rank's status twice, the others only what these say
BEATS = 4  # between two looks at the statuses
SILENT = "it is not heard of any more: stopped, or its node is lost"


class Watchdog(threading.Thread):
    """`with Watchdog(...) as watchdog:` around a rank's work; `progress()` whenever something got done."""

    def __init__(self, run: Path | None, rank: int, ranks: int, timeout: float, terminal: TextIO):
        """run: the run's folder (None: no statuses, no verdict on others); timeout: in seconds, 0: none."""
        super().__init__(name="xact-watchdog", daemon=True)
        self.folder = status_files.folder_of(run) if run is not None else None
        self.ranks = range(ranks)
        self.timeout = timeout
        self.terminal = terminal
        slowest = status_files.SLOWEST_BEAT
        self.interval = min(slowest, max(0.2, timeout / 20)) if timeout else slowest
        self.status = Status(os.environ.get("XACT_ATTEMPT", ""), rank, status_files.host_name(), os.getpid())
        self.supervised = bool(self.status.attempt)
        self._progress = time.monotonic()
        self._steps_here = 0
        self._gpu = None  # the stream on which the trainer computes, once it does
        self._crash: TextIO | None = None
        self._over = threading.Event()
        self._writing = threading.Lock()

    def __enter__(self) -> Watchdog:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._record_crashes()
        self._beat()
        self.start()
        return self

    def progress(self, step: int | None = None) -> None:
        """Something got done: a microbatch, or with `step` that many steps of the run. Cheap; called by the trainer."""
        self._progress = time.monotonic()
        if self._gpu is None:
            self._gpu = _stream_of_this_thread()
        if step is not None:
            self.status.step = step
            self._steps_here += 1

    def _record_crashes(self) -> None:
        """NCCL aborts a rank when another one has died: without this, the two could not be told apart."""
        if not faulthandler.is_enabled():
            with contextlib.suppress(OSError):
                self._crash = open(status_files.crash_path(self.folder, self.status.rank), "w", encoding="utf-8")
                faulthandler.enable(self._crash)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._crash is not None:
            faulthandler.disable()
            with contextlib.suppress(OSError):
                self._crash.close()
                os.unlink(self._crash.name)
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.end("done", "")
        elif isinstance(error, SystemExit):
            self.end("user" if error.code == exits.USER_ERROR else "error", f"it ended with exit code {error.code}")
        elif isinstance(error, (ValueError, OSError)) and not failures.is_unreachable(error):
            self.end("user", str(error))
        elif isinstance(error, KeyboardInterrupt):
            self.end("interrupted", "")
        else:
            self.end(*failures.of_exception(error))

    def end(self, kind: str, reason: str, culprit: int | None = None) -> None:
        """The rank's last word; only the first one counts."""
        self._over.set()
        with self._writing:
            if self.status.kind is None:
                self.status.kind, self.status.reason, self.status.culprit = kind, reason, culprit
                if not self._write() and self.supervised and reason:  # its launcher cannot tell it
                    print(f"xact: error: rank {self.status.rank}: {reason}", file=self.terminal, flush=True)

    def run(self) -> None:
        while not self._over.wait(self.interval):
            self._beat()
            if self.timeout and time.monotonic() - self._progress > self._allowed():
                self._tell_hang()

    def _beat(self) -> None:
        stalled = self.timeout and time.monotonic() - self._progress > self.timeout / 2
        where, waiting = "", False
        if stalled:
            where, waiting = position(_main_frame())
            waiting = waiting or _has_work(self._gpu)
        with self._writing:
            if self.status.kind is None:
                self.status.beat += 1
                self.status.where, self.status.waiting = where, waiting
                self._write()

    def _write(self) -> bool:
        """False: it could not be written. A full or hiccuping file system must not end the training."""
        self.status.time, self.status.signal = time.time(), signals.received()
        if self.folder is not None:
            try:
                self.status.write(self.folder)
            except OSError as error:
                with contextlib.suppress(OSError):  # with --quiet this goes to the same disk
                    print(f"xact: cannot write {self.folder}: {why_not(error)}", file=sys.stderr)
                return False
        return True

    def _allowed(self) -> float:
        slow = any(frame.f_code.co_name in _SLOW for frame, _ in traceback.walk_stack(_main_frame()))
        return self.timeout * (PATIENCE if slow or not self._steps_here else 1)

    def _tell_hang(self) -> None:
        if self.folder is not None:
            stacks = self.folder.parent / f"stacks-rank{self.status.rank}.txt"
            with contextlib.suppress(OSError), open(stacks, "a", encoding="utf-8") as file:  # the disk may be at fault
                print(f"{time.ctime()}: no progress for {self._allowed():.0f} s", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        stood_still = self._progress
        rank, reason = self._verdict(stood_still)
        if self._over.is_set() or self._progress != stood_still:  # it ended, or goes on after all
            return
        self.end("hang", reason, rank)
        if self.supervised and reason.endswith(SILENT):
            self._end_stopped(rank)
        elif not self.supervised or self.folder is None:
            print(f"xact: error: rank {rank}, {reason}", file=self.terminal, flush=True)
        os._exit(exits.HANG)

    def _end_stopped(self, rank: int) -> None:
        """A stopped process takes no signal but this one, and the launcher would wait for it. Only on this host."""
        for culprit in status_files.read(self.folder, self.status.attempt, range(rank, rank + 1)).values():
            if culprit.host == self.status.host and culprit.pid in status_files.processes_of(self.status.attempt):
                os.kill(culprit.pid, signal.SIGKILL)

    def _verdict(self, stood_still: float) -> tuple[int, str]:
        """(the culprit, what is to be told of it); stood_still: time.monotonic() of the last progress."""
        if self.folder is None:
            culprit, what = self.status.rank, f"it is in {self.status.where}"
        else:
            judges = judges_of(self.ranks)
            if self.status.rank not in judges and (said := self._listen(judges)):
                return said
            culprit, what = self._judge()
        return culprit, f"no progress for {time.monotonic() - stood_still:.0f} s: {what}"

    def _listen(self, judges: range) -> tuple[int, str] | None:
        """What one of the judges says; None: they had the time twice over, and none of them has spoken."""
        for beat in range(4 * BEATS):
            self._beat()
            time.sleep(self.interval)
            if beat < 2 * BEATS - 1:  # no one can know yet
                continue
            for judge in judges:
                said = status_files.of_file(status_files.path(self.folder, judge))
                if said is not None and (said.attempt, said.kind) == (self.status.attempt, "hang"):
                    return judge if said.culprit is None else said.culprit, said.reason
        return None

    def _judge(self) -> tuple[int, str]:
        """(the culprit, what it does), from two looks at every rank's status, some beats apart."""
        looks = []
        for _ in range(2):
            for _ in range(BEATS):
                self._beat()
                time.sleep(self.interval)
            looks.append(status_files.read(self.folder, self.status.attempt, self.ranks))
        return verdict(*looks, self.ranks)


def judges_of(ranks: range) -> range:
    """Evenly spread, so that no node's loss takes all of them."""
    return ranks[:: -(-len(ranks) // JUDGES)]


def verdict(before: dict[int, Status], now: dict[int, Status], ranks: range) -> tuple[int, str]:
    """Which rank holds up the others, and what it does; `before` and `now`: two looks, some beats apart."""
    for rank in ranks:
        if rank not in now:
            return rank, "it never began"
    silent = [s for s in now.values() if s.kind is None and s.rank in before and s.beat == before[s.rank].beat]
    if silent:
        first = min(silent, key=lambda s: s.time)
        return first.rank, SILENT
    busy = [s for s in now.values() if s.where and not s.waiting]
    first = min(busy or now.values(), key=lambda s: (s.step, s.rank))
    if 0 < len(busy) < len(now):
        return first.rank, f"it is in {first.where}, and others wait for it"
    return first.rank, f"it is in {first.where}; no rank stands out, this one has done the fewest steps"


def position(frame: FrameType) -> tuple[str, bool]:
    """("function (file, line n)" of the innermost call, whether it waits for other ranks)."""
    frames = list(traceback.walk_stack(frame))
    codes = [frame.f_code for frame, _ in frames]
    waiting = any("torch/distributed/" in code.co_filename or code.co_qualname in _MEETING for code in codes)
    innermost, line = frames[0]
    file = "/".join(Path(innermost.f_code.co_filename).parts[-2:])
    return f"{innermost.f_code.co_name} ({file}, line {line})", waiting


def _stream_of_this_thread() -> torch.cuda.Stream | None:
    """None where no GPU is in use. Another thread would be told of a stream, and a GPU, of its own."""
    torch = sys.modules.get("torch")  # imported by the trainer, if at all
    return torch.cuda.current_stream() if torch is not None and torch.cuda.is_initialized() else None


def _has_work(stream: torch.cuda.Stream | None) -> bool:
    try:
        return stream is not None and not stream.query()
    except RuntimeError:  # the GPU has failed, which the trainer's next call tells
        return False


def _main_frame() -> FrameType:
    return sys._current_frames()[threading.main_thread().ident]
