"""Sparsity and outliers of every MLP's pre- and post-activations, over one whole microbatch of the unsharded model.

Instead of keeping activations, forward hooks reduce them to a few sums on the device while the chosen microbatch runs,
and are gone before its backward pass, so recomputed activations are not seen twice and other steps cost nothing. The
hooks only read: a run has the same bits with and without them.

The pre-activation is what the activation function gets: fc1's output with its bias; of a gated one, the gate half. A
unit is a column of the post-activation (an input of fc2).

What FP8 costs is measured in every run, also in bf16: the post-activation, the operand with the largest outliers, is
cast to e4m3 under one power-of-two scale by the amax of the whole layer (current scaling), whatever the run does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels import fp8
from megatron_xact.kernels.operators import key_in_graph
from megatron_xact.kernels.ops import learned_of

Statistics = dict[int, dict[str, float]]  # layer (from 1) -> name in STATISTICS -> value; nan where undefined

NEAR_ZERO = 2.0**-9
"""A post-activation is near zero up to this share of its layer's RMS. 2^-9 is bf16's rounding error: such a value adds
less to fc2's sum than is lost by rounding a typical value of that layer, so a kernel that skips it loses nothing."""

BLOCK = 2**22
"""Elements that are looked at together; bounds the memory of a measurement to some 150 MB at any model size."""


@dataclass(frozen=True)
class Statistic:
    label: str
    fraction: bool = False  # of all elements or units; otherwise a magnitude


STATISTICS = {
    "preact_negative": Statistic("pre-activations < 0", fraction=True),
    "preact_negative_slope": Statistic("pre-activations where f' < 0", fraction=True),
    "preact_rms": Statistic("RMS of pre-activations"),
    "preact_max": Statistic("largest |pre-activation|"),
    "postact_zero": Statistic("post-activations exactly 0", fraction=True),
    "postact_near_zero": Statistic(f"|post-activation| ≤ RMS/{1 / NEAR_ZERO:.0f}", fraction=True),
    "postact_dead": Statistic(f"units ≤ RMS/{1 / NEAR_ZERO:.0f} at every token", fraction=True),
    "postact_rms": Statistic("RMS of post-activations"),
    "postact_max": Statistic("largest |post-activation|"),
    "postact_max_over_rms": Statistic("largest |post-activation| / RMS"),
    "postact_kurtosis": Statistic("kurtosis E y⁴ / (E y²)²"),
    "postact_fp8_error": Statistic("RMS error of post-activations in e4m3", fraction=True),
    "postact_fp8_flushed": Statistic("post-activations ≠ 0 that e4m3 makes 0", fraction=True),
}


class ActivationModule(Protocol):
    """What is measured: `layers.activation.TrainableActivation`, called with (x) or (x, bias)."""

    activation: Activation

    def raw(self) -> dict[str, torch.nn.Parameter]: ...
    def register_forward_hook(self, hook): ...


@dataclass(frozen=True)
class _Partial:
    """One layer, fp64, on its device. `counts` is of this rank's part of it, the others of the unsharded layer."""

    whole: Tensor  # [x < 0, f'(x) < 0, x^2, y == 0, y^2, y^4, number of elements], sums
    largest: Tensor  # [|x|, |y|], maxima
    counts: Tensor  # [|y| near zero, dead units, units, (q - y)^2, q == 0 != y], sums; q: y in FP8


