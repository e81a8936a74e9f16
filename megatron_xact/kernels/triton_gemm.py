"""The fused backend "triton" of `linear`: which kernel, which tile, and the launch.

On Hopper the kernels of `triton_gemm_hopper`, where TMA can address the matrices (rows of a multiple of 16 bytes);
else those of `triton_gemm_pointer`. Triton's interpreter, which runs on CPU tensors, takes either.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels import triton_gemm_hopper as hopper
from megatron_xact.kernels import triton_gemm_pointer as pointer
from megatron_xact.kernels.linear import BACKWARD, FORWARD, Backward, tile_named
from megatron_xact.kernels.triton_launch import (
    constants,
    contiguous,
    device_of,
    learned,
    no_product_reason,
    slots,
    unserved_reason,
)

REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Tile:
    """A program's share of y, [m, n], over k at a time; the activation is computed on n / parts columns at a time."""

    m: int
    n: int
    k: int
    parts: int
    warps: int
    stages: int
    tma: bool = True
    per_multiprocessor: int = 1  # programs that fit side by side: one computes activations while another multiplies

    def __str__(self) -> str:
        way = f"TMA x{self.per_multiprocessor}" if self.tma else "pointers"
        return f"{self.m}x{self.n}x{self.k}/{self.parts} {self.warps} warps {self.stages} stages {way}"


# (direction, gated) -> candidates, the first of them the one to use where nothing has measured which is faster. All
# compile without spills (with a bias: `with_sums_of_bias`), and within the shared memory.
HOPPER = {
    (FORWARD, False): (
        Tile(128, 128, 64, 2, 4, 3, per_multiprocessor=2),
        Tile(128, 128, 64, 4, 8, 3, per_multiprocessor=2),
        Tile(128, 256, 64, 2, 8, 3),
        Tile(128, 256, 64, 4, 8, 3),
        Tile(256, 128, 64, 2, 8, 3),
    ),
    (FORWARD, True): (
        Tile(128, 128, 64, 2, 8, 3),
        Tile(128, 64, 64, 2, 4, 3, per_multiprocessor=2),
    ),
    # Every part of pre is waited for on its own: side by side, one program multiplies while the other waits.
    (BACKWARD, False): (
        Tile(128, 128, 64, 8, 8, 3, per_multiprocessor=2),
        Tile(128, 128, 64, 2, 8, 4),
        Tile(128, 256, 64, 8, 8, 3),
    ),
    (BACKWARD, True): (
        Tile(128, 128, 64, 8, 8, 3, per_multiprocessor=2),
        Tile(128, 128, 64, 4, 8, 4),
        Tile(128, 256, 64, 8, 8, 3),
    ),
}
AMPERE = {
    (FORWARD, False): (Tile(128, 128, 32, 2, 8, 4, tma=False), Tile(128, 256, 32, 4, 8, 3, tma=False)),
    (FORWARD, True): (Tile(128, 64, 32, 2, 8, 4, tma=False),),
    (BACKWARD, False): (Tile(128, 128, 32, 4, 8, 4, tma=False),),
    (BACKWARD, True): (Tile(128, 128, 32, 4, 8, 4, tma=False),),
}


def unavailable_reason(activation: Activation, dtype: torch.dtype, device: torch.device) -> str | None:
    """As `linear.unavailable_reason`."""
    if triton.knobs.runtime.interpret:
        return unserved_reason(activation, dtype)
    if reason := no_product_reason(activation, dtype, device):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    return None if major < 10 else f"no kernel was compiled for compute capability {major}.{minor}, newer than Hopper"


def candidates(direction: str, activation: Activation, *tensors: Tensor, bias: bool = False) -> tuple[Tile, ...]:
    """Tiles for operands and results like these, the default first."""
    table = HOPPER if _is_hopper(tensors[0].device) and all(map(_tma_can_address, tensors)) else AMPERE
    tiles = table[direction, activation.gated]
    return with_sums_of_bias(tiles) if bias and direction == BACKWARD else tiles


