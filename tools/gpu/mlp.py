"""The activation inside the matrix products: right, the same twice, in less memory, and how fast, tile by tile.

What is compared is in `kernels.linear`, and the whole MLPs are those of `kernels.mlp_timing`, so that what is measured
here is what chooses between them. Every candidate tile of every backend is listed: one run says what to ship.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels import linear, mlp_timing, reference
from megatron_xact.kernels.backends import backend_of
from megatron_xact.kernels.benchmark import clock, published_formula
from megatron_xact.kernels.linear import Way
from megatron_xact.kernels.mlp_timing import Shape
from tools.gpu.context import Context, Failure

FORWARD, BACKWARD = "forward", "backward"
TOKENS, TENSOR_PARALLEL = 16384, (1, 2, 4)
WIDTHS = {False: ((2048, 12288), (1536, 9216)), True: ((2048, 8192), (1536, 6144))}  # by gated: the paper's 3B and 1.1B
# At hidden 2048, ffn 12288, of cuBLAS's time for the same products, on an H200
TARGETS = {FORWARD: 1.06, BACKWARD: 1.10, "MLP": 1.03}
MEMORY_TARGET = 0.5  # of what the activation keeps for backward when it is a kernel of its own
MODERATE, RAGGED, ODD = (2048, 1024, 3072), (517, 328, 1016), (517, 333, 1001)  # tokens, hidden, ffn


def mlp(context: Context, data: dict) -> str:
    """Correctness, determinism, memory and speed of every backend that can run here."""
    data["absent"] = {}
    backends = [linear.UNFUSED]
    for backend in linear.BACKENDS:
        reason = linear.unavailable_reason(backend, activations.get("xielu"), torch.bfloat16, context.device)
        if reason:
            data["absent"][backend] = reason
        else:
            backends.append(backend)
    told = [_correctness(context, data, backends), _memory(context, data, backends)]
    told += [_tiles(context, data, backends), _whole(context, data, backends)]
    missed = [phrase for phrases in told for phrase in phrases if phrase.startswith("missed: ")]
    if missed:
        raise Failure("; ".join(phrase.removeprefix("missed: ") for phrase in missed))
    return "; ".join(phrase for phrases in told for phrase in phrases)


# --- is it right ---
def _ways(backend: str, direction: str, activation: Activation, *tensors: Tensor) -> Iterator[tuple[str, Callable]]:
    """(label, call) for every candidate tile; the call is as `forward` or `backward` of a backend's module."""
    if backend == linear.UNFUSED:
        yield backend, _unfused_forward if direction == FORWARD else _unfused_backward
        return
    module = importlib.import_module(f"megatron_xact.kernels.{backend}_gemm")
    for tile in module.candidates(direction, activation, *tensors):
        yield f"{backend} {tile}", lambda *args, tile=tile: getattr(module, direction)(*args, tile=tile)


def _unfused_forward(record: Activation, x: Tensor, w1: Tensor, p: Values, bias: Tensor | None):
    found = linear.forward(linear.UNFUSED, record, x, w1, p, bias, with_pre=True)
    return found.pre_MW, found.y_MF


def _unfused_backward(record: Activation, dout: Tensor, w2: Tensor, pre: Tensor, p: Values, bias: Tensor | None):
    by_output = linear.saves_output(record, pre.dtype)
    saved = backend_of(record, pre).forward(record, pre, p, bias) if by_output else pre
    return linear.backward(linear.UNFUSED, record, dout, w2, saved, p, bias)


def _correctness(context: Context, data: dict, backends: list[str]) -> list[str]:
    """Every result of every tile beside fp64: worst error over its bound; and two runs with the same bits."""
    data["worst_over_bound"] = worst = {}
    data["unserved"] = unserved = {}
    for name in ("xielu", "relu2", "xielu_neg_xsilu", "swiglu", "xsilu_glu2"):
        for sizes in ((40, 24, 32),) if context.quick else (MODERATE, RAGGED, ODD):
            for bias in (True, False):
                o = mlp_timing.operands(activations.get(name), Shape(*sizes, torch.bfloat16, bias), context.device)
                for backend in backends:
                    try:
                        found = dict(_errors(o, backend))
                    except ValueError as refusal:  # e.g. rows that are no multiple of 16 bytes
                        unserved[f"{backend} {name} {sizes}"] = str(refusal)
                        continue
                    except Exception as problem:  # a compiler's, mostly
                        print(f"{backend} {name} {sizes}: {type(problem).__name__}: {problem}"[:300], flush=True)
                        found = {f"{backend} cannot run": torch.inf}
                    for label, ratio in found.items():
                        key = f"{name} {sizes} {'bias ' if bias else ''}{label}"
                        worst[key] = ratio
                        if not ratio <= 1:
                            print(f"over the bound: {key}: {ratio:.2f} x", flush=True)
    over = [f"{label}: {ratio:.2f} x" for label, ratio in worst.items() if not ratio <= 1]
    if over:
        return [f"missed: {len(over)} over the bound or not the same twice, e.g. " + ", ".join(over[:4])]
    return [f"{len(worst)} results within the bound"]