class Probe:
    """Measures the layers it watches, once each, and hands the numbers over with `take`.

    whole: the ranks that share a microbatch's layer, tensor- times context-parallel. tokens: those among them with the
    same units and other tokens, context-parallel.
    """

    def __init__(self, whole: ProcessGroup, tokens: ProcessGroup):
        self._whole = whole
        self._tokens = tokens
        self._partials: dict[int, _Partial] = {}

    @contextlib.contextmanager
    def watching(self, layers: Mapping[int, ActivationModule]) -> Iterator[None]:
        """Layers by number whose next forward pass is measured; not those measured since the last `take`.

        Every rank of `whole` runs the same layers meanwhile: each is three small all-reduces between them.
        """
        hooks = [
            module.register_forward_hook(partial(self._measure, number), with_kwargs=True)
            for number, module in layers.items()
            if number not in self._partials
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self) -> Statistics:
        """Statistics of the measured layers of this pipeline stage, on every rank of `whole`, whose collective it is.

        The only moment when the host waits for the device, once for all layers.
        """
        numbers, partials = sorted(self._partials), self._partials
        self._partials = {}
        if not numbers:
            return {}
        whole = torch.stack([partials[n].whole for n in numbers])
        counts = _reduced(torch.stack([partials[n].counts for n in numbers]), ReduceOp.SUM, self._whole)
        largest = torch.stack([partials[n].largest for n in numbers])
        negative, negative_slope, x2, zero, y2, y4, elements = whole.unbind(1)
        near_zero, dead, units, error2, flushed = counts.unbind(1)
        max_x, max_y = largest.unbind(1)
        rms = (y2 / elements).sqrt()
        columns = {
            "preact_negative": negative / elements,
            "preact_negative_slope": negative_slope / elements,
            "preact_rms": (x2 / elements).sqrt(),
            "preact_max": max_x,
            "postact_zero": zero / elements,
            "postact_near_zero": near_zero / elements,
            "postact_dead": dead / units,
            "postact_rms": rms,
            "postact_max": max_y,
            "postact_max_over_rms": max_y / rms,
            "postact_kurtosis": y4 * elements / y2.square(),
            "postact_fp8_error": (error2 / y2).sqrt(),
            "postact_fp8_flushed": flushed / (elements - zero),
        }
        assert columns.keys() == STATISTICS.keys()
        rows = torch.stack([columns[name] for name in STATISTICS], dim=1).tolist()
        return {number: dict(zip(STATISTICS, row, strict=True)) for number, row in zip(numbers, rows, strict=True)}

    @torch.no_grad()
    def _measure(self, number: int, module: ActivationModule, args: tuple, kwargs: dict, y: Tensor) -> None:
        if y.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # inside a CUDA graph this would run at every replay
        p = module.activation.effective(module.raw())
        self._partials[number] = self._partial(module.activation, p, y, *args, **kwargs)

    def _partial(self, activation: Activation, p: Values, y: Tensor, x: Tensor, bias: Tensor | None = None) -> _Partial:
        """y: [..., F/tp]; x: [..., F/tp] (gated: [gate, up]) and bias, x's last dimension, are the module's inputs."""
        width = y.shape[-1]  # of a gated x, the gate half comes first
        x, y = x.reshape(-1, x.shape[-1])[:, :width], y.reshape(-1, width)
        wide = torch.promote_types(x.dtype, torch.float32)  # in which the activation itself computes

        def preactivations(x: Tensor) -> Tensor:
            return x.to(wide) if bias is None else x.to(wide) + bias[:width]

        # Adding a bias keeps a unit's order: its largest and smallest x stay so.
        max_x = torch.stack([preactivations(extreme).abs().amax() for extreme in torch.aminmax(x, dim=0)]).amax()
        peaks = torch.stack(torch.aminmax(y, dim=0)).double().abs().amax(0)  # of each unit over the tokens
        rows = max(1, BLOCK // width)
        blocks = zip(x.split(rows), y.split(rows), strict=True)
        sums = [_sums(activation, p, preactivations(x_rows), y_rows.double()) for x_rows, y_rows in blocks]
        negative, negative_slope, x2, nonzero, y2, y4 = torch.stack(sums).sum(0)
        elements = peaks.new_full((), y.numel())
        terms = [negative, negative_slope, x2, elements - nonzero, y2, y4, elements]
        whole = _reduced(torch.stack(terms), ReduceOp.SUM, self._whole)
        largest = _reduced(torch.stack([max_x.double(), peaks.amax()]), ReduceOp.MAX, self._whole)
        threshold = NEAR_ZERO * (whole[4] / whole[6]).sqrt()
        dead = (_reduced(peaks, ReduceOp.MAX, self._tokens) <= threshold).sum().double()
        scaling = fp8.PerTensor(fp8.factor(largest[1:], torch.float8_e4m3fn, power_of_two=True))
        rounding = [_rounding(y_rows, scaling, threshold) for y_rows in y.split(rows)]
        near_zero, error2, kept = torch.stack(rounding).sum(0)
        counts = torch.stack([near_zero, dead, dead.new_full((), width), error2, nonzero - kept])
        return _Partial(whole, largest, counts)


def _sums(activation: Activation, p: Values, z: Tensor, y: Tensor) -> Tensor:
    """Of a block, [6] fp64: counts z < 0, f'(z) < 0, sum of z^2, count y != 0, sums of y^2 and of y^4. y: fp64."""
    gate_up = torch.cat([z, torch.ones_like(z)], dim=1) if activation.gated else z
    slope = torch.ops.xact.activation_backward(
        torch.ones_like(z), gate_up, learned_of(activation, p), None, None, key_in_graph(activation)
    )[0][:, : z.shape[1]]  # with up = 1, the gate's gradient is its slope; on a GPU one kernel
    y2 = y.square()
    sums = [value.sum(dtype=torch.float64) for value in (z < 0, slope < 0, z.double().square(), y2, y2.square())]
    return torch.stack([*sums[:3], _nonzero(y), *sums[3:]])


def _rounding(y: Tensor, scaling: fp8.PerTensor, threshold: Tensor) -> Tensor:
    """Of a block, [3] fp64: count of |y| <= threshold, sum of (q - y)^2 and count of q != 0; q: y in FP8."""
    q = fp8.quantize(y, scaling, torch.float8_e4m3fn, columns=False)
    exact, rounded = y.double(), q.rows_RC.double() * q.row_scale_inv
    near_zero = (exact.abs() <= threshold).sum(dtype=torch.float64)
    return torch.stack([near_zero, (rounded - exact).square().sum(), _nonzero(rounded)])


def _nonzero(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value, 0)  # counts in one kernel, in value's dtype


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """For JSON, which has no nan: None where a value is undefined, e.g. the kurtosis of zeros."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _reduced(tensor: Tensor, op: ReduceOp, group: ProcessGroup) -> Tensor:
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, op=op, group=group)
    return tensor
