"""The signals that ask a run to end in order. They are only remembered here; Megatron's loop acts upon them.

A rank holds them back (blocks them) as long as it lives, and asks whether one is pending. What is blocked stays so in
every process that it starts, through fork and exec, and that is the point: schedulers signal all processes of a job,
torchrun those of a rank's group, and a save needs Megatron's helpers, a step the data loader's. Those have handlers of
their own, or none.

This happens before anything heavy is imported: torch takes 15 s, and a signal in that time would otherwise end the
process without a word. The other way round, such a process is not ended by the signal any more, so whoever holds it
back must look at `received()`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

DEFAULT = "SIGUSR1"  # what schedulers are asked to send before preemption or the wall-time limit
ALWAYS = "SIGTERM"  # what a machine, a scheduler or torchrun sends
CHOICES = (DEFAULT, "SIGUSR2", ALWAYS)

_received: str | None = None
_then: Callable[[], None] | None = None


def handled(name: str | None = None) -> set[signal.Signals]:
    """SIGTERM and the signal `name` (default: XACT_SIGNAL, set by the launcher, or SIGUSR1)."""
    return {signal.Signals[ALWAYS], signal.Signals[name or os.environ.get("XACT_SIGNAL", DEFAULT)]}


def heed(name: str | None = None) -> None:
    """Remember the signals of `handled(name)` as they come, also what was held back before; for a launcher."""
    _install(name)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled(name))


def hold(name: str | None = None) -> None:
    """Hold the signals of `handled(name)` back, here and in all processes started from here on, even after exec."""
    _install(name)  # for those that come through, see hold_in_rank
    signal.pthread_sigmask(signal.SIG_BLOCK, handled(name))


def hold_in_rank(name: str) -> None:
    """`hold`, for a process whose libraries start others through multiprocessing."""
    hold(name)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's agent may be killed at one blow with the launcher above it
        end_with_parent()
    # It unblocks SIGTERM when it starts, which would otherwise be just before the first helper (Python 3.12).
    resource_tracker.ensure_running()
    hold(name)
    atexit.register(_end_children)  # before multiprocessing's own


def _end_children() -> None:
    """multiprocessing sends those that are left at the end, e.g. after an error, SIGTERM, and waits. They hold it back.

    Killed are those that it would have signalled ("daemons"): for all others it waits only.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's tells of a data loader's worker that was killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def end_with_parent() -> None:
    """In a process that has been started, also for what it becomes: SIGTERM once its parent has died.

    So no run goes on without its launcher; its ranks save what they have done and end.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """`hold` for a while; then everything as before, and what was held back is forgotten."""
    global _received, _then
    handlers = {signal.Signals[name]: signal.getsignal(signal.Signals[name]) for name in CHOICES}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    hold()
    try:
        yield
    finally:
        _received = _then = None
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # forgets what is pending
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def received() -> str | None:
    """The name of the first of these signals that this process got; of those held back together, not SIGTERM."""
    global _received
    if _received is None:
        pending = signal.sigpending()
        _received = next((name for name in CHOICES if signal.Signals[name] in pending), None)
    return _received


def when_received(action: Callable[[], None]) -> None:
    """Call `action`, in the main thread, at each such signal that is heeded; now, if there was one already."""
    global _then
    _then = action
    if received() is not None:
        action()


def _install(name: str | None) -> None:
    for number in handled(name):
        signal.signal(number, _remember)


def _remember(number: int, frame: object) -> None:
    global _received
    _received = _received or signal.Signals(number).name
    if _then is not None:
        _then()
