"""An MLP forward and backward on one device, once per way to run it: what the choice between them measures.

Every way computes the same, fc1 -> activation -> fc2 and all gradients: with torch's matrix products and the activation
kernel between them, with one of the fused backends of `kernels.linear`, or, for comparison, as published, eager or
under torch.compile. The floor is the six matrix products alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.kernels import linear
from megatron_xact.kernels.benchmark import clock_in_turns, ours_alone, published_formula
from megatron_xact.kernels.ops import apply_activation, learned_of

GEMMS, EAGER, COMPILED = "GEMMs alone", "eager", "torch.compile"
# Largest relative difference, in norm, between a fused backend's results and the unfused ones at the operands below,
# where a wrong kernel differs by its whole result. One rounding of a tensor is 2^-9 in bf16; TF32 has fp16's fraction.
AGREEMENT = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ROUNDS, REPEATS = 3, 5
Tiles = dict[str, dict[str, float | None]]  # direction -> tile -> seconds of that kernel alone; None: it does not work


class Measured(NamedTuple):
    """seconds: forward + backward of "unfused" and each fused backend that works, with the tiles that are its fastest;
    tiles: of each of those backends; failed: a backend, or a backend's tile -> why it is left out."""

    seconds: dict[str, float]
    tiles: dict[str, Tiles]
    failed: dict[str, str]


@dataclass(frozen=True)
class Shape:
    """One rank's MLP. ffn: width of y; fc1 has twice as many rows where the activation is gated."""

    tokens: int
    hidden: int
    ffn: int
    dtype: torch.dtype
    bias: bool = False

    def flops(self, activation: Activation) -> int:
        """Of the matrix products, forward and backward."""
        return 6 * self.tokens * self.hidden * self.ffn * (2 + activation.gated)


@dataclass(frozen=True)
class Operands:
    """Random, seeded, and the same on every rank. p: effective values by symbol; raw: raw ones by name."""

    activation: Activation
    x_MH: Tensor
    w1_WH: Tensor
    w2_HF: Tensor
    bias_W: Tensor | None
    dout_MH: Tensor
    p: dict[str, Tensor | float]
    raw: dict[str, Tensor]

    @property
    def learned(self) -> list[Tensor]:
        return learned_of(self.activation, self.p)


def operands(activation: Activation, shape: Shape, device: torch.device) -> Operands:
    """fc2's weights are positive and dout is the MLP's own output, scaled: no gradient is a difference of likes."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float) -> Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=torch.float32) * scale
        return values.to(shape.dtype)

    width = shape.ffn * (1 + activation.gated)
    raw = {n: torch.tensor([v], device=device, requires_grad=True) for n, v in activation.initial_raw().items()}
    p = activation.effective({name: value.detach() for name, value in raw.items()})
    o = Operands(
        activation,
        x_MH=normal(shape.tokens, shape.hidden, scale=1.0).requires_grad_(),
        w1_WH=normal(width, shape.hidden, scale=1.5 / shape.hidden**0.5).requires_grad_(),
        w2_HF=normal(shape.hidden, shape.ffn, scale=1.0 / shape.ffn**0.5).abs().requires_grad_(),
        bias_W=normal(width, scale=0.2).requires_grad_() if shape.bias else None,
        dout_MH=torch.empty(0),
        p={symbol: v.requires_grad_() if isinstance(v, Tensor) else v for symbol, v in p.items()},
        raw=raw,
    )
    with torch.no_grad():
        out_MH = _output(ours_alone(activation), o, o.p).float()
        scale = out_MH.square().mean().sqrt() * shape.tokens**0.5  # no sum over tokens leaves fp16's range
        return replace(o, dout_MH=(out_MH / scale).to(shape.dtype))


def _output(call: Callable, o: Operands, parameters: dict) -> Tensor:
    return F.linear(call(F.linear(o.x_MH, o.w1_WH, o.bias_W), parameters), o.w2_HF)


def unfused(o: Operands) -> list[Tensor]:
    """[out, dx, dw1, dw2, (dbias), d parameters], as Megatron's linears and the activation operator make them."""
    y_MF = apply_activation(o.activation, F.linear(o.x_MH, o.w1_WH), o.p, bias=o.bias_W)
    return _differentiated(F.linear(y_MF, o.w2_HF), o, o.learned)


