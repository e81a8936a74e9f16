"""Activations on the CPU as fused, vectorised, threaded C++, which torch.compile makes from the reference records.

Instead of one pass over memory per operation (a dozen of them, forward and backward), one pass each. Compiling costs
seconds once per activation and dtype; the result stays in torch's on-disk cache for later processes. So only tensors
large enough to pay for it come here, and where no C++ compiler is found, none do.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels import reference

logger = logging.getLogger(__name__)

# Elements from which the fused pass is used: below it, a step is dominated by overhead that no fusion removes.
MIN_ELEMENTS = 1 << 16


def unavailable_reason() -> str | None:
    """Why the fused path cannot be used on this machine, or None."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        return f"torch.compile finds no C++ compiler ({compiler})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else f"torch.compile needs Python's C headers (no {header}: python3-dev)"


def serves(x: Tensor) -> bool:
    """Is the fused path the one to use for pre-activations x? Says once why not, where it never is."""
    return x.device.type == "cpu" and x.numel() >= MIN_ELEMENTS and x.dtype != torch.float64 and _available()


def forward(
    activation: Activation, x: Tensor, p: Values, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """As `reference.forward`, in one pass."""
    return _compiled(activation, "forward")(x, p, bias, scale)


def backward(
    activation: Activation,
    x: Tensor,
    p: Values,
    dy: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    emit_y: bool = False,
) -> reference.Backward:
    """As `reference.backward`, with dx and all sums from one pass."""
    return _compiled(activation, "backward")(x, p, dy, bias, scale, emit_y)


@functools.cache
def _available() -> bool:
    reason = unavailable_reason()
    if reason:
        logger.warning("activations run unfused on this CPU, several times slower: %s", reason)
    return reason is None


@functools.cache
def _compiled(activation: Activation, name: str) -> Callable:
    def call(*args):
        return getattr(reference, name)(activation, *args)

    # dynamo allows a handful of compilations per code object, and all records share theirs: give each its own.
    code = call.__code__.replace(co_name=f"{activation.name}_{name}")
    return torch.compile(
        types.FunctionType(code, call.__globals__, closure=call.__closure__), fullgraph=True, dynamic=True
    )
