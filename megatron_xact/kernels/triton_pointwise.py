"""One Triton kernel forward and one backward for every activation, gated or not; see `device_functions` for the maths.

The data are a matrix of rows (tokens) and columns; what is elementwise in every respect is one long row. A program owns
a tile of it, reads it once and writes it once: 4 bytes per bf16 element forward, 6 backward. Sums over elements (the
gradients of parameters, bias and per-token scale) leave each program as fp32 partial sums in places of their own, which
torch.sum adds in a fixed order: no atomics, so two runs give the same bits. Parameters are read from device memory:
nothing here waits for the GPU, and a CUDA graph may capture it.

Shape suffixes: R = rows, C = columns of y, W = columns of x (C, or 2C where gated: gate half first).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels.linear import BACKWARD, FORWARD
from megatron_xact.kernels.reference import Backward
from megatron_xact.kernels.triton_launch import (
    constants,
    contiguous,
    device_of,
    learned,
    load_parameters,
    slots,
    store_sums,
    sum_along,
)


class Tile(NamedTuple):
    """Elements of y that a program owns, and the warps of it."""

    elements: int
    warps: int


# (direction, are there rows) -> tile. Chosen from machine code for sm_80 and sm_90 (no spills, enough bytes under way
# from memory), not yet on a GPU; tools/gpu_suite.py --only tiles measures others. With rows more than one matrix may be
# read: with two accesses of each per thread the compiler would start the second after the first has been waited for.
TILES = {
    (FORWARD, False): Tile(4096, 8),
    (FORWARD, True): Tile(2048, 4),
    (BACKWARD, False): Tile(4096, 8),
    (BACKWARD, True): Tile(2048, 8),
}
MAX_TILE_COLUMNS = 1024  # where rows matter; 128 bf16 columns are 256 contiguous bytes
MIN_TILE_COLUMNS = 128


@triton.jit
def _tile(TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr):
    """(row indices [tile rows, 1] int64, column indices [1, tile columns] int64, row block, column block)."""
    program = tl.program_id(0)
    if TILE_ROWS == 1:  # the only row: nothing to divide before the first load
        row_block, column_block = program * 0, program
    else:
        row_block, column_block = program // COLUMN_BLOCKS, program % COLUMN_BLOCKS
    row = row_block.to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = column_block.to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    return row[:, None], column[None, :], row_block, column_block


@triton.jit
def _load_biased(pointer, bias_ptr, bias_offset, offset, column, mask, columns):
    """x + bias in fp32, 0 where masked; bias_ptr may be None, `column` is the place in it from bias_offset on."""
    x = tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + bias_offset + column, mask=column < columns, other=0.0).to(tl.float32)
    return x


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, bias_ptr, scale_ptr, p0, p1, p2, rows, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """y_RC = scale_R act(x_RW + bias_W). bias_ptr and scale_ptr may be None."""
    EXACT: tl.constexpr = y_ptr.dtype.element_ty != tl.bfloat16
    p0, p1, p2 = load_parameters(p0, p1, p2, LEARNED)
    row, column, _, _ = _tile(TILE_ROWS, TILE_COLUMNS, COLUMN_BLOCKS)
    mask = (row < rows) & (column < columns)
    x_offset = row * (columns * (2 if GATED else 1)) + column
    x = _load_biased(x_ptr, bias_ptr, 0, x_offset, column, mask, columns)
    y, _, _, _, _ = FUNCTION(x, p0, p1, p2, EXACT)
    if GATED:
        y *= _load_biased(x_ptr, bias_ptr, columns, x_offset + columns, column, mask, columns)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, dx_ptr, y_ptr, bias_ptr, dbias_ptr, scale_ptr, dscale_ptr, dp_ptr, p0, p1, p2, rows, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """dx_RW, and what is asked for (not None) of: y_RC again, and partial sums in fp32:

    dp_ptr [learned parameters, programs], dbias_ptr [row blocks, W], dscale_ptr [R, column blocks].
    """
    EXACT: tl.constexpr = dx_ptr.dtype.element_ty != tl.bfloat16
    p0, p1, p2 = load_parameters(p0, p1, p2, LEARNED)
    row, column, row_block, column_block = _tile(TILE_ROWS, TILE_COLUMNS, COLUMN_BLOCKS)
    mask = (row < rows) & (column < columns)
    width = columns * (2 if GATED else 1)
    x_offset, y_offset = row * width + column, row * columns + column
    x = _load_biased(x_ptr, bias_ptr, 0, x_offset, column, mask, columns)
    dy = tl.load(dy_ptr + y_offset, mask=mask, other=0.0).to(tl.float32)
    f, slope, d0, d1, d2 = FUNCTION(x, p0, p1, p2, EXACT)
    y = f
    df = dy  # gradient of y = f(x) up scale, by f
    if GATED:
        up = _load_biased(x_ptr, bias_ptr, columns, x_offset + columns, column, mask, columns)
        y = f * up
    if dscale_ptr is not None:
        tl.store(dscale_ptr + row * COLUMN_BLOCKS + column_block, sum_along(dy * y, 1)[:, None], mask=row < rows)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
        y *= scale
        df *= scale
    if GATED:
        dup = df * f
        df *= up
        tl.store(dx_ptr + x_offset + columns, dup.to(dx_ptr.dtype.element_ty), mask=mask)
    dx = df * slope
    tl.store(dx_ptr + x_offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if y_ptr is not None:
        tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        dbias_offset = row_block.to(tl.int64) * width + column
        tl.store(dbias_ptr + dbias_offset, sum_along(dx, 0)[None, :], mask=column < columns)
        if GATED:
            tl.store(dbias_ptr + dbias_offset + columns, sum_along(dup, 0)[None, :], mask=column < columns)
    # a tile's padding has dy = 0, so it adds nothing
    store_sums(dp_ptr, tl.program_id(0), tl.num_programs(0), df * d0, df * d1, df * d2, LEARNED)


def forward(
    activation: Activation, x: Tensor, p: Values, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """As `reference.forward`, in one pass."""
    x, rows, columns = _matrix(activation, x, rowwise=bias is not None or scale is not None)
    y = x.new_empty(activation.output_shape(x.shape))
    if y.numel():
        grid, options = launch(activation, p, FORWARD, rows, columns)
        with device_of(x):
            forward_kernel[grid](x, y, contiguous(bias), contiguous(scale), *slots(activation, p), rows, columns,
                                 **options)  # fmt: skip
    return y


def backward(
    activation: Activation,
    x: Tensor,
    p: Values,
    dy: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    emit_y: bool = False,
) -> Backward:
    """As `reference.backward`: one pass, and for each sum over elements an addition of its partial sums."""
    x, rows, columns = _matrix(activation, x, rowwise=bias is not None or scale is not None)
    grid, options = launch(activation, p, BACKWARD, rows, columns)
    symbols = learned(activation, p)

    def partial_sums(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    dx = torch.empty_like(x)
    y = x.new_empty(activation.output_shape(x.shape)) if emit_y else None
    dp = partial_sums(len(symbols), *grid)
    dbias = partial_sums(triton.cdiv(rows, options["TILE_ROWS"]), x.shape[-1]) if bias is not None else None
    dscale = partial_sums(rows, triton.cdiv(columns, options["TILE_COLUMNS"])) if scale is not None else None
    if x.numel():
        with device_of(x):
            backward_kernel[grid](
                dy.contiguous(), x, dx, y, contiguous(bias), dbias, contiguous(scale), dscale, dp,
                *slots(activation, p), rows, columns, **options,
            )  # fmt: skip
    # torch.sum has a fixed order for a given shape; each of these is 1/4096 to 1/32 of the data
    return Backward(
        dx,
        dict(zip(symbols, dp.sum(1), strict=True)),
        dbias.sum(0) if dbias is not None else None,
        dscale.sum(1).reshape(scale.shape) if scale is not None else None,
        y,
    )


def _matrix(activation: Activation, x: Tensor, rowwise: bool) -> tuple[Tensor, int, int]:
    """(x contiguous, rows, columns of y). A strided x is copied: its elements would not be 16 adjacent bytes anyway."""
    *rows, columns = activation.output_shape(x.shape) or (1,)
    x = x.contiguous()
    return (x, math.prod(rows), columns) if activation.gated or rowwise else (x, 1, x.numel())


def launch(activation: Activation, p: Values, direction: str, rows: int, columns: int) -> tuple[tuple[int], dict]:
    """Grid and compile-time arguments."""
    tile = TILES[direction, rows > 1]
    tile_columns = tile.elements if rows == 1 else _tile_columns(columns)
    tile_rows = tile.elements // tile_columns
    column_blocks = triton.cdiv(columns, tile_columns)
    return (triton.cdiv(rows, tile_rows) * column_blocks,), constants(activation, p) | {
        "TILE_ROWS": tile_rows,
        "TILE_COLUMNS": tile_columns,
        "COLUMN_BLOCKS": column_blocks if rows > 1 else 1,  # of one long row as many as there are programs
        "num_warps": tile.warps,
    }


def _tile_columns(columns: int) -> int:
    """No idle lanes where a multiple of 128 divides the columns, as in any real MLP."""
    divisor = columns & -columns  # the largest power of two in it
    fit = divisor if divisor >= MIN_TILE_COLUMNS else triton.next_power_of_2(max(columns, 1))
    return min(fit, MAX_TILE_COLUMNS)
