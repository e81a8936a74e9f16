"""How fast an activation is on this machine beside other ways to compute it: raw timings, and what they come to.

The peer that counts is the published formula, differentiated by autograd, eager or under torch.compile: what one has
without this package. The ceiling is a copy of as many bytes, measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.kernels.linear import BACKWARD, FORWARD
from megatron_xact.kernels.ops import apply_activation

Call = Callable[[Tensor, dict[str, Tensor]], Tensor]  # x, parameters -> y


@dataclass(frozen=True)
class Measurement:
    """One contender, one direction. `ideal_bytes`: every input read once, every result written once."""

    contender: str
    activation: str
    dtype: str
    rows: int
    columns: int
    direction: str
    ideal_bytes: int
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def bytes_per_second(self) -> float:
        return self.ideal_bytes / self.median

    def as_dict(self) -> dict:
        return asdict(self) | {"median": self.median, "bytes_per_second": self.bytes_per_second}


def ours(activation: Activation) -> Call:
    return lambda x, raw: apply_activation(activation, x, activation.effective(raw))


def ours_alone(activation: Activation) -> Call:
    """The operator without the handful of scalar operations that make effective values of raw ones."""
    fixed = {q.symbol: q.init for q in activation.parameters if not q.trainable}
    return lambda x, learned: apply_activation(activation, x, learned | fixed)


def published_formula(activation: Activation) -> Call:
    """As published: torch operations in x's dtype, derivatives by autograd, min(x, -1e-6) in xIELU's exponential."""
    if activation.name == "xielu":
        activation = activations.get("xielu", eps=-1e-6)

    def call(x: Tensor, raw: dict[str, Tensor]) -> Tensor:
        p = activation.effective(raw)
        gate, up = x.chunk(2, -1) if activation.gated else (x, None)
        y = activation.value(gate, p)
        return y if up is None else y * up

    return call


def contenders(activation: Activation) -> dict[str, Call]:
    formula = published_formula(activation)
    return {"eager": formula, "torch.compile": torch.compile(formula, dynamic=False), "xact": ours(activation)}


def measure(
    calls: dict[str, Call],
    activation: Activation,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    device: torch.device,
    repeats: int,
    parameters: dict[str, Tensor] | None = None,
) -> list[Measurement]:
    """Forward, and backward of the same graph: d x and d parameters for a dense d y; the contenders take turns.

    parameters: what the call is given and differentiated by; None: raw ones at their initial values, by name.
    """
    generator = torch.Generator(device).manual_seed(0)
    width = columns * (1 + activation.gated)
    x, dy = (torch.randn(rows, n, generator=generator, device=device).to(dtype) for n in (width, columns))
    x.requires_grad_()
    if parameters is None:
        initial = activation.initial_raw().items()
        parameters = {name: torch.tensor([v], device=device, requires_grad=True) for name, v in initial}
    inputs = [x, *parameters.values()]
    forward = clock_in_turns([partial(call, x, parameters) for call in calls.values()], device, repeats)
    graphs = [call(x, parameters) for call in calls.values()]
    backward = clock_in_turns(
        [partial(torch.autograd.grad, y, inputs, dy, retain_graph=True) for y in graphs], device, repeats
    )

    def result(contender: str, direction: str, elements: int, seconds: list[float]) -> Measurement:
        return Measurement(
            contender, activation.name, str(dtype).removeprefix("torch."), rows, columns, direction,
            elements * rows * dtype.itemsize, seconds,
        )  # fmt: skip

    return [
        measurement
        for contender, there, back in zip(calls, forward, backward, strict=True)
        for measurement in (
            result(contender, FORWARD, width + columns, there),
            result(contender, BACKWARD, 2 * width + columns, back),
        )
    ]


def copy_ceiling(num_bytes: int, device: torch.device, repeats: int) -> float:
    """Bytes per second, read plus written, of copying a tensor of this size: the median of `repeats`."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    (seconds,) = clock_in_turns([lambda: target.copy_(source)], device, repeats)
    return 2 * num_bytes / statistics.median(seconds)


def clock_in_turns(
    calls: Sequence[Callable[[], object]], device: torch.device, repeats: int, warmup: int = 3
) -> list[list[float]]:
    """Per call its seconds, `repeats` times, after some that do not count (compilation, caches).

    In turns, so that what else the machine does meets all alike. On a GPU by its own events, queued behind a pause long
    enough that launching never keeps the GPU waiting.
    """
    for _ in range(warmup):
        for call in calls:
            call()
    seconds: list[list[float]] = [[] for _ in calls]
    if device.type != "cuda":
        for _ in range(repeats):
            for call, found in zip(calls, seconds, strict=True):
                start = time.perf_counter()
                call()
                found.append(time.perf_counter() - start)
        return seconds
    with torch.cuda.device(device):  # whose streams events and the pause go to
        events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls] for _ in range(repeats)]
        torch.cuda.synchronize(device)
        torch.cuda._sleep(200_000_000)  # clock cycles: about 0.1 s
        for turn in events:
            for call, (start, end) in zip(calls, turn, strict=True):
                start.record()
                call()
                end.record()
        torch.cuda.synchronize(device)
    for turn in events:
        for found, (start, end) in zip(seconds, turn, strict=True):
            found.append(start.elapsed_time(end) / 1e3)
    return seconds


def compare(
    names: Sequence[str], dtypes: Sequence[torch.dtype], rows: int, columns: int, device: torch.device, repeats: int
) -> list[Measurement]:
    """Every contender for every activation and dtype."""
    found = []
    for name in names:
        activation = activations.get(name)
        for dtype in dtypes:
            torch.compiler.reset()  # after eight compilations of one function torch.compile would run it eagerly
            found += measure(contenders(activation), activation, dtype, rows, columns, device, repeats)
    return found


def speedups(measurements: Sequence[Measurement]) -> dict[tuple[str, str, str], float]:
    """(activation, dtype, peer) -> how many times as long the peer takes, forward + backward."""
    total: dict[tuple[str, str, str], float] = {}
    for m in measurements:
        key = (m.activation, m.dtype, m.contender)
        total[key] = total.get(key, 0.0) + m.median
    return {
        (name, dtype, contender): seconds / total[name, dtype, "xact"]
        for (name, dtype, contender), seconds in total.items()
        if contender != "xact"
    }