@torch.no_grad()
def _errors(o: mlp_timing.Operands, backend: str) -> Iterator[tuple[str, float]]:
    """(what, largest error over its bound); inf where two runs differ."""
    record, (x, w1, w2, dout) = o.activation, (o.x_MH, o.w1_WH, o.w2_HF, o.dout_MH)
    p64 = {s: v.double() if isinstance(v, Tensor) else v for s, v in o.p.items()}
    bias64 = None if o.bias_W is None else o.bias_W.double()
    true_pre = x.double() @ w1.double().T
    for label, call in _ways(backend, FORWARD, record, x, w1, x.new_empty(x.shape[0], w2.shape[1])):
        pre, y = call(record, x, w1, o.p, o.bias_W)
        yield f"pre {label}", _over_bound(pre, true_pre)
        yield f"y {label}", _over_bound(y, reference.forward(record, pre.double(), p64, bias64))
        again = call(record, x, w1, o.p, o.bias_W)
        yield f"twice forward {label}", 0.0 if torch.equal(again[0], pre) and torch.equal(again[1], y) else torch.inf
    # backward of one pre-activation for all, through the rounded dy where it goes through memory
    pre = true_pre.to(x.dtype)
    dy = dout.double() @ w2.double()
    true = reference.backward(record, pre.double(), p64, dy, bias64, emit_y=True)
    loose = 2.0**-8 if backend == linear.UNFUSED else 1e-5
    for label, call in _ways(backend, BACKWARD, record, dout, w2, pre, true.y.to(x.dtype)):
        back, again = (call(record, dout, w2, pre, o.p, o.bias_W) for _ in range(2))
        results = {"dpre": (back.dpre_MW, true.dx), "y again": (back.y_MF, true.y)}
        if bias64 is not None:
            results["bias"] = back.bias, true.bias
        for what, (ours, exact) in results.items():
            yield f"{what} {label}", _over_bound(ours, exact, loose)
        for symbol, value in back.parameters.items():
            terms = dy.abs().sum() * 1e-5 + true.parameters[symbol].abs() * loose
            yield f"d {symbol} {label}", ((value.double() - true.parameters[symbol]).abs() / terms).item()
        pairs = [(back.dpre_MW, again.dpre_MW), (back.y_MF, again.y_MF)]
        pairs += [(back.parameters[s], again.parameters[s]) for s in back.parameters]
        pairs += [(back.bias, again.bias)] if o.bias_W is not None else []
        yield f"twice backward {label}", 0.0 if all(torch.equal(a, b) for a, b in pairs) else torch.inf
    biases = [] if bias64 is None else ["dbias"]
    names = ["out", "dx", "dw1", "dw2", *biases, *(f"d {q.symbol}" for q in record.trainable)]
    results = mlp_timing.fused(Way(backend), o)
    for what, ours, true_value in zip(names, results, _exact_mlp(o, p64, bias64), strict=True):
        error = (ours.double() - true_value.reshape(ours.shape)).norm() / true_value.norm()
        yield f"MLP {what} {backend}", (error / mlp_timing.AGREEMENT[torch.bfloat16]).item()


def _exact_mlp(o: mlp_timing.Operands, p64, bias64) -> list[Tensor]:
    """[out, dx, dw1, dw2, (dbias), d parameters] in fp64."""
    x, w1, w2, dout = (t.double() for t in (o.x_MH, o.w1_WH, o.w2_HF, o.dout_MH))
    pre = x @ w1.T
    back = reference.backward(o.activation, pre, p64, dout @ w2, bias64, emit_y=True)
    sums = [back.parameters[q.symbol] for q in o.activation.trainable]
    biases = [] if bias64 is None else [back.bias]
    return [back.y @ w2.T, back.dx @ w1, back.dx.T @ x, dout.T @ back.y, *biases, *sums]


def _over_bound(ours: Tensor, true: Tensor, loose: float = 1e-5) -> float:
    """Largest error over (2 roundings to its own dtype + `loose` of the largest value)."""
    rounding = (true.to(ours.dtype).double() - true).abs()
    return ((ours.double() - true).abs() / (2 * rounding + loose * true.abs().max() + 1e-30)).max().item()