def published(call: Callable, o: Operands) -> list[Tensor]:
    """The same, of the published formula, which takes raw parameters."""
    return _differentiated(_output(call, o, o.raw), o, list(o.raw.values()))


def _differentiated(out_MH: Tensor, o: Operands, parameters: list[Tensor]) -> list[Tensor]:
    biases = [] if o.bias_W is None else [o.bias_W]
    inputs = [o.x_MH, o.w1_WH, o.w2_HF, *biases, *parameters]
    return [out_MH, *torch.autograd.grad(out_MH, inputs, o.dout_MH)]


@torch.no_grad()
def fused(way: linear.Way, o: Operands) -> list[Tensor]:
    """The same, by `kernels.linear`, in the order in which a layer calls it."""
    saved, y_MF, _ = linear.forward(way.backend, o.activation, o.x_MH, o.w1_WH, o.p, o.bias_W, tile=way.forward)
    out_MH = y_MF @ o.w2_HF.T
    del y_MF  # as in training, where it is not kept unless it is what is saved
    back = linear.backward(way.backend, o.activation, o.dout_MH, o.w2_HF, saved, o.p, o.bias_W, tile=way.backward)
    dw2_HF = o.dout_MH.T @ back.y_MF
    biases = [] if o.bias_W is None else [back.bias]
    parameters = [value.reshape(1) for value in learned_of(o.activation, back.parameters)]
    return [out_MH, back.dpre_MW @ o.w1_WH, back.dpre_MW.T @ o.x_MH, dw2_HF, *biases, *parameters]


@torch.no_grad()
def gemms(o: Operands, pre_MW: Tensor, y_MF: Tensor) -> None:
    """The six matrix products of the MLP; what lies between them is not computed."""
    torch.matmul(o.x_MH, o.w1_WH.T)
    torch.matmul(y_MF, o.w2_HF.T)
    torch.matmul(o.dout_MH, o.w2_HF)
    torch.matmul(o.dout_MH.T, y_MF)
    torch.matmul(pre_MW, o.w1_WH)
    torch.matmul(pre_MW.T, o.x_MH)


