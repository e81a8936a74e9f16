"""The signals that ask a run to end in order. They are only remembered here; Megatron's loop acts upon them.

Handlers are installed before anything heavy is imported: torch takes 15 s, and a signal in that time would otherwise
end the process without a word. The other way round, a process with such a handler is not ended by the signal any more,
so whoever installs it must look at `received()`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

DEFAULT = "SIGUSR1"  # what schedulers are asked to send before preemption or the wall-time limit
ALWAYS = "SIGTERM"  # what a machine, a scheduler or torchrun sends
CHOICES = (DEFAULT, "SIGUSR2", ALWAYS)

_received: str | None = None
_then: Callable[[], None] | None = None


def install(name: str | None = None) -> None:
    """Remember SIGTERM and the signal `name` (default: XACT_SIGNAL, set by the launcher, or SIGUSR1) from now on."""
    for each in {ALWAYS, name or os.environ.get("XACT_SIGNAL", DEFAULT)}:
        signal.signal(signal.Signals[each], _remember)


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """`install` for a while; then everything as before."""
    global _received, _then
    before = {name: signal.getsignal(signal.Signals[name]) for name in CHOICES}
    install()
    try:
        yield
    finally:
        _received = _then = None
        for name, handler in before.items():
            signal.signal(signal.Signals[name], handler)


def ignore() -> None:
    """For a helper process of a rank: schedulers signal those too, and Megatron cannot save without its own."""
    for name in CHOICES:
        signal.signal(signal.Signals[name], signal.SIG_IGN)


def received() -> str | None:
    """The name of the first of these signals that this process got."""
    return _received


def when_received(action: Callable[[], None]) -> None:
    """Call `action`, in the main thread, at each such signal; now, if there was one already."""
    global _then
    _then = action
    if _received is not None:
        action()


def _remember(number: int, frame: object) -> None:
    global _received
    _received = _received or signal.Signals(number).name
    if _then is not None:
        _then()