# --- memory ---
def _memory(context: Context, data: dict, backends: list[str]) -> list[str]:
    """What waits for backward besides x and fc2's output, and the peak, bytes."""
    if context.device.type != "cuda":
        return []
    o = mlp_timing.operands(activations.get("xielu"), _shape(context, False, 1), context.device)
    data["memory"] = found = {}
    for backend in backends:
        mlp_timing.fused(Way(backend), o)  # compiles
        torch.cuda.synchronize(context.device)
        before = torch.cuda.memory_allocated(context.device)
        with torch.no_grad():
            saved, y, _ = linear.forward(backend, o.activation, o.x_MH, o.w1_WH, o.p, o.bias_W)
        kept = [saved, y] if backend == linear.UNFUSED else [saved]
        del saved, y, _
        held = torch.cuda.memory_allocated(context.device) - before
        del kept
        torch.cuda.reset_peak_memory_stats(context.device)
        (mlp_timing.unfused if backend == linear.UNFUSED else lambda o, b=backend: mlp_timing.fused(Way(b), o))(o)
        peak = torch.cuda.max_memory_allocated(context.device) - before
        found[backend] = {"held": held, "peak": peak}
        print(f"{backend:10} held {held / 2**20:8.1f} MiB, peak {peak / 2**20:8.1f} MiB", flush=True)
    shares = {b: found[b]["held"] / found[linear.UNFUSED]["held"] for b in backends if b != linear.UNFUSED}
    return [f"{'missed: ' if s > MEMORY_TARGET + 0.01 else ''}{b} holds {s:.2f} of unfused" for b, s in shares.items()]