def disagreement(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error, in norm, of any result; nan if one is."""
    errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(found, truth, strict=True)]
    return torch.stack(errors).max().item()  # max hands on a nan


def seconds(calls: dict[str, Callable[[], object]], device: torch.device, repeats: int = REPEATS) -> dict[str, float]:
    """Median per call, in rounds that take turns: a GPU that slows down as it warms up slows all of them alike."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, times in zip(calls, clock_in_turns(list(calls.values()), device, repeats, warmup=2), strict=True):
            found[name] += times
    return {name: statistics.median(times) for name, times in found.items()}


def tiles_of(backend: str, direction: str, activation: Activation, shape: Shape, device: torch.device) -> list[str]:
    """As `linear.tiles`, for operands of this shape, which this needs no memory for."""
    width = shape.ffn * (1 + activation.gated)
    x, w1, y, pre, w2 = (
        torch.empty(1, 1, dtype=shape.dtype, device=device).expand(rows, columns)
        for rows, columns in (
            (shape.tokens, shape.hidden), (width, shape.hidden), (shape.tokens, shape.ffn), (shape.tokens, width),
            (shape.hidden, shape.ffn),
        )
    )  # fmt: skip
    tensors = (x, w1, y) if direction == linear.FORWARD else (x, w2, pre)
    return linear.tiles(backend, direction, activation, *tensors, bias=shape.bias)


@torch.no_grad()
def tuned(backend: str, o: Operands, shape: Shape, repeats: int = REPEATS) -> tuple[Tiles, dict[str, str]]:
    """(what each of the backend's tiles takes, "backend direction tile" -> why one does not work)."""

    def forward(backend: str, tile: str | None = None) -> list[Tensor]:
        return [*linear.forward(backend, o.activation, o.x_MH, o.w1_WH, o.p, o.bias_W, tile=tile)[:2]]

    saved = forward(linear.UNFUSED)[0]

    def backward(backend: str, tile: str | None = None) -> list[Tensor]:
        back = linear.backward(backend, o.activation, o.dout_MH, o.w2_HF, saved, o.p, o.bias_W, tile=tile)
        return [back.dpre_MW, back.y_MF, *back.parameters.values(), *([] if back.bias is None else [back.bias])]

    found: Tiles = {}
    failed = {}
    for direction, kernel in ((linear.FORWARD, forward), (linear.BACKWARD, backward)):
        names = tiles_of(backend, direction, o.activation, shape, o.x_MH.device)
        calls, truth = {}, kernel(linear.UNFUSED)
        for tile in names:
            call = partial(kernel, backend, tile)
            if why := _fault(call, truth, shape.dtype):
                failed[f"{backend} {direction} {tile}"] = why
            else:
                calls[tile] = call
        times = seconds(calls, o.x_MH.device, repeats)
        found[direction] = {tile: times.get(tile) for tile in names}
    return found, failed


def fastest(backend: str, tiles: Tiles) -> linear.Way | None:
    """The backend with its fastest tiles; None: in one direction there is none that works."""
    working = [{tile: s for tile, s in tiles[direction].items() if s is not None} for direction in linear.DIRECTIONS]
    return linear.Way(backend, *(min(found, key=found.__getitem__) for found in working)) if all(working) else None


def _fault(call: Callable[[], list[Tensor]], truth: list[Tensor], dtype: torch.dtype) -> str | None:
    """Why this must not be used, or None."""
    try:
        error = disagreement(call(), truth)
    except Exception as problem:  # a compiler's, mostly: none of them may end a training run
        return f"failed: {' '.join(str(problem).split())[:200] or type(problem).__name__}"
    return None if error <= AGREEMENT[dtype] else f"its results differ from the unfused ones by {error:.1e}"


def measure(
    activation: Activation, shape: Shape, device: torch.device, candidates: Sequence[str], repeats: int = REPEATS
) -> Measured:
    """First the tiles of each candidate (a fused backend), its two kernels alone; then "unfused" and each candidate.

    What is measured runs at this shape and agrees with the unfused results there. Leaves nothing on the device.
    """
    try:
        with torch.enable_grad():  # the forward of a recomputed layer runs without
            return _measured(activation, shape, device, candidates, repeats)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(activation, shape, device, candidates, repeats) -> Measured:
    o = operands(activation, shape, device)
    calls: dict[str, Callable[[], object]] = {linear.UNFUSED: lambda: unfused(o)}
    tiles, failed, truth = {}, {}, unfused(o)
    for backend in candidates:
        found, left_out = tuned(backend, o, shape, repeats)
        way = fastest(backend, found)
        if way is None:
            failed[backend] = "none of its tiles works, {}: {}".format(*next(iter(left_out.items())))
            continue
        failed |= left_out
        if why := _fault(partial(fused, way, o), truth, shape.dtype):
            failed[backend] = why
            continue
        calls[backend], tiles[backend] = partial(fused, way, o), found
    del truth
    return Measured(seconds(calls, device, repeats), tiles, failed)


def peers(activation: Activation, shape: Shape, device: torch.device, repeats: int = REPEATS) -> dict[str, float]:
    """Seconds forward + backward of what one has without this package, and of the floor: the GEMMs alone."""
    torch.compiler.reset()  # after eight compilations of one function torch.compile would run it eagerly
    o = operands(activation, shape, device)
    formula = published_formula(activation)
    compiled = torch.compile(formula, dynamic=False)
    with torch.no_grad():
        pre_MW = o.x_MH @ o.w1_WH.T
        y_MF = ours_alone(activation)(pre_MW, o.p)
    calls = {
        GEMMS: lambda: gemms(o, pre_MW, y_MF),
        EAGER: lambda: published(formula, o),
        COMPILED: lambda: published(compiled, o),
    }
    return seconds(calls, device, repeats)
