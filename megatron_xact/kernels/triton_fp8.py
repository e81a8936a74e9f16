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
    load_parameters,
    slots,
    store_sums,
    sum_along,
)

# Chosen from machine code for sm_90 (no spills, then fewest instructions), not yet on a GPU. One kernel spills, by 40
# bytes: backward of xatlu, blockwise, with a bias.
NUM_WARPS = 8
# Forward, by whether two programs are to fit a multiprocessor, which blockwise scaling leaves room for if no bias is
# added; left alone, ptxas rather spills than pass 128.
MAX_REGISTERS_OF_FORWARD = {True: 128, False: 160}


@triton.jit
def _tile(program, rows, columns, COLUMN_BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """(first row, first column, both int64; row and column indices from these on [tile]; which of them exist [tile]).

    Triton gives a thread rows that are a quarter of the tile apart. In this order four of them are neighbours in the
    matrix, so that the thread has whole words of the transposed one.
    """
    first_row = (program // COLUMN_BLOCKS).to(tl.int64) * TILE
    first_column = (program % COLUMN_BLOCKS).to(tl.int64) * TILE
    column = tl.arange(0, TILE)
    row = column % (TILE // 4) * 4 + column // (TILE // 4)
    in_rows = row < tl.minimum(rows - first_row, TILE).to(tl.int32)
    in_columns = column < tl.minimum(columns - first_column, TILE).to(tl.int32)
    return first_row, first_column, row, column, in_rows, in_columns


@triton.jit
def _load(pointer, offset, mask, INTERPRETED: tl.constexpr):
    """In fp32, 0 where masked.

    16-bit numbers are widened by PTX: Triton 3.6 would rather exchange those of x between threads than bytes of y, and
    evaluate the activation once more for the transposed matrix; of this it does not know that it widens.
    """
    value = tl.load(pointer + offset, mask=mask, other=0.0)
    if INTERPRETED or not (value.dtype == tl.bfloat16 or value.dtype == tl.float16):
        return value.to(tl.float32)
    elif value.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [value], tl.float32, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise("cvt.f32.f16 $0, $1;", "=f,h", [value], tl.float32, is_pure=True, pack=1)


@triton.jit
def _load_biased(pointer, bias_ptr, shift, offset, column, mask, in_columns, INTERPRETED: tl.constexpr):
    """x + bias, as _load; bias_ptr may be None. shift: 0, or the columns to up, of a row of x and of the bias alike."""
    x = _load(pointer + shift, offset, mask, INTERPRETED)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + shift + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _factors(amax, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """(as `fp8.factor`, correctly rounded; its inverse)."""
    if POWER_OF_TWO:
        # By exponents alone, without a division. Both formats' largest number is 1.75 times a power of two.
        tl.static_assert(LARGEST == 448.0 or LARGEST == 57344.0)
        LOWEST: tl.constexpr = (
            8 if LARGEST == 448.0 else 15
        )  # that power's exponent: of amax, where the factor is 2^127
        bits = amax.to(tl.int32, bitcast=True)
        usable = (bits - 1).to(tl.uint32, bitcast=True) < 0x7F7FFFFF  # not 0, inf or nan
        # the exponent of amax beyond that one, one more where its mantissa is above 1.75
        beyond = (bits + (0x1FFFFF - (LOWEST << 23))) & -0x800000
        factor = (254 << 23) - tl.maximum(beyond, 0)
        factor = tl.where(usable, factor, 127 << 23)
        inverse = tl.maximum((254 << 23) - factor, 0x400000)  # 2^-127 has no exponent of its own
        return factor.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)
    usable = (amax > 0.0) & (amax < float("inf"))
    scale = tl.minimum(tl.math.div_rn(LARGEST, amax), 3.4028234663852886e38)
    scale = tl.where(usable, scale, 1.0)
    return scale, tl.math.div_rn(1.0, scale)


@triton.jit
def _words(values, FORMAT: tl.constexpr):
    """Rounded to FP8 [tile / 4, tile] int32: four neighbours of a column in each; rows of `values` as `_tile` has them.

    The instruction rounds two numbers that come from anywhere: no byte is moved after it.
    """
    TILE: tl.constexpr = values.shape[1]
    CVT: tl.constexpr = "cvt.rn.satfinite.e5m2x2.f32 " if FORMAT == tl.float8e5 else "cvt.rn.satfinite.e4m3x2.f32 "
    quarters = tl.permute(tl.reshape(values, [2, 2, TILE // 4, TILE]), [2, 3, 1, 0])
    lower, upper = tl.split(quarters)
    first, second = tl.split(lower)
    third, fourth = tl.split(upper)
    return tl.inline_asm_elementwise(
        "{.reg .b16 low, high; " + CVT + "low, $2, $1; " + CVT + "high, $4, $3; mov.b32 $0, {low, high};}",
        "=r,f,f,f,f", [first, second, third, fourth], tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _store(
    value, rows_ptr, columns_ptr, row_scale_ptr, column_scale_ptr, scale,
    first_row, first_column, row, column, in_rows, in_columns, rows, width,
    BLOCKWISE: tl.constexpr, POWER_OF_TWO: tl.constexpr, LARGEST: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix [rows, width] as it is wanted; pointers of what is not are None."""
    TILE: tl.constexpr = value.shape[0]
    if rows_ptr is not None:
        if BLOCKWISE:
            factor, inverse = _factors(tl.max(tl.abs(value), 1), LARGEST, POWER_OF_TWO)
            scale_place = first_column // TILE * ((rows + 3) // 4 * 4) + first_row
            tl.store(row_scale_ptr + scale_place + row, inverse, mask=in_rows)
            quantized = value * factor[:, None]
        else:
            quantized = value * scale
        rows_ptr += first_row * width + first_column
        offset = row[:, None].to(tl.int64) * width + column[None, :]
        mask = in_rows[:, None] & in_columns[None, :]
        tl.store(rows_ptr + offset, quantized.to(rows_ptr.dtype.element_ty), mask=mask)
    if columns_ptr is not None:
        if BLOCKWISE:
            factor, inverse = _factors(tl.max(tl.abs(value), 0), LARGEST, POWER_OF_TWO)
            scale_place = first_row // TILE * ((width + 3) // 4 * 4) + first_column
            tl.store(column_scale_ptr + scale_place + column, inverse, mask=in_columns)
            quantized = value * factor[None, :]
        else:
            quantized = value * scale
        columns_ptr += first_column * rows + first_row
        if WORDS:
            transposed = tl.trans(_words(quantized, columns_ptr.dtype.element_ty))
            columns_ptr = columns_ptr.to(tl.pointer_type(tl.int32))
        else:  # back into order
            low = tl.reshape(quantized.to(columns_ptr.dtype.element_ty), [4, TILE // 4, TILE])
            transposed = tl.reshape(tl.permute(low, [2, 1, 0]), [TILE, TILE])
        LENGTH: tl.constexpr = transposed.shape[1]
        place = tl.arange(0, LENGTH)
        in_length = place < tl.minimum((rows - first_row) // (TILE // LENGTH), LENGTH).to(tl.int32)
        offset = column[:, None].to(tl.int64) * (rows // (TILE // LENGTH)) + place[None, :]
        tl.store(columns_ptr + offset, transposed, mask=in_columns[:, None] & in_length[None, :])


@triton.jit
def forward_kernel(
    x_ptr, bias_ptr, multiplier_ptr, rows_ptr, columns_ptr, row_scale_ptr, column_scale_ptr, scale_ptr, amax_ptr,
    column_amax_ptr, p0, p1, p2, rows, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCKWISE: tl.constexpr, POWER_OF_TWO: tl.constexpr, LARGEST: tl.constexpr, WORDS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y in FP8, and the programs' largest |y|; pointers of what is not wanted are None.

    amax_ptr [programs]: of their tiles; column_amax_ptr [row blocks, C]: of their columns.
    """
    p0, p1, p2 = load_parameters(p0, p1, p2, LEARNED)
    first_row, first_column, row, column, in_rows, in_columns = _tile(
        tl.program_id(0), rows, columns, COLUMN_BLOCKS, TILE
    )
    mask = in_rows[:, None] & in_columns[None, :]
    width = columns * (2 if GATED else 1)
    x_ptr += first_row * width + first_column
    x_offset = row[:, None].to(tl.int64) * width + column[None, :]
    if bias_ptr is not None:
        bias_ptr += first_column
    x = _load_biased(x_ptr, bias_ptr, 0, x_offset, column, mask, in_columns, INTERPRETED)
    y, _, _, _, _ = evaluated(x, p0, p1, p2, FUNCTION, False, INTERPRETED)
    if GATED:
        y *= _load_biased(x_ptr, bias_ptr, columns, x_offset, column, mask, in_columns, INTERPRETED)
    if bias_ptr is not None:
        y = tl.where(mask, y, 0.0)  # every activation of 0 is 0, of a bias in a tile's padding it is not
    if multiplier_ptr is not None:
        y *= tl.load(multiplier_ptr + first_column + column, mask=in_columns, other=0.0)[None, :]
    if amax_ptr is not None:
        tl.store(amax_ptr + tl.program_id(0), tl.max(tl.max(tl.abs(y), 1), 0))
    if column_amax_ptr is not None:
        column_amax_ptr += first_row // TILE * columns + first_column
        tl.store(column_amax_ptr + column, tl.max(tl.abs(y), 0), mask=in_columns)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    _store(y, rows_ptr, columns_ptr, row_scale_ptr, column_scale_ptr, scale,
           first_row, first_column, row, column, in_rows, in_columns, rows, columns,
           BLOCKWISE, POWER_OF_TWO, LARGEST, WORDS)  # fmt: skip


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, bias_ptr, rows_ptr, columns_ptr, row_scale_ptr, column_scale_ptr, scale_ptr, amax_ptr,
    dbias_ptr, dp_ptr, p0, p1, p2, rows, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCKWISE: tl.constexpr, POWER_OF_TWO: tl.constexpr, LARGEST: tl.constexpr, WORDS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr, TILE: tl.constexpr,
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
    first_row, first_column, row, column, in_rows, in_columns = _tile(program, rows, columns, COLUMN_BLOCKS, TILE)
    mask = in_rows[:, None] & in_columns[None, :]
    width = columns * (2 if GATED else 1)
    x_ptr += first_row * width + first_column
    dy_ptr += first_row * columns + first_column
    x_offset = row[:, None].to(tl.int64) * width + column[None, :]
    if bias_ptr is not None:
        bias_ptr += first_column
    # x comes last: of dy and up only the product stays in registers
    dy = _load(dy_ptr, row[:, None].to(tl.int64) * columns + column[None, :], mask, INTERPRETED)
    if half == 0:
        df = dy
        if GATED:
            df *= _load_biased(x_ptr, bias_ptr, columns, x_offset, column, mask, in_columns, INTERPRETED)
        x = _load_biased(x_ptr, bias_ptr, 0, x_offset, column, mask, in_columns, INTERPRETED)
        _f, slope, d0, d1, d2 = evaluated(x, p0, p1, p2, FUNCTION, False, INTERPRETED)
        dx = df * slope
        if dp_ptr is not None:
            store_sums(dp_ptr, tl.program_id(0), tl.num_programs(0), df * d0, df * d1, df * d2, LEARNED)
    else:
        x = _load_biased(x_ptr, bias_ptr, 0, x_offset, column, mask, in_columns, INTERPRETED)
        f, _slope, _d0, _d1, _d2 = evaluated(x, p0, p1, p2, FUNCTION, False, INTERPRETED)
        dx = dy * f
    first_column += half * columns
    if amax_ptr is not None:
        tl.store(amax_ptr + tl.program_id(0), tl.max(tl.max(tl.abs(dx), 1), 0))
    if dbias_ptr is not None:
        dbias_ptr += first_row // TILE * width + first_column
        tl.store(dbias_ptr + column, sum_along(dx, 0), mask=in_columns)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    _store(dx, rows_ptr, columns_ptr, row_scale_ptr, column_scale_ptr, scale,
           first_row, first_column, row, column, in_rows, in_columns, rows, width,
           BLOCKWISE, POWER_OF_TWO, LARGEST, WORDS)  # fmt: skip


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
    grid, amax, scale, options = _launch(activation, x, p, 1, scaling, dtype, y)
    options["maxnreg"] = MAX_REGISTERS_OF_FORWARD[options["BLOCKWISE"] and bias is None]
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
    grid, amax, scale, options = _launch(activation, x, p, 1 + activation.gated, scaling, dtype, dx)
    if x.numel():
        with device_of(x):
            backward_kernel[grid](
                dy.contiguous(), x, contiguous(bias), dx.rows_RC, dx.columns_CR, *_scales(dx, scaling), scale, amax,
                dbias, dp, *slots(activation, p), rows, columns, **options,
            )  # fmt: skip
    return amax


def _launch(activation, x, p, halves: int, scaling: Scaling | None, dtype, result: Quantized):
    """(grid, amax partials or None, scale or None, compile-time arguments); halves: programs to a tile."""
    blockwise = scaling is not None and not isinstance(scaling, PerTensor)
    rows, columns = x.shape[0], x.shape[1] // (1 + activation.gated)
    programs = _programs(rows, columns) * halves
    options = constants(activation, p) | {
        "BLOCKWISE": blockwise,
        "POWER_OF_TWO": blockwise and scaling.power_of_two,
        "LARGEST": torch.finfo(dtype).max,
        "WORDS": result.columns_CR is not None and rows % 4 == 0 and not triton.knobs.runtime.interpret,
        "COLUMN_BLOCKS": triton.cdiv(columns, BLOCK),
        "TILE": BLOCK,
        "INTERPRETED": triton.knobs.runtime.interpret,
        "num_warps": NUM_WARPS,
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
