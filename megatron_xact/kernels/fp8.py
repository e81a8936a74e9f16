"""Activation and quantization to FP8 together, forward (y) and backward (dx): the door, and what the kernels compute.

Two ways to scale. `PerTensor`: one factor, chosen before the kernel runs; it also reports the largest magnitude (amax),
which delayed scaling keeps for later steps. `Blockwise`: one factor for every 1 x 128 values, from their own amax. Each
result comes row by row, transposed (an FP8 GEMM on Hopper wants both operands with their inner dimension contiguous, so
weight gradients need the transposed copy), or both; layouts and factors are those of TransformerEngine 2.20.

Values are rounded once, from fp32 to FP8, where bf16 in between would round twice. Current scaling, whose factor
depends on the amax of the same tensor, is a pass for the amax and one to quantize: `forward_amax`, `factor`, `forward`.
The same kernels quantize what is no activation's output: `cast`.

Shape suffixes: R = rows (tokens), C = columns, B = blocks of 128.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.baselines import IDENTITY
from megatron_xact.activations.record import Grads, Values
from megatron_xact.kernels import reference
from megatron_xact.kernels.backends import triton_unavailable_reason

BLOCK = 128
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class PerTensor:
    """q = saturate(value * scale); scale: (1,) fp32 on the data's device, read there."""

    scale: Tensor


@dataclass(frozen=True)
class Blockwise:
    """q = value * scale of its 1 x 128 block; power_of_two: scales rounded down to one, so that they round nothing."""

    power_of_two: bool = True


Scaling = PerTensor | Blockwise


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8; what was not asked for is None. value = q * scale_inv.

    rows_RC; columns_CR: transposed. Per tensor: both scale_inv are the same (1,), and amax (1,) is the largest
    |value|. Blockwise: row_scale_inv [C/128, R4] for blocks along C, column_scale_inv [R/128, C4] for blocks along R,
    where R4 and C4 are padded to multiples of 4; all fp32.
    """

    rows_RC: Tensor | None
    columns_CR: Tensor | None
    row_scale_inv: Tensor | None
    column_scale_inv: Tensor | None
    amax: Tensor | None = None


class QuantizedBackward(NamedTuple):
    """Gradients: of x, quantized; of the learned parameters by symbol (0-dim) and of bias in fp32."""

    dx: Quantized
    parameters: Grads
    bias: Tensor | None = None


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

    multiplier: [C] fp32, of y's columns before anything is quantized; what is quantized, and amax, are the products.
    ValueError: dtype is no FP8, x has no rows, or neither rows nor columns are wanted.
    """
    _check(x, dtype, rows or columns)
    if triton := _triton_for(activation, x):
        return triton.forward(activation, x, p, scaling, dtype, rows, columns, bias, multiplier)
    y = reference.forward(activation, _wide(x), p, bias)
    return quantize(y if multiplier is None else y * multiplier, scaling, dtype, rows, columns)


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
    _check(x, dtype, rows or columns)
    if activation.gated and isinstance(scaling, Blockwise) and dy.shape[-1] % BLOCK:
        raise ValueError(f"{dy.shape[-1]} columns: blocks of {BLOCK} would join gate and up; use a multiple of it")
    if triton := _triton_for(activation, x):
        return triton.backward(activation, x, p, dy, scaling, dtype, rows, columns, bias)
    exact = reference.backward(activation, _wide(x), p, dy, bias)
    return QuantizedBackward(quantize(exact.dx, scaling, dtype, rows, columns), exact.parameters, exact.bias)


def forward_amax(
    activation: Activation, x: Tensor, p: Values, bias: Tensor | None = None, by_column: bool = False
) -> Tensor:
    """The largest |y| as (1,) fp32, or of every column as [C], reading x and writing nothing else."""
    if triton := _triton_for(activation, x):
        return triton.forward_amax(activation, x, p, bias, by_column)
    y = reference.forward(activation, _wide(x), p, bias)
    return y.reshape(-1, y.shape[-1]).abs().amax(0).float() if by_column else _amax(y)