def with_sums_of_bias(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """Those whose programs have registers left for the sums of a bias' gradient."""
    return tuple(tile for tile in tiles if tile.n < 256 and tile.per_multiprocessor == 1)


def forward(
    activation: Activation, x_MH: Tensor, w1_WH: Tensor, p: Values, bias_W: Tensor | None = None,
    tile: Tile | str | None = None, with_pre: bool = True,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(pre_MW, y_MF) of `linear.forward`; tile: None, or one of `candidates` or its name. Ungated, pre may be left
    out."""
    x, w = x_MH.contiguous(), w1_WH.contiguous()
    rows, columns = x.shape[0], w.shape[0] // (1 + activation.gated)
    pre, y = x.new_empty(rows, w.shape[0]) if with_pre else None, x.new_empty(rows, columns)
    if not isinstance(tile, Tile):
        tile = tile_named(tile, candidates(FORWARD, activation, x, w, y))
    if not y.numel():
        return pre, y
    sizes = rows, columns, x.shape[1]
    values, grid, options = slots(activation, p), _grid(tile, rows, columns, x.device), _options(activation, p, tile)
    with device_of(x):
        if tile.tma:
            halves, hidden, part = w.shape[0] // columns, x.shape[1], (tile.m, tile.n // tile.parts)
            weight = TensorDescriptor(
                w, [halves, columns, hidden], [columns * hidden, hidden, 1], [halves, tile.n, tile.k]
            )
            hopper.forward_kernel[grid](
                _described(x, (tile.m, tile.k)), weight, *_halves(activation, pre, part), _described(y, part),
                contiguous(bias_W), *values, *sizes, **options,
            )  # fmt: skip
        else:
            pointer.forward_kernel[grid](x, w, pre, y, contiguous(bias_W), *values, *sizes, **options)
    return pre, y


def backward(
    activation: Activation, dout_MH: Tensor, w2_HF: Tensor, pre_MW: Tensor, p: Values, bias_W: Tensor | None = None,
    tile: Tile | str | None = None, emit_y: bool = True,
) -> Backward:  # fmt: skip
    """As `linear.backward`, from the pre-activation; tile as in forward. y only with emit_y."""
    dout, w, pre = dout_MH.contiguous(), w2_HF.contiguous(), pre_MW.contiguous()
    rows, columns = dout.shape[0], w.shape[1]
    dpre, y = torch.empty_like(pre), pre.new_empty(rows, columns) if emit_y else None
    if not isinstance(tile, Tile):
        tile = tile_named(tile, candidates(BACKWARD, activation, dout, w, pre, bias=bias_W is not None))
    symbols = learned(activation, p)
    row_blocks = triton.cdiv(rows, tile.m)
    dp = dout.new_empty(len(symbols), row_blocks * triton.cdiv(columns, tile.n), dtype=torch.float32)
    dbias = dout.new_empty(row_blocks, pre.shape[1], dtype=torch.float32) if bias_W is not None else None
    if dpre.numel():
        sizes = rows, columns, dout.shape[1]
        sums = contiguous(bias_W), dbias, dp, *slots(activation, p)
        grid, options = _grid(tile, rows, columns, dout.device), _options(activation, p, tile)
        with device_of(dout):
            if tile.tma:
                part = tile.m, tile.n // tile.parts
                hopper.backward_kernel[grid](
                    _described(dout, (tile.m, tile.k)), _described(w, (tile.k, tile.n)),
                    *_halves(activation, pre, part), *_halves(activation, dpre, part), _described(y, part),
                    *sums, *sizes, **options,
                )  # fmt: skip
            else:
                pointer.backward_kernel[grid](dout, w, pre, dpre, y, *sums, *sizes, **options)
    # torch.sum has a fixed order for a given shape, and a tile's sums do not depend on which program made it
    parameters = dict(zip(symbols, dp.sum(1), strict=True))
    return Backward(dpre, y, parameters, None if dbias is None else dbias.sum(0))


def _options(activation: Activation, p: Values, tile: Tile) -> dict:
    """Compile-time arguments and options."""
    # left alone, some activations' kernels take a few registers more than leave room for a second program
    share = REGISTERS // (32 * tile.warps * tile.per_multiprocessor)
    return constants(activation, p) | {
        **({"maxnreg": share} if share < 255 else {}),
        "TILE_M": tile.m,
        "TILE_N": tile.n,
        "TILE_K": tile.k,
        "PARTS": tile.parts,
        "INTERPRETED": triton.knobs.runtime.interpret,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _grid(tile: Tile, rows: int, columns: int, device: torch.device) -> tuple[int]:
    """A program per tile; with TMA as many as stay on the GPU at once, each of which makes several.

    Among several GPUs, four times as many: a collective holds multiprocessors for longer than a tile takes, and the
    share of a program that waits for one of those would come after it. Shorter shares go to the others meanwhile.
    """
    tiles = triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n)
    rounds = 4 if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else 1
    return (min(tiles, rounds * _multiprocessors(device) * tile.per_multiprocessor) if tile.tma else tiles,)


def _described(matrix: Tensor | None, block: tuple[int, int]) -> TensorDescriptor | None:
    if matrix is None:
        return None
    rows, columns = matrix.shape
    pitch = matrix.stride(0) if rows > 1 else columns  # of a single row torch may say any stride, TMA wants 16 bytes
    return TensorDescriptor(matrix, [rows, columns], [pitch, 1], list(block))


def _halves(activation: Activation, matrix: Tensor | None, block: tuple[int, int]):
    """Descriptors of the gate and the up columns, which end where the others begin; ungated: of all, and None."""
    if not activation.gated:
        return _described(matrix, block), None
    return tuple(_described(half, block) for half in matrix.chunk(2, 1))


def _tma_can_address(matrix: Tensor) -> bool:
    return matrix.data_ptr() % 16 == 0 and matrix.shape[-1] * matrix.itemsize % 16 == 0 and matrix.numel() > 0


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
