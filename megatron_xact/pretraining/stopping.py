"""A remembered signal becomes an orderly end of Megatron's loop: every rank leaves after the same step, saved.

The seam is Megatron's `exit_duration_in_mins`. The loop compares it with the time after every step, the evaluation
after every batch, and both take the maximum over all ranks, so that they leave together; the loop then saves. That is
a collective that the host waits for, so there is no duration but when it is needed: a tiny one for all ranks once they
have agreed, about once a second, that one of them got a signal, and an endless one, until a signal makes it tiny, in
evaluations. (Megatron's own --exit-signal-handler knows one signal, gathers a flag from every rank at every step and is
not asked during an evaluation.)

Before training there is nothing to save, and the ranks agree at two points: with the model built, and with the
checkpoint loaded.
"""

from __future__ import annotations

import functools
import math
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_xact.pretraining import signals
from megatron_xact.pretraining.status import FLAG, latest_step, write_json

_NOW = 1e-9  # minutes; 0 means "no limit"
_APART = (10, 5, 2, 1)  # steps between two looks for a signal: as many as fit into a second, by the slowest rank


class Stop:
    """Ends Megatron's loop, or an evaluation, on all ranks alike; they decide alike whether there is a duration."""

    def __init__(self, args: Namespace, run: Path | None):
        """args: Megatron's global ones, which the loop reads at every step."""
        if run is not None and args.rank == 0:
            (run / FLAG).unlink(missing_ok=True)
        self._args = args
        self._asked_for = args.exit_duration_in_mins  # by the user, to be compared at every step
        self._apart = 1
        self._looked = (0, -math.inf)  # step, time in s
        args.exit_duration_in_mins = self._asked_for or math.inf

    def look_after(self, finalize_model_grads: Callable) -> Callable:
        """This function for `config.finalize_model_grads_func`, which all ranks call at every step, and then a look."""

        def watched(*args, **kwargs) -> None:
            finalize_model_grads(*args, **kwargs)
            self._look(self._args.curr_iteration + 1)

        return watched

    def notice_before(self, forward_step: Callable) -> Callable:
        """`forward_step`, but first, where the ranks are going to compare a duration, a signal makes it tiny."""

        def noticing(data_iterator, model):
            self._notice()
            return forward_step(data_iterator, model)

        return noticing

    def leave_if_broken_off(self) -> None:
        """SystemExit on every rank if a signal ended the evaluation after the loop: it is to be made again.

        A collective.
        """
        broken_off = torch.tensor([self._args.exit_duration_in_mins == _NOW], dtype=torch.int32, device="cuda")
        torch.distributed.all_reduce(broken_off, op=torch.distributed.ReduceOp.MAX)
        if broken_off.item():
            raise SystemExit(0)

    def _look(self, step: int) -> None:
        """After the gradients of the step that completes `step` steps."""
        args = self._args
        evaluated = step == args.train_iters or (args.eval_interval and step % args.eval_interval == 0)
        args.exit_duration_in_mins = self._asked_for or (math.inf if evaluated else None)
        if step % self._apart == 0 and self._agree(step):
            args.exit_duration_in_mins = _NOW
        self._notice()

    def _notice(self) -> None:
        if self._args.exit_duration_in_mins and signals.received():
            self._args.exit_duration_in_mins = _NOW

    def _agree(self, step: int) -> bool:
        """Did any rank get a signal? Also sets when to look again. A collective."""
        then, self._looked = self._looked, (step, time.monotonic())
        seconds = (self._looked[1] - then[1]) / (step - then[0]) if step > then[0] else math.inf
        heard = torch.tensor([signals.received() is not None, seconds], dtype=torch.float32, device="cuda")
        torch.distributed.all_reduce(heard, op=torch.distributed.ReduceOp.MAX)
        asked, slowest = heard.tolist()
        self._apart = next((steps for steps in _APART if steps * slowest <= 1.0), 1)
        return bool(asked)


def leave_if_asked() -> None:
    """SystemExit on every rank if any of them got a signal. A collective."""
    if asked_by():
        raise SystemExit(0)


def unless_asked(function: Callable) -> Callable:
    """`function`, which every rank calls, but `leave_if_asked` first."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        leave_if_asked()
        return function(*args, **kwargs)

    return call


def asked_by() -> str | None:
    """The signal that any rank got, as all ranks agree. A collective."""
    name = signals.received()
    number = torch.tensor([signal.Signals[name] if name else 0], dtype=torch.int32, device="cuda")
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return signal.Signals(number.item()).name if number.item() else None


def flag_requeue(run: Path | None) -> str | None:
    """After a run that ended early: the signal that did it, for which the first rank asks for a requeue, or None.

    Also at the last step: evaluation and report are left to do. A collective.
    """
    name = asked_by()
    if name is not None and run is not None and torch.distributed.get_rank() == 0:
        write_json(run / FLAG, {"signal": name, "step": latest_step(run)})
    return name
