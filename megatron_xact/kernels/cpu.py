"""Activations on the CPU as fused, vectorised, threaded C++, which torch.compile makes from the reference records.

Instead of one pass over memory per operation (a dozen of them, forward and backward), one pass each. Compiling costs
seconds once per activation and dtype; the result stays in torch's on-disk cache for later processes. So only tensors
large enough to pay for it come here, and where no C++ compiler is found, none do.

The compiled code writes into memory that is allocated here, because how that is done decides the time: `_empty` says.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import types
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels import reference, toolchain

logger = logging.getLogger(__name__)

# Elements from which the fused pass is used: below it, a step is dominated by overhead that no fusion removes.
MIN_ELEMENTS = 1 << 16
# Bytes from which glibc takes every allocation from the kernel anew, and returns it when freed.
ALWAYS_FRESH = 1 << 25


def unavailable_reason() -> str | None:
    """Why the fused path cannot be used on this machine, or None."""
    return toolchain.lacks_for_torch()


def serves(x: Tensor) -> bool:
    """Is the fused path the one to use for pre-activations x? Says once why not, where it never is."""
    return x.device.type == "cpu" and x.numel() >= MIN_ELEMENTS and x.dtype != torch.float64 and _available()


def forward(
    activation: Activation, x: Tensor, p: Values, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """As `reference.forward`, in one pass."""
    y = _empty(activation.output_shape(x.shape), x.dtype)
    flat = functools.partial(_flat, rowwise=activation.gated or bias is not None or scale is not None)
    _compiled(activation, _forward_into)(flat(x), p, bias, _flat(scale), flat(y))
    return y


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
    dx = _empty(x.shape, x.dtype)
    y = _empty(activation.output_shape(x.shape), x.dtype) if emit_y else None
    flat = functools.partial(_flat, rowwise=activation.gated or bias is not None or scale is not None)
    parts = [_dynamic(part) for part in flat(dx).chunk(2 if activation.gated else 1, dim=-1)]
    call = _compiled(activation, _backward_into)
    dp, dbias, dscale = call(flat(x), p, flat(dy), bias, _flat(scale), parts, flat(y))
    return reference.Backward(dx, dp, dbias, None if scale is None else dscale.reshape(scale.shape), y)


def _forward_into(activation: Activation, x, p, bias, scale, y) -> None:
    y.copy_(reference.forward(activation, x, p, bias, scale))


def _backward_into(activation: Activation, x, p, dy, bias, scale, parts, y):
    found, *sums = reference.backward_in_parts(activation, x, p, dy, bias, scale)
    for part, values in zip(parts, found, strict=True):
        part.copy_(values)
    if y is not None:
        y.copy_(reference.forward(activation, x, p, bias, scale))
    return sums


def _flat(x: Tensor | None, rowwise: bool = False) -> Tensor | None:
    """[rows, columns], or one dimension where rows do not matter: any shape runs the same compiled code."""
    return None if x is None else _dynamic(x.reshape(-1, x.shape[-1]) if rowwise else x.reshape(-1))


def _dynamic(x: Tensor) -> Tensor:
    """For compilation: of any number of rows. `dynamic=True` would make variables of a record's constants too."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for a result, in huge pages if it is large.

    Large memory is fresh from the kernel, which zeroes it page by page at first touch: of 4 KiB, that takes longer than
    to compute what is written (100 MB on two cores: 25 ms; of 2 MiB: 13 ms; memory in use before: 8 ms).
    """
    x = torch.empty(shape, dtype=dtype)
    if x.nbytes >= ALWAYS_FRESH and hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        page = mmap.PAGESIZE
        start, end = -(-x.data_ptr() // page) * page, (x.data_ptr() + x.nbytes) // page * page
        _madvise()(start, end - start, mmap.MADV_HUGEPAGE)  # where it is refused, nothing changes
    return x


@functools.cache
def _madvise() -> Callable:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


@functools.cache
def _available() -> bool:
    reason = unavailable_reason()
    if reason:
        logger.warning("activations run unfused on this CPU, several times slower: %s", reason)
    return reason is None


@functools.cache
def _compiled(activation: Activation, function: Callable) -> Callable:
    def call(*args):
        return function(activation, *args)

    from megatron_xact.kernels.fusion import SumsLast  # which imports torch's compiler

    # dynamo allows a handful of compilations per code object, and all records share theirs: give each its own.
    code = call.__code__.replace(co_name=f"{activation.name}{function.__name__}")
    return torch.compile(
        types.FunctionType(code, call.__globals__, closure=call.__closure__),
        fullgraph=True,
        options={"post_grad_custom_post_pass": SumsLast()},
    )
