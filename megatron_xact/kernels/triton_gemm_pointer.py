"""Matrix product and activation in one kernel, by plain loads: for Ampere, and for sizes that TMA cannot address.

A program makes one tile. Everything may be ragged; loads are of 16 bytes where the sizes are multiples of that.
Suffixes as in `linear`; a tile of a gated y is made from two accumulators, one of the gate and one of the up half.
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
    x_ptr, w_ptr, pre_ptr, y_ptr, bias_ptr, p0, p1, p2, rows, columns, hidden,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """pre_MW = x_MH w_WH^T and y_MF = act(pre + bias_W), columns = F. pre_ptr (ungated) and bias_ptr may be None."""
    EXACT: tl.constexpr = y_ptr.dtype.element_ty != tl.bfloat16
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    WIDTH: tl.constexpr = TILE_N // PARTS
    p0, p1, p2 = load_parameters(p0, p1, p2, LEARNED)
    row_block, column_block = place(tl.program_id(0), rows, columns, TILE_M, TILE_N)
    row = row_block.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)[:, None]
    column = column_block.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)[None, :]
    up_half = tl.cast(columns, tl.int64) * hidden  # columns is a plain number where it is 1
    gate_acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    up_acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in range(0, hidden, TILE_K):
        inner = k + tl.arange(0, TILE_K)
        a = tl.load(x_ptr + row * hidden + inner[None, :], mask=(row < rows) & (inner < hidden)[None, :], other=0.0)
        b_ptr = w_ptr + column * hidden + inner[:, None]
        b_mask = (column < columns) & (inner < hidden)[:, None]
        gate_acc = tl.dot(a, tl.load(b_ptr, mask=b_mask, other=0.0), gate_acc, input_precision="ieee")
        if GATED:
            b = tl.load(b_ptr + up_half, mask=b_mask, other=0.0)
            up_acc = tl.dot(a, b, up_acc, input_precision="ieee")

    width = columns * (2 if GATED else 1)
    gates, ups = parts(gate_acc, PARTS), parts(up_acc, PARTS)
    for i in tl.static_range(PARTS):
        index = column_block.to(tl.int64) * TILE_N + i * WIDTH + tl.arange(0, WIDTH)
        mask = (row < rows) & (index < columns)[None, :]
        offset = row * width + index[None, :]
        gate = rounded(gates[i], DTYPE, INTERPRETED)
        if pre_ptr is not None:
            tl.store(pre_ptr + offset, gate, mask=mask)
        gate = biased(gate, bias_ptr, index, columns)
        up = 0.0
        if GATED:
            up = rounded(ups[i], DTYPE, INTERPRETED)
            tl.store(pre_ptr + offset + columns, up, mask=mask)
            up = biased(up, None if bias_ptr is None else bias_ptr + columns, index, columns)
        out = activated(gate, up, p0, p1, p2, FUNCTION, GATED, EXACT, INTERPRETED)
        tl.store(y_ptr + row * columns + index[None, :], out.to(DTYPE), mask=mask)


@triton.jit
def backward_kernel(
    dout_ptr, w_ptr, pre_ptr, dpre_ptr, y_ptr, bias_ptr, dbias_ptr, dp_ptr, p0, p1, p2, rows, columns, hidden,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dpre_MW = (dout_MH w_HF) act'(pre_MW + bias_W), y_MF again, columns = F; and partial sums in fp32:

    dp_ptr [learned parameters, tiles], dbias_ptr [row blocks, W]. y_ptr and the bias' pointers may be None.
    """
    DTYPE: tl.constexpr = dpre_ptr.dtype.element_ty
    EXACT: tl.constexpr = DTYPE != tl.bfloat16
    WIDTH: tl.constexpr = TILE_N // PARTS
    p0, p1, p2 = load_parameters(p0, p1, p2, LEARNED)
    row_block, column_block = place(tl.program_id(0), rows, columns, TILE_M, TILE_N)
    row = row_block.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)[:, None]
    column = column_block.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)[None, :]
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in range(0, hidden, TILE_K):
        inner = k + tl.arange(0, TILE_K)
        a = tl.load(dout_ptr + row * hidden + inner[None, :], mask=(row < rows) & (inner < hidden)[None, :], other=0.0)
        b_mask = (column < columns) & (inner < hidden)[:, None]
        b = tl.load(w_ptr + inner[:, None].to(tl.int64) * columns + column, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")

    width = columns * (2 if GATED else 1)
    dys = parts(acc, PARTS)
    sums0, sums1, sums2 = 0.0, 0.0, 0.0
    for i in tl.static_range(PARTS):
        index = column_block.to(tl.int64) * TILE_N + i * WIDTH + tl.arange(0, WIDTH)
        mask = (row < rows) & (index < columns)[None, :]
        offset = row * width + index[None, :]
        gate = biased(tl.load(pre_ptr + offset, mask=mask, other=0.0), bias_ptr, index, columns)
        up = 0.0
        if GATED:
            up = tl.load(pre_ptr + offset + columns, mask=mask, other=0.0)
            up = biased(up, None if bias_ptr is None else bias_ptr + columns, index, columns)
        out, dgate, dup, s0, s1, s2 = differentiated(
            dys[i], gate, up, p0, p1, p2, FUNCTION, GATED, LEARNED, EXACT, INTERPRETED
        )
        sums0, sums1, sums2 = sums0 + s0, sums1 + s1, sums2 + s2
        tl.store(dpre_ptr + offset, dgate.to(DTYPE), mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + row * columns + index[None, :], out.to(DTYPE), mask=mask)
        if GATED:
            tl.store(dpre_ptr + offset + columns, dup.to(DTYPE), mask=mask)
        if dbias_ptr is not None:
            store_bias_sums(dbias_ptr, row_block, width, 0, index, columns, dgate)
            if GATED:
                store_bias_sums(dbias_ptr, row_block, width, columns, index, columns, dup)
    # rows and columns beyond the matrix have dy = 0, so they add nothing
    store_sums(dp_ptr, tl.program_id(0), tl.num_programs(0), sums0, sums1, sums2, LEARNED)