def amax(value: Tensor, by_column: bool = False) -> Tensor:
    """The largest magnitude, as `forward_amax` of the identity."""
    return forward_amax(IDENTITY, value, {}, by_column=by_column)


def backward_amax(activation: Activation, x: Tensor, p: Values, dy: Tensor, bias: Tensor | None = None) -> Tensor:
    """The largest |dx| as (1,) fp32, reading x and dy and writing nothing else."""
    if triton := _triton_for(activation, x):
        return triton.backward_amax(activation, x, p, dy, bias)
    return _amax(reference.backward(activation, _wide(x), p, dy, bias).dx)


def factor(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """The scale that maps amax to the largest number of the dtype; 1 where amax is 0, infinite or NaN. fp32."""
    largest = torch.finfo(torch.float32).max
    scale = (torch.finfo(dtype).max / amax.float()).clamp(max=largest)
    if power_of_two:
        scale = (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)  # without its mantissa
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def quantize(value: Tensor, scaling: Scaling, dtype: torch.dtype, rows: bool = True, columns: bool = True) -> Quantized:
    """A tensor [..., C] of any float dtype to FP8, by torch operations: what the kernels are compared with."""
    value_RC = value.reshape(-1, value.shape[-1]).float()
    if isinstance(scaling, PerTensor):
        q_RC = _saturated(value_RC * scaling.scale, dtype)
        scale_inv = 1.0 / scaling.scale
        return Quantized(
            q_RC if rows else None, q_RC.t().contiguous() if columns else None,
            scale_inv if rows else None, scale_inv if columns else None, _amax(value_RC),
        )  # fmt: skip
    by_row = _in_blocks(value_RC, scaling, dtype) if rows else (None, None)
    by_column = _in_blocks(value_RC.t(), scaling, dtype) if columns else (None, None)
    return Quantized(by_row[0], by_column[0], by_row[1], by_column[1])


def scales_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the factors of blocks along the columns: [blocks, rows padded to a multiple of 4]."""
    return -(-columns // BLOCK), -(-rows // 4) * 4


def _in_blocks(value_RC: Tensor, scaling: Blockwise, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = value_RC.shape
    padded = torch.nn.functional.pad(value_RC, (0, -columns % BLOCK)).reshape(rows, -1, BLOCK)
    scale_RB = factor(padded.abs().amax(-1), dtype, scaling.power_of_two)
    q_RC = _saturated(padded * scale_RB.unsqueeze(-1), dtype).reshape(rows, -1)[:, :columns].contiguous()
    scale_inv = value_RC.new_zeros(scales_shape(rows, columns))
    scale_inv[:, :rows] = (1.0 / scale_RB).t()
    return q_RC, scale_inv


def _saturated(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max  # torch's own conversion makes NaN of what is larger
    return scaled.clamp(-limit, limit).to(dtype)


def _amax(value: Tensor) -> Tensor:
    return value.abs().amax().float().reshape(1) if value.numel() else value.new_zeros(1, dtype=torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(x: Tensor, dtype: torch.dtype, anything: bool) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is no FP8 format; there are {', '.join(map(str, DTYPES))}")
    if x.dim() < 2:
        raise ValueError(f"x of shape {tuple(x.shape)} has no rows; FP8 needs at least two dimensions")
    if not anything:
        raise ValueError("neither rows nor columns are wanted: ask for one of them at least")


def _triton_for(activation: Activation, x: Tensor):
    """The module of the kernels, where they can run; else None."""
    if not x.is_cuda or triton_unavailable_reason() or not gpu_has_fp8(x.device):
        return None
    from megatron_xact.kernels import triton_fp8

    return triton_fp8 if triton_fp8.serves(activation, x) else None


@functools.cache
def gpu_has_fp8(device: torch.device) -> bool:
    """Has it FP8 conversions and tensor cores: Ada, Hopper or newer?"""
    return torch.cuda.get_device_capability(device) >= (8, 9)
