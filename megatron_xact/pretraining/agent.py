"""torchrun, silent about failures: the supervisor tells them in one line, torchrun in forty.

It hears of one signal only, the first, and passes it on: at a second torchrun would give up waiting for ranks that are
saving. Those start with the signals held back, as they go on to do by themselves.

Its exit code is that of the rank that failed first, as a shell gives it: 128 + the signal that ended it.

    python -m megatron_xact.pretraining.agent [torchrun's words]
"""

from __future__ import annotations

import logging
import signal
import sys
import threading

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_xact.pretraining import signals

SAVING = 600  # seconds that ranks get after a signal; torchrun's own 30 are too few for a checkpoint


def main() -> int:
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    for each in signals.handled():
        signal.signal(each, _end)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.handled())
    threading.Thread(target=_let_one_through, daemon=True).start()
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException:
        return 1
    return 0


def _end(number: int, _frame: object) -> None:
    """What torchrun's --signals-to-handle makes of a signal, which torch 2.8 lacks: the ranks get it, too."""
    raise SignalException(f"signal {number}", signal.Signals(number))


def _let_one_through() -> None:
    first = {signal.sigwait(signals.handled())}
    _give_time_to_save()
    signal.raise_signal(*first)  # held back in this thread too, until here
    signal.pthread_sigmask(signal.SIG_UNBLOCK, first)  # the handler runs in the main thread
    signal.pthread_sigmask(signal.SIG_BLOCK, first)


def _give_time_to_save() -> None:
    """torchrun's --shutdown-timeout, which torch 2.11 and earlier lack. Not before a signal: where a rank has failed,
    the others need no more than 30 s."""
    close = PContext.close
    PContext.close = lambda self, death_sig=None, timeout=None: close(self, death_sig, SAVING)


if __name__ == "__main__":
    sys.exit(main())
