"""Matrix product and activation in one kernel for Hopper: operands by TMA, wgmma, programs that stay.

A program per place on the GPU takes tile after tile, and while it works on a finished one the operands of the next are
already on their way. Tensor descriptors clip what a tile has beyond the matrix: reads are 0 there, writes are dropped.

Suffixes as in `linear`. Of a gated activation, gate and up half are matrices of their own (views of one), but for fc1's
weight: its halves' rows of a tile are one operand, and their products one accumulator, gate first. (Of two products in
a loop that is flattened, ptxas lets each instruction wait for the last one.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_xact.kernels.triton_gemm_parts import (
    activated,
    biased,
    differentiated,
    parts,
    place,
    rounded,
    store_bias_sums,
)
from megatron_xact.kernels.triton_launch import load_parameters, store_sums


@triton.jit
def forward_kernel(
    x, w, pre, pre_up, y, bias_ptr, p0, p1, p2, rows, columns, hidden,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """pre_MW = x_MH w^T and y_MF = act(pre + bias_W), columns = F; w: [halves, F, H]. pre, bias_ptr and pre_up may be
    None."""
    HALVES: tl.constexpr = 2 if GATED else 1
    EXACT: tl.constexpr = y.dtype != tl.bfloat16
    WIDTH: tl.constexpr = TILE_N // PARTS
    tl.assume(hidden > 0)  # or there would be a second loop for that
    p0, p1, p2 = load_parameters(p0, p1, p2, LEARNED)
    tiles = tl.cdiv(rows, TILE_M) * tl.cdiv(columns, TILE_N)
    finished = tl.program_id(0) - tl.num_programs(0)  # a counter of its own keeps the loads free to run ahead
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row_block, column_block = place(tile, rows, columns, TILE_M, TILE_N)
        row, column = row_block * TILE_M, column_block * TILE_N
        acc = tl.zeros((TILE_M, HALVES * TILE_N), tl.float32)
        for k in range(0, hidden, TILE_K):
            b = w.load([0, column, k]).reshape(HALVES * TILE_N, TILE_K)
            acc = tl.dot(x.load([row, k]), b.T, acc, input_precision="ieee")

        finished += tl.num_programs(0)
        row_block, column_block = place(finished, rows, columns, TILE_M, TILE_N)
        row, column = row_block * TILE_M, column_block * TILE_N
        pres = parts(acc, HALVES * PARTS)
        for i in tl.static_range(PARTS):
            first = column + i * WIDTH
            index = first + tl.arange(0, WIDTH)
            gate = rounded(pres[i], y.dtype, INTERPRETED)
            if pre is not None:
                pre.store([row, first], gate)
            gate = biased(gate, bias_ptr, index, columns)
            up = 0.0
            if GATED:
                up = rounded(pres[PARTS + i], y.dtype, INTERPRETED)
                pre_up.store([row, first], up)
                up = biased(up, None if bias_ptr is None else bias_ptr + columns, index, columns)
            out = activated(gate, up, p0, p1, p2, FUNCTION, GATED, EXACT, INTERPRETED)
            y.store([row, first], out.to(y.dtype))


@triton.jit
def backward_kernel(
    dout, w, pre, pre_up, dpre, dpre_up, y, bias_ptr, dbias_ptr, dp_ptr, p0, p1, p2, rows, columns, hidden,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dpre_MW = (dout_MH w_HF) act'(pre_MW + bias_W), y_MF again, columns = F; and partial sums in fp32:

    dp_ptr [learned parameters, tiles], dbias_ptr [row blocks, W]. y, the bias' pointers and the up's may be None.
    """
    EXACT: tl.constexpr = dpre.dtype != tl.bfloat16
    WIDTH: tl.constexpr = TILE_N // PARTS
    tl.assume(hidden > 0)  # or there would be a second loop for that
    p0, p1, p2 = load_parameters(p0, p1, p2, LEARNED)
    tiles = tl.cdiv(rows, TILE_M) * tl.cdiv(columns, TILE_N)
    finished = tl.program_id(0) - tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row_block, column_block = place(tile, rows, columns, TILE_M, TILE_N)
        row, column = row_block * TILE_M, column_block * TILE_N
        acc = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k in range(0, hidden, TILE_K):
            acc = tl.dot(dout.load([row, k]), w.load([k, column]), acc, input_precision="ieee")

        finished += tl.num_programs(0)
        row_block, column_block = place(finished, rows, columns, TILE_M, TILE_N)
        row, column = row_block * TILE_M, column_block * TILE_N
        dys = parts(acc, PARTS)
        sums0, sums1, sums2 = 0.0, 0.0, 0.0
        for i in tl.static_range(PARTS):
            first = column + i * WIDTH
            index = first + tl.arange(0, WIDTH)
            gate = biased(pre.load([row, first]), bias_ptr, index, columns)
            up = 0.0
            if GATED:
                up_bias = None if bias_ptr is None else bias_ptr + columns
                up = biased(pre_up.load([row, first]), up_bias, index, columns)
            out, dgate, dup, s0, s1, s2 = differentiated(
                dys[i], gate, up, p0, p1, p2, FUNCTION, GATED, LEARNED, EXACT, INTERPRETED
            )
            sums0, sums1, sums2 = sums0 + s0, sums1 + s1, sums2 + s2
            dpre.store([row, first], dgate.to(dpre.dtype))
            if y is not None:
                y.store([row, first], out.to(y.dtype))
            if GATED:
                dpre_up.store([row, first], dup.to(dpre.dtype))
            if dbias_ptr is not None:
                width = columns * (2 if GATED else 1)
                store_bias_sums(dbias_ptr, row_block, width, 0, index, columns, dgate)
                if GATED:
                    store_bias_sums(dbias_ptr, row_block, width, columns, index, columns, dup)
        # rows and columns beyond the matrix have dy = 0, so they add nothing
        store_sums(dp_ptr, finished, tiles, sums0, sums1, sums2, LEARNED)
