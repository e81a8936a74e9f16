"""What the matrix-product kernels of `triton_gemm` share: the order of tiles, and what is done with a finished one.

An accumulator is taken apart by columns, so that few of its elements are ever spread over all the quantities of an
activation: a whole tile of 128 x 256 would not fit the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_xact.kernels.triton_launch import evaluated, sum_along

# row blocks whose tiles follow each other, so that they share the other operand's columns in the L2 cache
GROUP = tl.constexpr(8)


@triton.jit
def place(tile, rows, columns, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """(row block, column block) of the tile of this number."""
    row_blocks, column_blocks = tl.cdiv(rows, TILE_M), tl.cdiv(columns, TILE_N)
    in_group = GROUP * column_blocks
    first = tile // in_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    return first + tile % in_group % size, tile % in_group // size


@triton.jit
def halves(tile):
    """Left and right half of the columns; both stay in the registers they are in."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def parts(tile, PARTS: tl.constexpr):
    """The columns in 2, 4 or 8 equal parts, left to right."""
    if PARTS == 2:
        return halves(tile)
    elif PARTS == 4:
        left, right = halves(tile)
        return halves(left) + halves(right)
    else:
        tl.static_assert(PARTS == 8)
        left, right = halves(tile)
        a, b = halves(left)
        c, d = halves(right)
        return halves(a) + halves(b) + halves(c) + halves(d)


@triton.jit
def rounded(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to DTYPE, two values per instruction.

    The compiler would round a value that is used both packed and alone by an instruction of its own, as slow as exp
    (machine code of Triton 3.6 and 3.9). Triton's interpreter has no inline assembly.
    """
    if INTERPRETED or DTYPE == tl.float32:
        return value.to(DTYPE)
    elif DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [value], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        tl.static_assert(DTYPE == tl.float16)
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [value], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def biased(pre, bias_ptr, column, columns):
    """pre + bias[column] in fp32; bias_ptr may be None."""
    z = pre.to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def activated(
    gate, up, p0, p1, p2,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, EXACT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y of pre-activations in fp32; ungated, `up` is not looked at."""
    y, _, _, _, _ = evaluated(gate, p0, p1, p2, FUNCTION, EXACT, INTERPRETED)
    if GATED:
        y *= up
    return y


@triton.jit
def differentiated(
    dy, gate, up, p0, p1, p2,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr, EXACT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(y, dgate, dup, sums over columns of the gradients of three parameters), fp32; 0 what does not exist."""
    # Never true, and no instruction of the result. But now everything is a function of dy, which is where the matrix
    # product left it; else the compiler loads `gate` a second time as y is to be stored, and computes all of f twice.
    gate = tl.where(dy < float("-inf"), dy, gate)
    f, slope, d0, d1, d2 = evaluated(gate, p0, p1, p2, FUNCTION, EXACT, INTERPRETED)
    y, df, dup = f, dy, 0.0
    if GATED:
        y, df, dup = f * up, dy * up, dy * f
    s0, s1, s2 = 0.0, 0.0, 0.0
    if LEARNED & 1:
        s0 = sum_along(df * d0, 1)
    if LEARNED & 2:
        s1 = sum_along(df * d1, 1)
    if LEARNED & 4:
        s2 = sum_along(df * d2, 1)
    return y, df * slope, dup, s0, s1, s2


@triton.jit
def store_bias_sums(dbias_ptr, row_block, width, first, column, columns, dpre):
    """A part's sums over its rows, to dbias_ptr [row blocks, width] from column `first` on."""
    place = row_block.to(tl.int64) * width + first + column
    tl.store(dbias_ptr + place, sum_along(dpre, 0), mask=column < columns)
