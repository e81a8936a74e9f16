"""How fast an MLP is with the activation inside its matrix products: every candidate tile, and the whole of it.

One run says what to ship: the product alone, the activation alone and every tile of every backend; then the MLP forward
and backward by each backend with its fastest tiles, beside its six products alone and what others offer.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.kernels import linear, mlp_timing
from megatron_xact.kernels.backends import backend_of
from megatron_xact.kernels.benchmark import published_formula
from megatron_xact.kernels.linear import BACKWARD, FORWARD
from megatron_xact.kernels.mlp_timing import Operands, Shape
from tools.gpu import timing
from tools.gpu.context import Context, Entries
from tools.gpu.mlp import WIDTHS, available, name_of, paper_shape, tiles

NAMES, WITH_TILES = ("xielu", "relu2", "xsilu_glu2", "swiglu"), ("xielu", "swiglu")
TENSOR_PARALLEL = (1, 2, 4)
# At hidden 2048, ffn 12288, of cuBLAS's time for the same products, on an H200
TARGETS = {FORWARD: 1.06, BACKWARD: 1.10}
OF_GEMMS = 1.03  # forward + backward of the MLP
OF_UNFUSED = 1.02  # of the way that is chosen: never slower, but for what two measurements differ by


def speed(context: Context, data: Entries) -> str:
    """Every tile of two activations, and MLPs of all; targets for xielu at the first shape."""
    absent, backends = available(context)
    data |= {"absent": absent, "kernels": [], "mlp": [], "chosen": {}}
    for name in context.mine(NAMES):
        record = activations.get(name)
        for shape in _shapes(context, record.gated):
            judged = (name, shape) == ("xielu", paper_shape(context, False, 1)) and not context.quick
            o = mlp_timing.operands(record, shape, context.device)
            for direction in linear.DIRECTIONS if name in WITH_TILES else ():
                seconds = _tiles(context, data, o, shape, direction, backends)
                if judged:
                    _judge(data, f"{direction} beside its GEMM", seconds, "GEMM alone", TARGETS[direction])
            seconds = _whole(context, data, o, shape, backends)
            if judged:
                _judge(data, "MLP beside its GEMMs", seconds, mlp_timing.GEMMS, OF_GEMMS)
    data.all_at_most("chosen way's time beside unfused", OF_UNFUSED, data["chosen"])
    return f"{len(data['kernels'])} tables of tiles, {len(data['mlp'])} MLPs, of {', '.join(backends)}"


def _shapes(context: Context, gated: bool) -> list[Shape]:
    found = [paper_shape(context, gated, tp, width) for width in range(len(WIDTHS[gated])) for tp in TENSOR_PARALLEL]
    return list(dict.fromkeys(found))


def _judge(data: Entries, what: str, seconds: dict[str, list[float]], floor: str, bound: float) -> None:
    """The fastest of what is fused, as a target, which is missed if none of it ran."""
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    fused = {label: median for label, median in medians.items() if label.split()[0] in linear.BACKENDS}
    best = min(fused, key=fused.__getitem__, default="nothing fused ran")
    data.target(f"{what}, {best}", fused.get(best, math.nan) / medians[floor], at_most=bound)


def _tiles(context: Context, data: Entries, o: Operands, shape: Shape, direction: str, backends: list[str]) -> dict:
    """fc1 or fc2's data gradient: the product alone, the activation kernel alone, and every tile of every backend."""
    with torch.no_grad():
        calls = _kernels(o, direction, backends)
        seconds = timing.in_turns(context, calls, _repeats(context), data)
    floor = statistics.median(seconds["GEMM alone"])
    print(f"{o.activation.name} {direction} {shape.tokens} x {shape.hidden} x {shape.ffn}", flush=True)
    for label, times in seconds.items():
        median = statistics.median(times)
        print(f"    {label:56}{median * 1e3:9.3f} ms {median / floor:7.3f}", flush=True)
    data["kernels"].append(_entry(o.activation, shape, seconds) | {"direction": direction})
    data.save()
    return seconds


