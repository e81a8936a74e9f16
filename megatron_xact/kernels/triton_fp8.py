"""Activation and quantization to FP8 in one pass over memory, for every activation; `fp8` says what is computed.

A program owns a tile of 128 x 128: both block directions of 1x128 scaling are complete in it, and it is transposed on
chip. Forward reads 2 bytes per bf16 element and writes 1 row by row and 1 transposed: 4, and backward 6, where
quantizing a bf16 result in a second pass moves 8 and 10. Sums leave as partial sums, as in `triton_pointwise`.

Suffixes as in `fp8`; W = columns of x (C, or 2C where gated: gate half first).
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels.fp8_reference import BLOCK, PerTensor, Quantized, QuantizedBackward, Scaling, empty
from megatron_xact.kernels.triton_launch import (
    constants,
    contiguous,
    device_of,
    evaluated,
    learned,
    load_biased,
    load_parameters,
    slots,
    store_sums,
    sum_along,
)

# Chosen from machine code for sm_90 (no spills, then fewest instructions), not yet on a GPU.
NUM_WARPS = 8
NUM_WARPS_OF_PLAIN_GATED_BACKWARD = 16  # gated and nothing learned: there ptxas hoists what it can, and spills
# LLVM of Triton 3.6 aborts the process (SLP vectorizer) on forward kernels, per tensor and transposed, with a 16-bit
# bias, and on some with any bias where 16 does not divide the rows; 3.9's does not.
BIAS_ABORTS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
# Forward, by whether scaling is blockwise: with 128 two programs fit a multiprocessor; left alone, ptxas rather spills
# than pass that.
MAX_REGISTERS_OF_FORWARD = {True: 128, False: 160}


@triton.jit
def _positions(program, columns, TILE: tl.constexpr):
    """(row indices [tile] int64, column indices [tile] int64, row block, column block)."""
    column_blocks = tl.cdiv(columns, TILE)
    row_block, column_block = program // column_blocks, program % column_blocks
    row = row_block.to(tl.int64) * TILE + tl.arange(0, TILE)
    column = column_block.to(tl.int64) * TILE + tl.arange(0, TILE)
    return row, column, row_block, column_block


@triton.jit
def _factors(amax, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """(as `fp8.factor`, correctly rounded; its inverse)."""
    usable = (amax > 0.0) & (amax < float("inf"))
    if POWER_OF_TWO:
        # By exponents alone, without a division. Both formats' largest number is 1.75 times a power of two.
        tl.static_assert(LARGEST == 448.0 or LARGEST == 57344.0)
        TOP: tl.constexpr = 262 if LARGEST == 448.0 else 269  # twice the exponents' bias, and that power's
        bits = amax.to(tl.int32, bitcast=True)
        mantissa_above = (bits & 0x7FFFFF) > 0x600000
        exponent = tl.minimum(TOP - (bits >> 23) - mantissa_above.to(tl.int32), 254)
        exponent = tl.where(usable, exponent, 127)
        inverse = tl.where(exponent == 254, 0x400000, (254 - exponent) << 23)  # 2^-127 has no exponent of its own
        return (exponent << 23).to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)
    scale = tl.minimum(tl.math.div_rn(LARGEST, amax), 3.4028234663852886e38)
    scale = tl.where(usable, scale, 1.0)
    return scale, tl.math.div_rn(1.0, scale)


@triton.jit
def _store(
    value, rows_ptr, columns_ptr, row_scale_ptr, column_scale_ptr, scale, row, column, row_block, column_block,
    first_column, rows, columns, width,
    BLOCKWISE: tl.constexpr, POWER_OF_TWO: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix [rows, width] from `first_column` on, as it is wanted; pointers of what is not are None."""
    in_rows, in_columns = row < rows, column < columns
    mask = in_rows[:, None] & in_columns[None, :]
    place = first_column + column
    if rows_ptr is not None:
        if BLOCKWISE:
            factor, inverse = _factors(tl.max(tl.abs(value), 1), LARGEST, POWER_OF_TWO)
            block = first_column // 128 + column_block
            scale_place = block.to(tl.int64) * ((rows + 3) // 4 * 4) + row
            tl.store(row_scale_ptr + scale_place, inverse, mask=in_rows)
            quantized = value * factor[:, None]
        else:
            quantized = value * scale
        offset = row[:, None] * width + place[None, :]
        tl.store(rows_ptr + offset, quantized.to(rows_ptr.dtype.element_ty), mask=mask)
    if columns_ptr is not None:
        if BLOCKWISE:
            factor, inverse = _factors(tl.max(tl.abs(value), 0), LARGEST, POWER_OF_TWO)
            scale_place = row_block.to(tl.int64) * ((width + 3) // 4 * 4) + place
            tl.store(column_scale_ptr + scale_place, inverse, mask=in_columns)
            quantized = value * factor[None, :]
        else:
            quantized = value * scale
        offset = place[:, None] * rows + row[None, :]
        transposed = tl.trans(quantized.to(columns_ptr.dtype.element_ty))
        tl.store(columns_ptr + offset, transposed, mask=in_columns[:, None] & in_rows[None, :])


@triton.jit
def forward_kernel(
    x_ptr, bias_ptr, multiplier_ptr, rows_ptr, columns_ptr, row_scale_ptr, column_scale_ptr, scale_ptr, amax_ptr,
    column_amax_ptr, p0, p1, p2, rows, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCKWISE: tl.constexpr, POWER_OF_TWO: tl.constexpr, LARGEST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y in FP8, and the programs' largest |y|; pointers of what is not wanted are None.

    amax_ptr [programs]: of their tiles; column_amax_ptr [row blocks, C]: of their columns.
    """
    p0, p1, p2 = load_parameters(p0, p1, p2, LEARNED)
    row, column, row_block, column_block = _positions(tl.program_id(0), columns, TILE)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    width = columns * (2 if GATED else 1)
    x_offset = row[:, None] * width + column[None, :]
    x = load_biased(x_ptr, bias_ptr, 0, x_offset, column[None, :], mask, columns)
    y, _, _, _, _ = evaluated(x, p0, p1, p2, FUNCTION, False, INTERPRETED)
    if GATED:
        y *= load_biased(x_ptr, bias_ptr, columns, x_offset + columns, column[None, :], mask, columns)
    if bias_ptr is not None:
        y = tl.where(mask, y, 0.0)  # every activation of 0 is 0, of a bias in a tile's padding it is not
    if multiplier_ptr is not None:
        y *= tl.load(multiplier_ptr + column, mask=column < columns, other=0.0)[None, :]
    if amax_ptr is not None:
        tl.store(amax_ptr + tl.program_id(0), tl.max(tl.max(tl.abs(y), 1), 0))
    if column_amax_ptr is not None:
        column_amax_place = row_block.to(tl.int64) * columns + column
        tl.store(column_amax_ptr + column_amax_place, tl.max(tl.abs(y), 0), mask=column < columns)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    _store(y, rows_ptr, columns_ptr, row_scale_ptr, column_scale_ptr, scale, row, column, row_block, column_block,
           0, rows, columns, columns, BLOCKWISE, POWER_OF_TWO, LARGEST)  # fmt: skip


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, bias_ptr, rows_ptr, columns_ptr, row_scale_ptr, column_scale_ptr, scale_ptr, amax_ptr,
    dbias_ptr, dp_ptr, p0, p1, p2, rows, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCKWISE: tl.constexpr, POWER_OF_TWO: tl.constexpr, LARGEST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx in FP8; and, where their pointers are not None, the programs' largest |dx| and partial sums in fp32:

    amax_ptr [programs], dp_ptr [learned parameters, programs], dbias_ptr [row blocks, W].
    """
    p0, p1, p2 = load_parameters(p0, p1, p2, LEARNED)
    program = tl.program_id(0)
    half = 0
    if GATED:  # neighbours share a tile, one for each half: together they need more registers than there are
        half = program % 2
        program = program // 2
    row, column, row_block, column_block = _positions(program, columns, TILE)
    in_columns = column < columns
    mask = (row < rows)[:, None] & in_columns[None, :]
    width = columns * (2 if GATED else 1)
    x_offset = row[:, None] * width + column[None, :]
    # x comes last: of dy and up only the product stays in registers
    dy = tl.load(dy_ptr + row[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if half == 0:
        df = dy
        if GATED:
            df *= load_biased(x_ptr, bias_ptr, columns, x_offset + columns, column[None, :], mask, columns)
        x = load_biased(x_ptr, bias_ptr, 0, x_offset, column[None, :], mask, columns)
        _f, slope, d0, d1, d2 = evaluated(x, p0, p1, p2, FUNCTION, False, INTERPRETED)
        dx = df * slope
        if dp_ptr is not None:
            store_sums(dp_ptr, tl.program_id(0), tl.num_programs(0), df * d0, df * d1, df * d2, LEARNED)
    else:
        x = load_biased(x_ptr, bias_ptr, 0, x_offset, column[None, :], mask, columns)
        f, _slope, _d0, _d1, _d2 = evaluated(x, p0, p1, p2, FUNCTION, False, INTERPRETED)
        dx = dy * f
    first_column = half * columns
    if amax_ptr is not None:
        tl.store(amax_ptr + tl.program_id(0), tl.max(tl.max(tl.abs(dx), 1), 0))
    if dbias_ptr is not None:
        dbias_place = row_block.to(tl.int64) * width + first_column + column
        tl.store(dbias_ptr + dbias_place, sum_along(dx, 0), mask=in_columns)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    _store(dx, rows_ptr, columns_ptr, row_scale_ptr, column_scale_ptr, scale, row, column, row_block, column_block,
           first_column, rows, columns, width, BLOCKWISE, POWER_OF_TWO, LARGEST)  # fmt: skip


def forward(
    activation: Activation, x: Tensor, p: Values, scaling: Scaling, dtype: torch.dtype, rows: bool, columns: bool,
    bias: Tensor | None, multiplier: Tensor | None,
) -> Quantized:  # fmt: skip
    """As `fp8.forward`."""
    x, num_rows, num_columns = _matrix(activation, x)
    y = empty(num_rows, num_columns, x, scaling, dtype, rows, columns)
    amax = _launch_forward(activation, x, p, bias, y, scaling, dtype, multiplier)
    return y if amax is None else _with_amax(y, amax)


def backward(
    activation: Activation, x: Tensor, p: Values, dy: Tensor, scaling: Scaling, dtype: torch.dtype, rows: bool,
    columns: bool, bias: Tensor | None,
) -> QuantizedBackward:  # fmt: skip
    """As `fp8.backward`."""
    x, num_rows, num_columns = _matrix(activation, x)
    dx = empty(num_rows, x.shape[-1], x, scaling, dtype, rows, columns)
    symbols = learned(activation, p)
    programs = _programs(num_rows, num_columns) * (1 + activation.gated)
    # zeros: of the two programs of a gated tile, one has no such sums
    dp = x.new_zeros(len(symbols), programs, dtype=torch.float32)
    dbias = x.new_empty(triton.cdiv(num_rows, BLOCK), x.shape[-1], dtype=torch.float32) if bias is not None else None
    amax = _launch_backward(activation, x, p, dy, bias, dx, scaling, dtype, dbias, dp)
    return QuantizedBackward(
        dx if amax is None else _with_amax(dx, amax),
        dict(zip(symbols, dp.sum(1), strict=True)),
        None if dbias is None else dbias.sum(0),
    )


def forward_amax(activation: Activation, x: Tensor, p: Values, bias: Tensor | None, by_column: bool = False) -> Tensor:
    """As `fp8.forward_amax`."""
    x, num_rows, num_columns = _matrix(activation, x)
    if not by_column:
        return _largest(_launch_forward(activation, x, p, bias, NOTHING, None, torch.float8_e4m3fn))
    partials = x.new_empty(triton.cdiv(num_rows, BLOCK), num_columns, dtype=torch.float32)
    _launch_forward(activation, x, p, bias, NOTHING, None, torch.float8_e4m3fn, column_amax=partials)
    return partials.amax(0) if num_rows else partials.new_zeros(num_columns)


def backward_amax(activation: Activation, x: Tensor, p: Values, dy: Tensor, bias: Tensor | None) -> Tensor:
    """As `fp8.backward_amax`."""
    x, _, _ = _matrix(activation, x)
    return _largest(_launch_backward(activation, x, p, dy, bias, NOTHING, None, torch.float8_e5m2, None, None))


NOTHING = Quantized(None, None, None, None)


def _launch_forward(
    activation, x, p, bias, y: Quantized, scaling: Scaling | None, dtype, multiplier=None, column_amax=None
) -> Tensor | None:
    """Fills y and column_amax; the programs' largest |y| where the scaling is not blockwise."""
    rows, columns = x.shape[0], x.shape[1] // (1 + activation.gated)
    grid, amax, scale, options = _launch(activation, x, p, _programs(rows, columns), scaling, dtype)
    options["maxnreg"] = MAX_REGISTERS_OF_FORWARD[options["BLOCKWISE"]]
    if bias is not None and BIAS_ABORTS and not options["BLOCKWISE"]:
        bias = bias.float()
        if rows % 16:
            x, bias = x.float() + bias, None  # the same sum, in a pass of its own
    if x.numel():
        with device_of(x):
            forward_kernel[grid](
                x, contiguous(bias), contiguous(multiplier), y.rows_RC, y.columns_CR, *_scales(y, scaling), scale,
                amax, column_amax, *slots(activation, p), rows, columns, **options,
            )  # fmt: skip
    return amax


def _launch_backward(activation, x, p, dy, bias, dx: Quantized, scaling, dtype, dbias, dp) -> Tensor | None:
    """Fills dx, dbias and dp; the programs' largest |dx| where the scaling is not blockwise."""
    rows, columns = x.shape[0], x.shape[1] // (1 + activation.gated)
    programs = _programs(rows, columns) * (1 + activation.gated)
    grid, amax, scale, options = _launch(activation, x, p, programs, scaling, dtype, backward_warps(activation))
    if x.numel():
        with device_of(x):
            backward_kernel[grid](
                dy.contiguous(), x, contiguous(bias), dx.rows_RC, dx.columns_CR, *_scales(dx, scaling), scale, amax,
                dbias, dp, *slots(activation, p), rows, columns, **options,
            )  # fmt: skip
    return amax


def backward_warps(activation: Activation) -> int:
    return NUM_WARPS_OF_PLAIN_GATED_BACKWARD if activation.gated and not activation.trainable else NUM_WARPS


def _launch(activation, x, p, programs, scaling: Scaling | None, dtype, num_warps=NUM_WARPS):
    """(grid, amax partials or None, scale or None, compile-time arguments)."""
    blockwise = scaling is not None and not isinstance(scaling, PerTensor)
    options = constants(activation, p) | {
        "BLOCKWISE": blockwise,
        "POWER_OF_TWO": blockwise and scaling.power_of_two,
        "LARGEST": torch.finfo(dtype).max,
        "TILE": BLOCK,
        "INTERPRETED": triton.knobs.runtime.interpret,
        "num_warps": num_warps,
    }
    amax = None if blockwise else x.new_empty(programs, dtype=torch.float32)
    return (programs,), amax, scaling.scale if isinstance(scaling, PerTensor) else None, options


def _matrix(activation: Activation, x: Tensor) -> tuple[Tensor, int, int]:
    """(x as a contiguous [R, W], R, C)."""
    columns = activation.output_shape(x.shape)[-1]
    x = x.reshape(-1, x.shape[-1]).contiguous()
    return x, x.shape[0], columns


def _scales(q: Quantized, scaling: Scaling | None) -> tuple[Tensor | None, Tensor | None]:
    """What the kernel writes of the factors: blockwise ones."""
    written = not (scaling is None or isinstance(scaling, PerTensor))
    return (q.row_scale_inv, q.column_scale_inv) if written else (None, None)


def _with_amax(q: Quantized, partials: Tensor) -> Quantized:
    return dataclasses.replace(q, amax=_largest(partials))


def _largest(partials: Tensor) -> Tensor:
    return partials.amax(0, keepdim=True) if partials.numel() else partials.new_zeros(1)


def _programs(rows: int, columns: int) -> int:
    return triton.cdiv(rows, BLOCK) * triton.cdiv(columns, BLOCK)