# --- speed ---
def _shape(context: Context, gated: bool, tp: int, width: int = 0) -> Shape:
    hidden, ffn = (32, 64) if context.quick else WIDTHS[gated][width]
    return Shape(64 if context.quick else TOKENS, hidden, ffn // tp, torch.bfloat16)


def _shapes(context: Context, gated: bool) -> list[Shape]:
    found = [_shape(context, gated, tp, width) for width in range(len(WIDTHS[gated])) for tp in TENSOR_PARALLEL]
    return list(dict.fromkeys(found))


def _rounds(calls: dict[str, Callable], context: Context) -> dict[str, list[float]]:
    """Raw seconds, in rounds that take turns, so that a GPU that grows warm slows all alike."""
    found: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(1 if context.quick else 3):
        for label in list(found):
            try:
                found[label] += clock(calls[label], context.device, 3 if context.quick else 10)
            except Exception as problem:  # a tile that cannot run must not take the others' numbers with it
                print(f"    {label} cannot run: {type(problem).__name__}: {problem}"[:300], flush=True)
                del found[label]
    return found


def _tiles(context: Context, data: dict, backends: list[str]) -> list[str]:
    """fc1 and fc2's data gradient: the product alone, the activation kernel alone, and every tile of every backend."""
    data["kernels"] = found = []
    told = []
    for name in ("xielu", "swiglu"):
        record = activations.get(name)
        for shape in _shapes(context, record.gated):
            o = mlp_timing.operands(record, shape, context.device)
            for direction in (FORWARD, BACKWARD):
                with torch.no_grad():
                    calls = _kernels(o, direction, backends)
                    seconds = _rounds(calls, context)
                medians = {label: statistics.median(times) for label, times in seconds.items()}
                floor = medians["GEMM alone"]
                print(f"{name} {direction} {shape.tokens} x {shape.hidden} x {shape.ffn}", flush=True)
                for label, median in medians.items():
                    print(f"    {label:56}{median * 1e3:9.3f} ms {median / floor:7.3f}", flush=True)
                found.append({"activation": name, "direction": direction, "tokens": shape.tokens,
                              "hidden": shape.hidden, "ffn": shape.ffn, "seconds": seconds})  # fmt: skip
                fused = {k: v for k, v in medians.items() if k.split()[0] in linear.BACKENDS}
                if fused and (name, shape) == ("xielu", _shape(context, False, 1)) and not context.quick:
                    best = min(fused, key=fused.__getitem__)
                    ratio = fused[best] / floor
                    says = f"{direction} {ratio:.3f} x its GEMM by {best}, target {TARGETS[direction]}"
                    told.append(says if ratio <= TARGETS[direction] else f"missed: {says}")
    return told


def _kernels(o: mlp_timing.Operands, direction: str, backends: list[str]) -> dict[str, Callable]:
    record, (x, w1, w2, dout) = o.activation, (o.x_MH, o.w1_WH, o.w2_HF, o.dout_MH)
    pre, y, _ = linear.forward(linear.UNFUSED, record, x, w1, o.p, o.bias_W)
    kernel = backend_of(record, pre)
    if direction == FORWARD:
        args, tensors = (record, x, w1, o.p, o.bias_W), (x, w1, y)
        alone = {"GEMM alone": lambda: x @ w1.T, "activation alone": lambda: kernel.forward(record, pre, o.p)}
    else:
        args, tensors = (record, dout, w2, pre, o.p, o.bias_W), (dout, w2, pre, y)
        alone = {
            "GEMM alone": lambda: dout @ w2,
            "activation alone": lambda: kernel.backward(record, pre, o.p, y, emit_y=True),
        }
    ways = {label: call for b in backends for label, call in _ways(b, direction, record, *tensors)}
    return alone | {label: lambda call=call: call(*args) for label, call in ways.items()}


def _whole(context: Context, data: dict, backends: list[str]) -> list[str]:
    """MLP forward + backward beside its six products alone."""
    data["mlp"] = found = []
    told = []
    for name in ("xielu", "relu2", "xsilu_glu2", "swiglu"):
        record = activations.get(name)
        formula = published_formula(record)
        for shape in _shapes(context, record.gated):
            o = mlp_timing.operands(record, shape, context.device)
            pre, y, _ = linear.forward(linear.UNFUSED, record, o.x_MH, o.w1_WH, o.p, o.bias_W)
            pre, y = pre.detach(), y.detach()
            calls = {mlp_timing.GEMMS: lambda o=o, pre=pre, y=y: mlp_timing.gemms(o, pre, y),
                     linear.UNFUSED: lambda o=o: mlp_timing.unfused(o)}  # fmt: skip
            for backend in backends[1:]:  # with the tiles that a run would choose
                tiles, left_out = mlp_timing.tuned(backend, o, shape, 3 if context.quick else 10)
                way = mlp_timing.fastest(backend, tiles) or Way(backend)
                print(f"    {way}, left out: {left_out}", flush=True)
                calls[backend] = lambda o=o, way=way: mlp_timing.fused(way, o)
            if context.device.type == "cuda":
                torch.compiler.reset()
                compiled = torch.compile(formula, dynamic=False)
                calls[mlp_timing.COMPILED] = lambda o=o, f=compiled: mlp_timing.published(f, o)
                calls |= _transformer_engine(name, shape, context, data)
            seconds = _rounds(calls, context)
            medians = {label: statistics.median(times) for label, times in seconds.items()}
            floor = medians[mlp_timing.GEMMS]
            print(f"MLP {name} {shape.tokens} x {shape.hidden} x {shape.ffn}: " + ", ".join(
                f"{label} {median * 1e3:.3f} ms ({median / floor:.3f})" for label, median in medians.items()
            ), flush=True)  # fmt: skip
            found.append({"activation": name, "tokens": shape.tokens, "hidden": shape.hidden, "ffn": shape.ffn,
                          "seconds": seconds})  # fmt: skip
            fused = {b: medians[b] / floor for b in backends if b != linear.UNFUSED}
            if fused and (name, shape) == ("xielu", _shape(context, False, 1)) and not context.quick:
                best = min(fused, key=fused.__getitem__)
                says = f"MLP {fused[best]:.3f} x its GEMMs by {best}, target {TARGETS['MLP']}"
                told.append(says if fused[best] <= TARGETS["MLP"] else f"missed: {says}")
    return told or [f"{len(found)} MLPs timed; no fused backend or too small for the targets"]


def _transformer_engine(name: str, shape: Shape, context: Context, data: dict) -> dict[str, Callable]:
    """TransformerEngine's own MLP of the same sizes, where it is installed and has the activation."""
    op = {"relu2": "SReLU", "swiglu": "SwiGLU"}.get(name)
    if op is None:
        return {}
    try:
        te = importlib.import_module("transformer_engine.pytorch")
        options = {"bias": False, "device": context.device, "dtype": shape.dtype}
        width = shape.ffn * (1 + activations.get(name).gated)
        layers = te.ops.Sequential(
            te.ops.Linear(shape.hidden, width, **options), getattr(te.ops, op)(),
            te.ops.Linear(shape.ffn, shape.hidden, **options),
        )  # fmt: skip
    except (ImportError, AttributeError, OSError) as error:
        data["absent"][f"TransformerEngine {op}"] = f"{type(error).__name__}: {error}"
        return {}
    x = context.randn(shape.tokens, shape.hidden, dtype=shape.dtype).requires_grad_()
    dout = context.randn(shape.tokens, shape.hidden, seed=1, dtype=shape.dtype)
    inputs = [x, *layers.parameters()]
    return {f"TE {op}": lambda: torch.autograd.grad(layers(x), inputs, dout)}