def _kernels(o: Operands, direction: str, backends: list[str]) -> dict[str, Callable]:
    record, (x, w1, w2, dout) = o.activation, (o.x_MH, o.w1_WH, o.w2_HF, o.dout_MH)
    there = linear.forward(linear.UNFUSED, record, x, w1, o.p, with_pre=True)
    pre, y, kernel = there.pre_MW, there.y_MF, backend_of(record, there.pre_MW)
    if direction == FORWARD:
        calls = {"GEMM alone": lambda: x @ w1.T, "activation alone": lambda: kernel.forward(record, pre, o.p)}
        call, args, tensors = linear.forward, (record, x, w1, o.p), (x, w1, y)
    else:
        calls = {
            "GEMM alone": lambda: dout @ w2,
            "activation alone": lambda: kernel.backward(record, pre, o.p, y, emit_y=True),
        }
        call, args, tensors = linear.backward, (record, dout, w2, there.saved, o.p), (dout, w2, there.saved)
    for backend in backends:
        for tile in tiles(backend, direction, record, *tensors, bias=False):
            calls[name_of(backend, tile)] = partial(call, backend, *args, tile=tile)
    return calls


def _whole(context: Context, data: Entries, o: Operands, shape: Shape, backends: list[str]) -> dict[str, list[float]]:
    """MLP forward + backward by every backend, beside its six products alone and what others offer."""
    record = o.activation
    with torch.no_grad():
        _, y, pre = linear.forward(linear.UNFUSED, record, o.x_MH, o.w1_WH, o.p, with_pre=True)
    calls = {mlp_timing.GEMMS: lambda: mlp_timing.gemms(o, pre, y), linear.UNFUSED: lambda: mlp_timing.unfused(o)}
    where = f"{record.name} {shape.hidden} x {shape.ffn}"
    with data.trying(f"{where}, the choice"):
        known = mlp_timing.measure(record, shape, context.device, backends[1:])  # by which a run would choose
    data["absent"] |= {f"{where} {label}": why for label, why in known.failed.items()}
    for backend, timed in known.tiles.items():
        way = mlp_timing.fastest(backend, timed)
        calls[backend] = partial(mlp_timing.fused, way, o)
        print(f"    {way}", flush=True)
    if context.on_gpu:
        torch.compiler.reset()  # after eight compilations of one function torch.compile would run it eagerly
        compiled = torch.compile(published_formula(record), dynamic=False)
        calls[mlp_timing.COMPILED] = lambda: mlp_timing.published(compiled, o)
        calls |= _transformer_engine(context, record, shape, data["absent"])
    seconds = timing.in_turns(context, calls, _repeats(context), data)
    chosen = min(known.seconds, key=known.seconds.__getitem__)
    if chosen in seconds:
        unfused = statistics.median(seconds[linear.UNFUSED])
        data["chosen"][f"{where}: {chosen}"] = statistics.median(seconds[chosen]) / unfused
    floor = statistics.median(seconds[mlp_timing.GEMMS])
    print(f"MLP {record.name} {shape.tokens} x {shape.hidden} x {shape.ffn}: " + ", ".join(
        f"{label} {statistics.median(times) * 1e3:.3f} ms ({statistics.median(times) / floor:.3f})"
        for label, times in seconds.items()
    ), flush=True)  # fmt: skip
    data["mlp"].append(_entry(record, shape, seconds))
    data.save()
    return seconds


def _entry(record: Activation, shape: Shape, seconds: dict[str, list[float]]) -> dict:
    sizes = {"tokens": shape.tokens, "hidden": shape.hidden, "ffn": shape.ffn}
    return {"activation": record.name} | sizes | {"seconds": seconds}


def _repeats(context: Context) -> int:
    return 3 if context.quick else 30


def _transformer_engine(context: Context, record: Activation, shape: Shape, absent: dict) -> dict[str, Callable]:
    """TransformerEngine's own MLP of the same sizes, where it is installed and has the activation."""
    op = {"relu2": "SReLU", "swiglu": "SwiGLU"}.get(record.name)
    if op is None:
        return {}
    try:
        te = importlib.import_module("transformer_engine.pytorch")
        options = {"bias": False, "device": context.device, "dtype": shape.dtype}
        width = shape.ffn * (1 + record.gated)
        layers = te.ops.Sequential(
            te.ops.Linear(shape.hidden, width, **options), getattr(te.ops, op)(),
            te.ops.Linear(shape.ffn, shape.hidden, **options),
        )  # fmt: skip
    except (ImportError, AttributeError, OSError) as error:
        absent[f"TransformerEngine {op}"] = timing.reason(error)
        return {}
    x = context.randn(shape.tokens, shape.hidden, dtype=shape.dtype).requires_grad_()
    dout = context.randn(shape.tokens, shape.hidden, seed=1, dtype=shape.dtype)
    inputs = [x, *layers.parameters()]
    return {f"TE {op}": lambda: torch.autograd.grad(layers(x), inputs, dout)}
