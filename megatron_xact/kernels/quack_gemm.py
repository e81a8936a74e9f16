"""Matrix product and activation in one kernel through QuACK (CuTe-DSL), for Hopper.

The matrix product is QuACK's; what is ours is the epilogue, a Python function that QuACK calls for each element of a
tile while it compiles. It is made here from the device function of the activation, so no activation is named here.
On Hopper two groups of warps take turns: while one is in its epilogue, the other's matrix products run.

Sums leave a kernel as fp32 partial sums, one per tile and row (parameters) or column (bias), each in a place of its
own, and torch.sum adds them in a fixed order: no atomics, so two runs give the same bits. Learned parameters are read
from device memory. Kernels are compiled at the first call for a dtype, form and tile, not for a shape.

Of a gated activation, the gate and the up half of every matrix are views. Forward reads w1 as if its two halves were
interleaved (that is a stride, nothing is copied), so neighbouring columns of a tile are a gate and its up; backward
loads two tiles of the pre-activation and stores two of its gradient.

Suffixes as in `linear`.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels.device_functions import device_function
from megatron_xact.kernels.linear import BACKWARD, FORWARD, Backward, tile_named
from megatron_xact.kernels.quack_epilogues import Form, backward_epilogue, forward_epilogue
from megatron_xact.kernels.triton_launch import device_of, learned, no_product_reason, slots

DISTRIBUTION = "quack-kernels"
INSTALL = 'pip install -e ".[quack]"'
ALIGNMENT = 8  # elements of 16 bits


class Tile(NamedTuple):
    """What a thread block makes of the matrix product at once, [m, n]; pingpong: two tiles, of two groups of warps that
    take turns with the tensor cores."""

    m: int
    n: int
    pingpong: bool

    def __str__(self) -> str:
        return f"{self.m}x{self.n} {'ping-pong' if self.pingpong else 'cooperative'}"


# (direction, gated) -> candidates, the first of them the one to use where nothing has measured which is faster; of
# forward's tiles, gated, gate and up columns are counted. What each spills is in tests/kernels/test_quack.py.
TILES = {
    (FORWARD, False): (Tile(128, 160, True), Tile(128, 192, True), Tile(256, 128, False), Tile(128, 256, False)),
    (FORWARD, True): (Tile(128, 160, True), Tile(256, 128, False), Tile(128, 256, False)),
    (BACKWARD, False): (Tile(128, 160, True), Tile(128, 128, True), Tile(256, 128, False)),
    (BACKWARD, True): (Tile(128, 128, True), Tile(256, 128, False)),
}
CLUSTER_M = 2  # thread blocks of one cluster, above each other, share the other operand's columns


def unavailable_reason(activation: Activation, dtype: torch.dtype, device: torch.device) -> str | None:
    """As `linear.unavailable_reason`."""
    if reason := no_product_reason(activation, dtype, device):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"its tiles are Hopper's, of compute capability 9.0; this GPU has {major}.{minor}"
    return _import_error()


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {DISTRIBUTION} is not installed; {INSTALL}"
    try:
        import quack.epilogue.frontend  # noqa: F401
    except Exception as error:  # of CUDA's libraries too, which it loads
        return f"{DISTRIBUTION} does not import: {' '.join(str(error).split())[:200]}"
    return None


def candidates(direction: str, activation: Activation, *tensors: Tensor, bias: bool = False) -> tuple[Tile, ...]:
    """Tiles for operands and results like these, the default first."""
    return TILES[direction, activation.gated]


def forward(
    activation: Activation, x_MH: Tensor, w1_WH: Tensor, p: Values, bias_W: Tensor | None = None,
    tile: Tile | str | None = None, with_pre: bool = True,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(pre_MW, y_MF) of `linear.forward`; tile: None, or one of `candidates` or its name. Ungated, pre may be left
    out.

    ValueError for sizes that no multiple of 8 is.
    """
    rows, width = x_MH.shape[0], w1_WH.shape[0]
    form = _form(activation, p, bias_W, x_MH.dtype, by_output=not with_pre)
    _check_sizes(activation, x_MH.shape[1], width)
    pre_MW = x_MH.new_empty(rows, width) if with_pre else None
    y_MF = x_MH.new_empty(rows, width // len(form.halves))
    operands = _scalars(activation, p) | {"y": y_MF}
    if form.gated:
        operands["pre"], operands["pre_up"] = pre_MW.chunk(2, dim=1)
    if form.bias:
        operands["bias"] = bias_W.detach().float()[None]
    if not isinstance(tile, Tile):
        tile = tile_named(tile, candidates(FORWARD, activation))
    _run(forward_epilogue(form), tile, x_MH.contiguous(), w1_WH.contiguous(), None if form.gated else pre_MW, None,
         operands, concat_layout=("B", "bias")[: 1 + form.bias] if form.gated else ())  # fmt: skip
    return pre_MW, y_MF


def backward(
    activation: Activation, dout_MH: Tensor, w2_HF: Tensor, pre_MW: Tensor, p: Values, bias_W: Tensor | None = None,
    tile: Tile | str | None = None, emit_y: bool = True,
) -> Backward:  # fmt: skip
    """As `linear.backward`, from the pre-activation; tile as in forward. y only with emit_y.

    ValueError for sizes that no multiple of 8 is.
    """
    rows, width = pre_MW.shape
    form = _form(activation, p, bias_W, pre_MW.dtype, by_output=not emit_y)
    _check_sizes(activation, dout_MH.shape[1], width)
    dpre_MW, y_MF = pre_MW.new_empty(rows, width), pre_MW.new_empty(rows, w2_HF.shape[1]) if emit_y else None
    if not isinstance(tile, Tile):
        tile = tile_named(tile, candidates(BACKWARD, activation))
    row_tiles, column_tiles = -(-rows // tile.m), -(-w2_HF.shape[1] // tile.n)
    dp = pre_MW.new_empty((len(form.learned), rows, column_tiles), dtype=torch.float32)
    dbias = pre_MW.new_empty((row_tiles, width), dtype=torch.float32) if form.bias else None
    operands = _scalars(activation, p) | {f"dp{i}": dp[n] for n, i in enumerate(form.learned)}
    operands |= {"y": y_MF} if emit_y else {}
    matrices = {"c": pre_MW.contiguous(), "dpre": dpre_MW}
    if form.bias:
        matrices |= {"bias": bias_W.detach().float()[None], "dbias": dbias}
    for name, matrix in matrices.items():
        for half, columns in zip(form.halves, matrix.chunk(len(form.halves), dim=1), strict=True):
            operands[name + half] = columns
    _run(backward_epilogue(form), tile, dout_MH.contiguous(), w2_HF.contiguous(), operands.pop("dpre"),
         operands.pop("c"), operands, b_kn=True)  # fmt: skip
    # torch.sum has a fixed order for a given shape
    parameters = dict(zip(learned(activation, p), dp.flatten(1).sum(1), strict=True))
    return Backward(dpre_MW, y_MF, parameters, dbias.sum(0) if form.bias else None)


def _run(epilogue, tile: Tile, a: Tensor, b: Tensor, d: Tensor | None, c: Tensor | None, operands: dict, **layout):
    """Compiles what is not yet, and launches. b: [columns, inner], or [inner, columns] with b_kn."""
    if not a.shape[0]:
        return
    with device_of(a):
        epilogue.gemm(
            a.detach(), b.detach(), d, c, epi_args=operands, tile_M=tile.m, tile_N=tile.n, pingpong=tile.pingpong,
            cluster_M=CLUSTER_M, cluster_N=1, **layout,
        )  # fmt: skip


def _form(activation: Activation, p: Values, bias: Tensor | None, dtype: torch.dtype, *, by_output: bool) -> Form:
    symbols = learned(activation, p)
    indices = tuple(i for i, q in enumerate(activation.parameters) if q.symbol in symbols)
    function = device_function(activation).__name__
    return Form(function, len(activation.parameters), indices, activation.gated, bias is not None, dtype, by_output)


def _scalars(activation: Activation, p: Values) -> dict[str, Tensor | float]:
    return {f"p{i}": value for i, value in enumerate(slots(activation, p)[: len(activation.parameters)])}


def _check_sizes(activation: Activation, hidden: int, width: int) -> None:
    """Rows of every matrix start at multiples of 16 bytes, halves of gated ones too."""
    for name, size in (("hidden size", hidden), ("ffn size on this rank", width // (1 + activation.gated))):
        if size % ALIGNMENT:
            raise ValueError(f"{activation.name}: QuACK's matrix products need a {name} that is a multiple of "
                             f"{ALIGNMENT}, not {size}; use another mlp backend")  # fmt: skip
