"""Which tile of the elementwise kernels is the fastest, each direction: what `triton_pointwise.TILES` should say."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from torch import Tensor

from megatron_xact import activations
from megatron_xact.kernels import triton_pointwise
from megatron_xact.kernels.triton_pointwise import BACKWARD, FORWARD, Tile
from tools.gpu import timing
from tools.gpu.context import Context, Entries

ELEMENTS, WARPS = (1024, 2048, 4096, 8192), (4, 8)
REPEATS = 20


def tiles(context: Context, data: Entries) -> str:
    """bf16 at M = 16384, F = 12288, the tiles taking turns; seconds of each, and how much the best would save."""
    tokens, columns = (64, 768) if context.quick else (16384, 12288)
    names = ("xielu", "swiglu") if context.quick else ("xielu", "xiprelu", "relu2", "swiglu", "xsilu_glu2")
    data["absent"], data["seconds"], data["shipped"] = {}, {}, {}
    told = []
    for name in names:
        for direction in (FORWARD, BACKWARD):
            key = direction, activations.get(name).gated
            shipped = data["shipped"][f"{name} {direction}"] = _label(triton_pointwise.TILES[key])
            calls = _calls(context, name, direction, key, tokens, columns)
            found = timing.in_turns(context, calls, REPEATS, data)
            data["seconds"][f"{name} {direction}"] = found
            medians = {label: statistics.median(times) for label, times in found.items()}
            best = min(medians, key=medians.__getitem__)
            saved = 1 - medians[best] / medians.get(shipped, float("inf"))
            told.append(f"{name} {direction} {best} ({saved:.1%} less than {shipped})")
            line = "  ".join(f"{label} {median * 1e6:.0f}us" for label, median in medians.items())
            print(f"{name:12}{direction:10}{line}", flush=True)
            data.save()
    return "fastest: " + ", ".join(told)


def _label(tile: Tile) -> str:
    return f"{tile.elements}/{tile.warps}"


def _calls(context: Context, name: str, direction: str, key: tuple, tokens: int, columns: int) -> dict[str, Callable]:
    """Label -> a rotation of calls with that tile, on operands of their own which no cache can hold."""
    record = activations.get(name)
    p, backend = context.parameters(record), context.backend
    drawn = timing.operands(context, record, tokens, columns, 2 * tokens * columns * (2 + record.gated))

    def call(tile: Tile, x: Tensor, dy: Tensor):
        shipped = triton_pointwise.TILES[key]
        triton_pointwise.TILES[key] = tile
        try:
            return backend.forward(record, x, p) if direction == FORWARD else backend.backward(record, x, p, dy)
        finally:
            triton_pointwise.TILES[key] = shipped

    return {
        _label(tile): timing.Rotation([partial(call, tile, x, dy) for x, dy in drawn])
        for tile in (Tile(elements, warps) for elements in ELEMENTS for warps in WARPS)
    }
