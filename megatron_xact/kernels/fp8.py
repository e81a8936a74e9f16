"""Activation and quantization to FP8 together, forward (y) and backward (dx): the door, and what the kernels compute.

Two ways to scale. `PerTensor`: one factor, chosen before the kernel runs; it also reports the largest magnitude (amax),
which delayed scaling keeps for later steps. `Blockwise`: one factor for every 1 x 128 values, from their own amax. Each
result comes row by row, transposed (an FP8 GEMM on Hopper wants both operands with their inner dimension contiguous, so
weight gradients need the transposed copy), or both; layouts and factors are those of TransformerEngine 2.20.

Values are rounded once, from fp32 to FP8, where bf16 in between would round twice. Current scaling, whose factor
depends on the amax of the same tensor, is a pass for the amax and one to quantize: `forward_amax`, `factor`, `forward`.
The same kernels quantize what is no activation's output: `cast`.

Each function is an operator (`fp8_operators`): torch.compile sees single nodes of known shapes, whose results are those
of eager code bit for bit. Autocast changes nothing; autograd and torch.func are refused.

Shape suffixes: R = rows (tokens), C = columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.baselines import IDENTITY
from megatron_xact.activations.record import Values
from megatron_xact.kernels import fp8_operators as operators
from megatron_xact.kernels.fp8_operators import gpu_has_fp8
from megatron_xact.kernels.fp8_reference import (
    BLOCK,
    DTYPES,
    Blockwise,
    PerTensor,
    Quantized,
    QuantizedBackward,
    Scaling,
    quantize,
)
from megatron_xact.kernels.operators import key_in_graph
from megatron_xact.kernels.ops import learned_of

__all__ = [
    "BLOCK", "DTYPES", "Blockwise", "PerTensor", "Quantized", "QuantizedBackward", "Scaling", "amax", "backward",
    "backward_amax", "cast", "factor", "forward", "forward_amax", "gpu_has_fp8", "quantize",
]  # fmt: skip


def forward(
    activation: Activation,
    x: Tensor,
    p: Values,
    scaling: Scaling,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    rows: bool = True,
    columns: bool = True,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> Quantized:
    """y = activation(x + bias) in FP8. x: [..., C] (gated: [..., 2C]); all but its last dimension are rows.

    p: effective values by symbol, tensors of one element where learned, numbers where fixed.
    multiplier: [C] fp32, of y's columns before anything is quantized; what is quantized, and amax, are the products.
    ValueError: dtype is no FP8, x has no rows, or neither rows nor columns are wanted.
    """
    q = operators.call_forward(
        x, learned_of(activation, p), bias, multiplier, *_arguments(scaling), dtype, rows, columns,
        key_in_graph(activation),
    )  # fmt: skip
    return _quantized(q, scaling, rows, columns)


def cast(value: Tensor, scaling: Scaling, dtype: torch.dtype, *, rows: bool = True, columns: bool = True,
         multiplier: Tensor | None = None) -> Quantized:  # fmt: skip
    """A tensor [..., C] in FP8, as `forward` of the identity."""
    return forward(IDENTITY, value, {}, scaling, dtype, rows=rows, columns=columns, multiplier=multiplier)


def backward(
    activation: Activation,
    x: Tensor,
    p: Values,
    dy: Tensor,
    scaling: Scaling,
    dtype: torch.dtype = torch.float8_e5m2,
    *,
    rows: bool = True,
    columns: bool = True,
    bias: Tensor | None = None,
) -> QuantizedBackward:
    """dx in FP8 (gated: [R, 2C], gradients of gate and up side by side), and the sums over elements; as `forward`."""
    dx, dp, dbias = operators.call_backward(
        dy, x, learned_of(activation, p), bias, *_arguments(scaling), dtype, rows, columns, key_in_graph(activation)
    )
    parameters = dict(zip((q.symbol for q in activation.trainable), dp.unbind(), strict=True))
    return QuantizedBackward(_quantized(dx, scaling, rows, columns), parameters, None if bias is None else dbias)


def forward_amax(
    activation: Activation, x: Tensor, p: Values, bias: Tensor | None = None, by_column: bool = False
) -> Tensor:
    """The largest |y| as (1,) fp32, or of every column as [C], reading x and writing nothing else."""
    return operators.call_forward_amax(x, learned_of(activation, p), bias, by_column, key_in_graph(activation))


def amax(value: Tensor, by_column: bool = False) -> Tensor:
    """The largest magnitude, as `forward_amax` of the identity."""
    return forward_amax(IDENTITY, value, {}, by_column=by_column)


def backward_amax(activation: Activation, x: Tensor, p: Values, dy: Tensor, bias: Tensor | None = None) -> Tensor:
    """The largest |dx| as (1,) fp32, reading x and dy and writing nothing else."""
    return operators.call_backward_amax(dy, x, learned_of(activation, p), bias, key_in_graph(activation))


def factor(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """The scale that maps amax to the largest number of the dtype; 1 where amax is 0, infinite or NaN. fp32."""
    return operators.call_factor(amax, dtype, power_of_two)


def _arguments(scaling: Scaling) -> tuple[Tensor | None, bool]:
    """An operator's scale and power_of_two."""
    return (scaling.scale, False) if isinstance(scaling, PerTensor) else (None, scaling.power_of_two)


def _quantized(results: list[Tensor], scaling: Scaling, rows: bool, columns: bool) -> Quantized:
    """From what an operator returns."""
    parts = iter(results)
    rows_RC, columns_CR = (next(parts) if wanted else None for wanted in (rows, columns))
    if isinstance(scaling, PerTensor):
        scale_inv, amax = parts
        return Quantized(rows_RC, columns_CR, scale_inv if rows else None, scale_inv if columns else None, amax)
    return Quantized(rows_RC, columns_CR, *(next(parts) if wanted else None for wanted in (rows, columns)))
