"""A remembered signal becomes an orderly end of Megatron's loop: every rank leaves after the same step, saved.

The seam is Megatron's `exit_duration_in_mins`. The loop compares it with the time after every step, the evaluation
after every batch, and both take the maximum over all ranks, so that they leave together; the loop then saves. Here the
duration is endless until a signal makes it tiny. (Megatron's own --exit-signal-handler knows one signal, gathers a
flag from every rank at every step and is not asked during an evaluation.)

Before training there is nothing to save, and the ranks agree at two points: with the model built, and with the
checkpoint loaded.
"""

from __future__ import annotations

import functools
import math
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_xact.pretraining import signals
from megatron_xact.pretraining.status import FLAG, latest_step, write_json

_NOW = 1e-9  # minutes; 0 means "no limit"


def arm(args: Namespace, run: Path | None) -> None:
    """From now on a signal ends Megatron's loop. args: Megatron's global ones, which the loop reads at every step."""
    if run is not None and args.rank == 0:
        (run / FLAG).unlink(missing_ok=True)
    args.exit_duration_in_mins = args.exit_duration_in_mins or math.inf
    signals.when_received(lambda: setattr(args, "exit_duration_in_mins", _NOW))


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


def flag_requeue(run: Path | None, args: Namespace) -> str | None:
    """After a loop that ended early: the signal that did it, for which the first rank asks for a requeue, or None.

    A run that has reached its last step asks for nothing. A collective.
    """
    name = asked_by()
    step = latest_step(run) if run is not None else 0
    if name is None or (args.train_iters is not None and step >= args.train_iters):
        return None
    if run is not None and torch.distributed.get_rank() == 0:
        write_json(run / FLAG, {"signal": name, "step": step})
    return name
