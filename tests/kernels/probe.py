"""A kernel that does nothing but evaluate a device function: all five results, in fp32."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.kernels.device_functions import MAX_PARAMETERS, device_function


@triton.jit
def probe_kernel(x_ptr, out_ptr, p0, p1, p2, n, FUNCTION: tl.constexpr, EXACT: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask, other=0.0)
    f, slope, d0, d1, d2 = FUNCTION(x, p0, p1, p2, EXACT)
    zero = x * 0.0  # a derivative may be a bare 0.0
    tl.store(out_ptr + i, f, mask=mask)
    tl.store(out_ptr + n + i, slope + zero, mask=mask)
    tl.store(out_ptr + 2 * n + i, d0 + zero, mask=mask)
    tl.store(out_ptr + 3 * n + i, d1 + zero, mask=mask)
    tl.store(out_ptr + 4 * n + i, d2 + zero, mask=mask)


def evaluate(activation: Activation, x: Tensor, p: dict[str, float], exact: bool) -> dict[str, Tensor]:
    """{"f": ..., "slope": ..., symbol: derivative} at x, fp32."""
    out = torch.full((5, len(x)), math.nan, device=x.device)
    values = [p[q.symbol] for q in activation.parameters] + [0.0] * (MAX_PARAMETERS - len(activation.parameters))
    size = triton.next_power_of_2(len(x)) if triton.knobs.runtime.interpret else 512  # it interprets every program
    probe_kernel[(triton.cdiv(len(x), size),)](
        x.float(), out, *values, len(x),
        FUNCTION=device_function(activation), EXACT=exact, SIZE=size, enable_fp_fusion=True,
    )  # fmt: skip
    return dict(zip(["f", "slope", *(q.symbol for q in activation.parameters)], out, strict=False))
