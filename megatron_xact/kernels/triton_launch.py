"""What every Triton kernel of an activation is launched with: its device function, its parameters, its operands."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels.backends import triton_unavailable_reason
from megatron_xact.kernels.device_functions import MAX_PARAMETERS, device_function


@triton.jit
def load_parameters(p0, p1, p2, LEARNED: tl.constexpr):
    """A learned parameter comes as a pointer to one fp32, a fixed one as a number."""
    if LEARNED & 1:
        p0 = tl.load(p0)
    if LEARNED & 2:
        p1 = tl.load(p1)
    if LEARNED & 4:
        p2 = tl.load(p2)
    return p0, p1, p2


HAS_MAP_ELEMENTWISE = tl.constexpr(hasattr(tl, "map_elementwise"))  # Triton 3.4, of torch 2.8, has not


class _Exactly:
    """Triton's code generator for tl.map_elementwise, which can hand no compile-time argument on: it adds EXACT."""

    def __init__(self, generator, exact: tl.constexpr):
        self.generator, self.exact = generator, exact

    def call_JitFunction(self, function, args, kwargs):
        return self.generator.call_JitFunction(function, args, kwargs | {"EXACT": self.exact})


@tl.core.builtin
def _by_element(function, exact, *args, _semantic=None, _generator=None):
    """tl.map_elementwise of a function that is a compile-time argument, which Triton does not unwrap."""
    generator = _Exactly(_generator, exact)
    return tl.map_elementwise(function.value, *args, _semantic=_semantic, _generator=generator)


@triton.jit
def evaluated(x, p0, p1, p2, FUNCTION: tl.constexpr, EXACT: tl.constexpr, INTERPRETED: tl.constexpr):
    """The device function, element after element: operation after operation, intermediates would fill the registers."""
    if INTERPRETED or not HAS_MAP_ELEMENTWISE:
        return FUNCTION(x, p0, p1, p2, EXACT)
    else:
        return _by_element(FUNCTION, EXACT, x, p0, p1, p2)


@triton.jit
def sum_along(products, AXIS: tl.constexpr):
    """tl.sum, of which every thread that has a share gets the same bits.

    Adding 0 makes each product a rounded number of its own. A thread that holds one product would else fuse it into its
    addition of a neighbour's, which is rounded, and the neighbour the other way round: two sums for one place.
    """
    return tl.sum(products + 0.0, AXIS)


@triton.jit
def store_sums(dp_ptr, place, places, s0, s1, s2, LEARNED: tl.constexpr):
    """The sums of those of s0, s1 and s2 that are learned, to column `place` of dp_ptr [learned parameters, places].

    A thread holds several of what is summed, or sums: see sum_along.
    """
    dp_ptr += place
    if LEARNED & 1:
        tl.store(dp_ptr, tl.sum(s0))
    if LEARNED & 2:
        tl.store(dp_ptr + (LEARNED & 1) * places, tl.sum(s1))
    if LEARNED & 4:
        tl.store(dp_ptr + ((LEARNED & 1) + (LEARNED >> 1 & 1)) * places, tl.sum(s2))


def unserved_reason(activation: Activation, dtype: torch.dtype) -> str | None:
    """Why this activation has no kernel for x of this dtype, or None."""
    if len(activation.parameters) > MAX_PARAMETERS:
        return f"it has more than {MAX_PARAMETERS} parameters"
    if device_function(activation) is None:
        return "it has no device function (kernels/device_functions.py)"
    if activation.eps:
        return "eps asks for the bits of eager code"
    return None if dtype in (torch.float32, torch.float16, torch.bfloat16) else f"no kernel computes in {dtype}"


def no_product_reason(activation: Activation, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no kernel here multiplies matrices of this dtype and applies this activation, or None."""
    if reason := unserved_reason(activation, dtype):
        return reason
    if dtype == torch.float32:
        return f"tensor cores would round {dtype} operands; only bf16 and fp16 are multiplied here"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on an NVIDIA GPU"
    return triton_unavailable_reason()


def learned(activation: Activation, p: Values) -> list[str]:
    """Symbols of the parameters that are tensors, in the record's order, whatever the order of p."""
    return [q.symbol for q in activation.parameters if isinstance(p[q.symbol], Tensor)]


def constants(activation: Activation, p: Values) -> dict:
    """Compile-time arguments and options that follow from the activation and which of its parameters are tensors."""
    tensors = learned(activation, p)
    return {
        "FUNCTION": device_function(activation),
        "GATED": activation.gated,
        "LEARNED": sum(1 << i for i, q in enumerate(activation.parameters) if q.symbol in tensors),
        "enable_fp_fusion": True,  # Triton means to change its default
    }


def slots(activation: Activation, p: Values) -> list[Tensor | float]:
    """The arguments p0, p1, p2: a learned parameter as one fp32 on the device, a fixed one as a number."""
    values = [p[q.symbol] for q in activation.parameters]
    tensors = [v.to(torch.float32) if isinstance(v, Tensor) else v for v in values]
    return tensors + [0.0] * (MAX_PARAMETERS - len(values))


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def device_of(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()  # Triton's interpreter: CPU
