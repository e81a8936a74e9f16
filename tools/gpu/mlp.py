"""The activation inside the matrix products: right, the same twice, and in less memory, tile by tile.

What is compared is in `kernels.linear`, and the whole MLPs are those of `kernels.mlp_timing`, so that what is measured
here and in mlp_speed.py is what chooses between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels import linear, mlp_timing, reference
from megatron_xact.kernels.linear import BACKWARD, FORWARD, Way
from megatron_xact.kernels.mlp_timing import Operands, Shape
from tools.gpu import timing
from tools.gpu.context import Context, Entries, Skip, as_error, over_bound

TOKENS = 16384
WIDTHS = {False: ((2048, 12288), (1536, 9216)), True: ((2048, 8192), (1536, 6144))}  # by gated: the paper's 3B and 1.1B
MEMORY_TARGET = 0.5  # of what an activation on its own keeps for backward
MODERATE, RAGGED, ODD = (2048, 1024, 3072), (517, 328, 1016), (517, 333, 1001)  # tokens, hidden, ffn
NAMES = ("xielu", "relu2", "xielu_neg_xsilu", "swiglu", "xsilu_glu2")


def correctness(context: Context, data: Entries) -> str:
    """Every result of every tile beside fp64: worst error over its bound; and two runs with the same bits."""
    data["absent"], backends = available(context)
    data["worst_over_bound"], data["unserved"] = {}, {}
    # cuBLAS may add up parts of a product in bf16, as torch lets it; what is asked here is whether ours are right
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    for name in context.mine(NAMES):
        for sizes in ((40, 24, 32),) if context.quick else (MODERATE, RAGGED, ODD):
            for bias in (True, False):
                o = mlp_timing.operands(activations.get(name), Shape(*sizes, torch.bfloat16, bias), context.device)
                for backend in backends:
                    _check(context, o, backend, f"{name} {sizes}{' bias' * bias}", data)
                    data.save()
    data.all_at_most("error over its bound", 1.0, data["worst_over_bound"])
    return f"{len(data['worst_over_bound'])} results, of {', '.join(backends)}"


def available(context: Context) -> tuple[dict[str, str], list[str]]:
    """(why a backend cannot run here, those that can: "unfused" is the first)."""
    record = activations.get("xielu")
    reasons = {b: linear.unavailable_reason(b, record, torch.bfloat16, context.device) for b in linear.BACKENDS}
    absent = {backend: why for backend, why in reasons.items() if why}
    return absent, [linear.UNFUSED, *(backend for backend in linear.BACKENDS if backend not in absent)]


@torch.no_grad()
def _check(context: Context, o: Operands, backend: str, label: str, data: Entries) -> None:
    for what, errors in _checks(o, backend):
        try:
            with data.trying(f"{label} {what}"):
                data["worst_over_bound"] |= {f"{label} {what} {result}": ratio for result, ratio in errors().items()}
        except ValueError as refusal:  # e.g. rows that are no multiple of 16 bytes
            data["unserved"][f"{label} {what}"] = str(refusal)
        except Exception as problem:  # a compiler's, mostly
            print(f"{label} {what}: {timing.reason(problem)}", flush=True)
            data["worst_over_bound"][f"{label} {what} cannot run"] = torch.inf
            context.synchronize()  # a GPU that is lost for this process says so again: nothing more can be asked


def tiles(backend: str, direction: str, activation: Activation, *tensors: Tensor, bias: bool) -> list[str | None]:
    """Names of all candidates; unfused has no tiles."""
    if backend == linear.UNFUSED:
        return [None]
    return linear.tiles(backend, direction, activation, *tensors, bias=bias)


def name_of(backend: str, tile: str | None) -> str:
    return backend if tile is None else f"{backend} {tile}"


def _checks(o: Operands, backend: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """(what is checked, a call for its errors over their bounds): every tile forward and backward, and a whole MLP."""
    record, (x, w1, w2, dout), bias = o.activation, (o.x_MH, o.w1_WH, o.w2_HF, o.dout_MH), o.bias_W is not None
    p64 = {s: v.double() if isinstance(v, Tensor) else v for s, v in o.p.items()}
    bias64 = o.bias_W.double() if bias else None
    true_pre = x.double() @ w1.double().T
    for tile in tiles(backend, FORWARD, record, x, w1, x.new_empty(x.shape[0], w2.shape[1]), bias=bias):
        yield f"forward {name_of(backend, tile)}", partial(_forward_errors, o, backend, tile, true_pre, p64, bias64)
    saved = pre = true_pre.to(x.dtype)  # one pre-activation for all
    if linear.saves_output(record, x.dtype):
        saved = reference.forward(record, pre.double(), p64, bias64).to(x.dtype)
    for tile in tiles(backend, BACKWARD, record, dout, w2, saved, bias=bias):
        yield f"backward {name_of(backend, tile)}", partial(_backward_errors, o, backend, tile, saved, p64, bias64)
    yield f"MLP {backend}", partial(_mlp_errors, o, backend, p64, bias64)


def _forward_errors(
    o: Operands, backend: str, tile: str | None, true_pre: Tensor, p64: Values, bias64: Tensor | None
) -> dict[str, float]:
    args = backend, o.activation, o.x_MH, o.w1_WH, o.p, o.bias_W
    found, again = (linear.forward(*args, tile=tile, with_pre=True) for _ in range(2))
    true_y = reference.forward(o.activation, found.pre_MW.double(), p64, bias64)
    return {
        "pre": over_bound(found.pre_MW, true_pre),
        "y": over_bound(found.y_MF, true_y),
        "twice": _differ(found, again),
    }


def _backward_errors(
    o: Operands, backend: str, tile: str | None, saved: Tensor, p64: Values, bias64: Tensor | None
) -> dict[str, float]:
    args = backend, o.activation, o.dout_MH, o.w2_HF, saved, o.p, o.bias_W
    back, again = (linear.backward(*args, tile=tile) for _ in range(2))
    record, dy = o.activation, o.dout_MH.double() @ o.w2_HF.double()
    by_output = linear.saves_output(record, saved.dtype)
    if by_output:  # the bias is in it
        record, bias64 = record.of_output, None if bias64 is None else torch.zeros_like(bias64)
    true = reference.backward(record, saved.double(), p64, dy, bias64, emit_y=not by_output)
    # unfused, dy goes through memory: rounded by up to 2^-9, and so is what is made of it
    loose = 3 * 2.0**-9 if backend == linear.UNFUSED else 1e-5
    found = {"dpre": over_bound(back.dpre_MW, true.dx, loose)}
    if not by_output:
        found["y again"] = over_bound(back.y_MF, true.y, loose)
    if bias64 is not None:
        found["bias"] = over_bound(back.bias, true.bias, loose)
    for symbol, value in back.parameters.items():
        exact = true.parameters[symbol]
        bound = dy.abs().sum() * 1e-5 + exact.abs() * loose
        found[f"d {symbol}"] = as_error((value.double() - exact).abs() / bound)
    ours, others = ([b.dpre_MW, b.y_MF, b.bias, *b.parameters.values()] for b in (back, again))
    return found | {"twice": _differ(ours, others)}


def _mlp_errors(o: Operands, backend: str, p64: Values, bias64: Tensor | None) -> dict[str, float]:
    biases = [] if bias64 is None else ["dbias"]
    names = ["out", "dx", "dw1", "dw2", *biases, *(f"d {q.symbol}" for q in o.activation.trainable)]
    found = {}
    for what, ours, exact in zip(names, mlp_timing.fused(Way(backend), o), _exact_mlp(o, p64, bias64), strict=True):
        error = (ours.double() - exact.reshape(ours.shape)).norm() / exact.norm()
        found[what] = as_error(error / mlp_timing.AGREEMENT[torch.bfloat16])
    return found


def _differ(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> float:
    """inf where two runs have not the same bits. None: nothing of that kind."""
    pairs = [(a, b) for a, b in zip(some, others, strict=True) if a is not None]
    return 0.0 if all(torch.equal(a, b) for a, b in pairs) else torch.inf


def _exact_mlp(o: Operands, p64, bias64) -> list[Tensor]:
    """[out, dx, dw1, dw2, (dbias), d parameters] in fp64."""
    x, w1, w2, dout = (t.double() for t in (o.x_MH, o.w1_WH, o.w2_HF, o.dout_MH))
    pre = x @ w1.T
    back = reference.backward(o.activation, pre, p64, dout @ w2, bias64, emit_y=True)
    sums = [back.parameters[q.symbol] for q in o.activation.trainable]
    biases = [] if bias64 is None else [back.bias]
    return [back.y @ w2.T, back.dx @ w1, back.dx.T @ x, dout.T @ back.y, *biases, *sums]


def memory(context: Context, data: Entries) -> str:
    """What waits for backward besides x and fc2's output, and the peak, bytes."""
    if not context.on_gpu:
        raise Skip("peak memory is CUDA's to tell")
    _, backends = available(context)
    o = mlp_timing.operands(activations.get("xielu"), paper_shape(context, False, 1), context.device)
    for backend in backends:
        call = mlp_timing.unfused if backend == linear.UNFUSED else lambda o, b=backend: mlp_timing.fused(Way(b), o)
        call(o)  # compiles
        torch.cuda.synchronize(context.device)
        before = torch.cuda.memory_allocated(context.device)
        with torch.no_grad():
            saved, y, _ = linear.forward(backend, o.activation, o.x_MH, o.w1_WH, o.p, o.bias_W)
        kept = [saved, y] if backend == linear.UNFUSED else [saved]
        del saved, y, _
        held = torch.cuda.memory_allocated(context.device) - before
        del kept
        torch.cuda.reset_peak_memory_stats(context.device)
        call(o)
        peak = torch.cuda.max_memory_allocated(context.device) - before
        data[backend] = {"held": held, "peak": peak}
        if backend != linear.UNFUSED:
            share = held / data[linear.UNFUSED]["held"]
            data.target(f"{backend} holds, of unfused", share, at_most=MEMORY_TARGET)
    if len(backends) == 1:
        data.target("no fused backend can run; what one holds, of unfused", math.nan, at_most=MEMORY_TARGET)
    return ", ".join(f"{b} held {m['held'] >> 20} MiB, peak {m['peak'] >> 20} MiB" for b, m in data.items())


def paper_shape(context: Context, gated: bool, tp: int, width: int = 0) -> Shape:
    hidden, ffn = (32, 64) if context.quick else WIDTHS[gated][width]
    return Shape(64 if context.quick else TOKENS, hidden, ffn // tp, torch.bfloat16)
