"""Matrices in FP8: how they are scaled and laid out, and made by torch operations: what the kernels are compared with.

Shape suffixes: R = rows (tokens), C = columns, B = blocks of 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_xact.activations.record import Grads

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


def empty(
    rows: int, width: int, x: Tensor, scaling: Scaling, dtype: torch.dtype, by_row: bool, by_column: bool
) -> Quantized:
    """Of [rows, width] on x's device, to be filled; per tensor its scale_inv is there already, and no amax."""
    if isinstance(scaling, PerTensor):
        scale_inv = 1.0 / scaling.scale
        row_scale, column_scale = scale_inv, scale_inv
    else:  # zeros: what pads the scales is not written
        row_scale = x.new_zeros(scales_shape(rows, width), dtype=torch.float32) if by_row else None
        column_scale = x.new_zeros(scales_shape(width, rows), dtype=torch.float32) if by_column else None
    return Quantized(
        x.new_empty(rows, width, dtype=dtype) if by_row else None,
        x.new_empty(width, rows, dtype=dtype) if by_column else None,
        row_scale if by_row else None,
        column_scale if by_column else None,
    )


def quantize(value: Tensor, scaling: Scaling, dtype: torch.dtype, rows: bool = True, columns: bool = True) -> Quantized:
    """A tensor [..., C] of any float dtype to FP8."""
    value_RC = value.reshape(-1, value.shape[-1]).float().contiguous()
    if isinstance(scaling, PerTensor):
        q_RC = _saturated(value_RC * scaling.scale, dtype)
        scale_inv = 1.0 / scaling.scale
        return Quantized(
            q_RC if rows else None, q_RC.t().clone(memory_format=torch.contiguous_format) if columns else None,
            scale_inv if rows else None, scale_inv if columns else None, largest(value_RC),
        )  # fmt: skip
    by_row = _in_blocks(value_RC, scaling, dtype) if rows else (None, None)
    by_column = _in_blocks(value_RC.t(), scaling, dtype) if columns else (None, None)
    return Quantized(by_row[0], by_column[0], by_row[1], by_column[1])


def factor(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """The scale that maps amax to the largest number of the dtype; 1 where amax is 0, infinite or NaN. fp32."""
    top = torch.finfo(torch.float32).max
    amax = amax.float()
    # of a number and a tensor, torch multiplies by the reciprocal, and rounds twice
    scale = (torch.full_like(amax, torch.finfo(dtype).max) / amax).clamp(max=top)
    if power_of_two:
        scale = (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)  # without its mantissa
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def largest(value: Tensor) -> Tensor:
    """|value| as (1,) fp32; 0 of nothing. NaN, which stays one in FP8 by any factor, does not count, here and below."""
    return _magnitudes(value).amax().float().reshape(1) if value.numel() else value.new_zeros(1, dtype=torch.float32)


def largest_of_columns(value: Tensor) -> Tensor:
    """|value| of every column of [..., C] as [C] fp32; 0 of nothing."""
    columns = value.shape[-1]
    if not value.numel():
        return value.new_zeros(columns, dtype=torch.float32)
    return _magnitudes(value).reshape(-1, columns).amax(0).float()


def _magnitudes(value: Tensor) -> Tensor:
    return value.abs().nan_to_num(nan=0.0, posinf=torch.inf)


def scales_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the factors of blocks along the columns: [blocks, rows padded to a multiple of 4]."""
    return -(-columns // BLOCK), -(-rows // 4) * 4


def _in_blocks(value_RC: Tensor, scaling: Blockwise, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = value_RC.shape
    padded = torch.nn.functional.pad(value_RC, (0, -columns % BLOCK)).reshape(rows, -(-columns // BLOCK), BLOCK)
    scale_RB = factor(_magnitudes(padded).amax(-1), dtype, scaling.power_of_two)
    q_RC = _saturated(padded * scale_RB.unsqueeze(-1), dtype).flatten(1)[:, :columns].contiguous()
    scale_inv = value_RC.new_zeros(scales_shape(rows, columns))
    scale_inv[:, :rows] = (1.0 / scale_RB).t()
    return q_RC, scale_inv


def _saturated(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max  # torch's own conversion makes NaN of what is larger
    return scaled.clamp(-limit, limit).to(dtype)
