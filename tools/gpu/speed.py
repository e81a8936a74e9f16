"""How fast the kernels are on a GPU: bandwidth at training shapes, and beside what others offer."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.kernels import benchmark
from megatron_xact.kernels.benchmark import BACKWARD, FORWARD, Measurement
from tools.gpu import timing
from tools.gpu.context import Context, Entries

# Of the measured copy bandwidth at M = 16384, F = 12288, bf16 on an H200; and beside others.
TARGETS = {FORWARD: 0.92, BACKWARD: 0.90}
OF_RELU2, OF_COMPILED_FORMULA = 1.02, 1.5
TOKENS, WIDTHS, TENSOR_PARALLEL = 16384, (6144, 9216, 12288, 43008), (1, 2, 4, 8)
OPERATOR, KERNEL, COPY = "operator", "kernel", "copy"
REPEATS = 30


def _ceiling(context: Context) -> float:
    return benchmark.copy_ceiling(1 << (22 if context.quick else 31), context.device, 20)


def bandwidth(context: Context, data: Entries) -> str:
    """Ours, bf16, per width and tensor-parallel slice, through autograd and the kernels alone; targets for one shape
    and the kernels."""
    tokens, widths = (64, (768,)) if context.quick else (TOKENS, WIDTHS)
    names = ("xielu", "relu2") if context.quick else ("xielu", "relu2", "xiprelu", "xsilu_glu2", "swiglu")
    ceiling = data["copy_bytes_per_second"] = _ceiling(context)
    data["measurements"] = []
    for name in names:
        for columns in sorted({width // tp for width in widths for tp in TENSOR_PARALLEL}):
            with data.trying(f"{name} {tokens} x {columns}"):
                measured = _measured(_ways(context, activations.get(name), tokens, columns), context.device)
            line = "  ".join(f"{m.contender} {m.direction} {m.bytes_per_second / ceiling:5.1%}" for m in measured)
            print(f"{name:12}{tokens:7}{columns:7}  {line}", flush=True)
            data["measurements"] += [m.as_dict() for m in measured]
            data.save()
    if not context.quick:
        _judge(context, data, ceiling)
    return f"{len(data['measurements'])} measurements, a copy moves {ceiling / 1e12:.2f} TB/s"


def _judge(context: Context, data: Entries, ceiling: float) -> None:
    """xIELU's kernels and ReLU^2's take turns: two per cent is less than what a GPU's clocks change in a minute."""
    ways = [way for name in ("xielu", "relu2") for way in _ways(context, activations.get(name), TOKENS, 12288)
            if way[0].contender == KERNEL]  # fmt: skip
    measured = _measured(ways, context.device)
    data["judged"] = [m.as_dict() for m in measured]
    found = {(m.activation, m.direction): m for m in measured}
    for direction, target in TARGETS.items():
        ours, relu2 = found["xielu", direction], found["relu2", direction]
        data.target(f"{direction} kernel, of copy", ours.bytes_per_second / ceiling, at_least=target)
        data.target(f"{direction} kernel, time beside relu2's", ours.median / relu2.median, at_most=OF_RELU2)


Way = tuple[Measurement, timing.Rotation]  # what is measured, without seconds


def _ways(context: Context, record: Activation, tokens: int, columns: int) -> list[Way]:
    """Operator and kernel, each direction, and a copy of as many bytes as forward moves, each with operands of its own
    that no cache can hold."""
    width = columns * (1 + record.gated)
    elements = {FORWARD: width + columns, BACKWARD: 2 * width + columns}
    bytes_of = {direction: 2 * tokens * count for direction, count in elements.items()}
    p = context.parameters(record)
    learned = {s: v.clone().requires_grad_() for s, v in p.items() if isinstance(v, Tensor)}
    operator = benchmark.ours_alone(record)

    def gradients(x: Tensor, dy: Tensor) -> Callable[[], object]:
        x.requires_grad_()
        return partial(torch.autograd.grad, operator(x, learned), [x, *learned.values()], dy, retain_graph=True)

    calls = {
        (OPERATOR, FORWARD): lambda x, dy: partial(operator, x.requires_grad_(), learned),
        (OPERATOR, BACKWARD): gradients,
        (KERNEL, FORWARD): lambda x, dy: partial(context.backend.forward, record, x, p),
        (KERNEL, BACKWARD): lambda x, dy: partial(context.backend.backward, record, x, p, dy),
        (COPY, FORWARD): lambda x, dy: partial(torch.clone, x.view(-1)[: tokens * elements[FORWARD] // 2]),
    }
    found = []
    for (contender, direction), call_of in calls.items():
        drawn = timing.operands(context, record, tokens, columns, bytes_of[direction])
        what = Measurement(contender, record.name, "bfloat16", tokens, columns, direction, bytes_of[direction], [])
        found.append((what, timing.Rotation([call_of(x, dy) for x, dy in drawn])))
    return found


def _measured(ways: list[Way], device: torch.device) -> list[Measurement]:
    """In turns."""
    seconds = benchmark.clock_in_turns([rotation for _, rotation in ways], device, REPEATS)
    return [replace(what, seconds=times) for (what, _), times in zip(ways, seconds, strict=True)]


def peers(context: Context, data: Entries) -> str:
    """The published formula (eager, torch.compile), TransformerEngine's and Liger's kernels, where importable."""
    tokens, columns = (64, 768) if context.quick else (TOKENS, 12288)
    data["absent"], data["measurements"], data["speedups"] = {}, [], {}
    for name, calls, learned in _contenders(context, data["absent"]):
        record = activations.get(name)
        measure = partial(benchmark.measure, activation=record, dtype=torch.bfloat16, rows=tokens, columns=columns,
                          device=context.device, parameters=learned)  # fmt: skip
        working = {}
        for contender, call in calls.items():
            try:
                with data.trying(f"{contender} {name}"):
                    measure({contender: call}, repeats=1)
                working[contender] = call
            except Exception as problem:  # a peer's own, which must not take the others' numbers with it
                data["absent"][f"{contender} {name}"] = timing.reason(problem)
                context.synchronize()  # unless the GPU is lost for this process
        found = measure(working, repeats=REPEATS)
        for m in found:
            print(f"{m.activation:10}{m.contender:16}{m.direction:10}{m.median * 1e3:9.3f} ms", flush=True)
        data["measurements"] += [m.as_dict() for m in found]
        if "xact" in working:
            data["speedups"] |= {" ".join(key): ratio for key, ratio in benchmark.speedups(found).items()}
        data.save()
    ratio = data["speedups"].get("xielu bfloat16 torch.compile", 0.0)
    if not context.quick:
        data.target("xielu beside the compiled published formula, speed", ratio, at_least=OF_COMPILED_FORMULA)
    return f"{len(data['measurements'])} measurements; absent: {', '.join(data['absent']) or 'nothing'}"


def _contenders(context: Context, absent: dict[str, str]) -> Iterator[tuple[str, dict[str, Callable], dict | None]]:
    """(activation, calls, their parameters); None: the activation's own.

    PolyNorm, another function of learned coefficients (of x^3, x^2 and x, normalized by row), is set beside xIELU.
    """

    def te(op: str):
        layer = getattr(importlib.import_module("transformer_engine.pytorch.ops"), op)()
        return lambda x, raw: layer(x)

    def liger_relu2():
        function = importlib.import_module("liger_kernel.ops.relu_squared").LigerReLUSquaredFunction
        return lambda x, raw: function.apply(x)

    def liger_swiglu():
        function = importlib.import_module("liger_kernel.ops.swiglu").LigerFusedGateUpSiLUMulFunction
        return lambda x, raw: function.apply(x)

    def liger_polynorm():
        function = importlib.import_module("liger_kernel.ops.poly_norm").LigerPolyNormFunction
        # not in place: that would write dx over the dy which the next repetition needs
        return lambda x, learned: function.apply(x, learned["weight"], learned["bias"], 1e-6, False)

    def importable(makers: dict[str, Callable]) -> dict[str, Callable]:
        calls = {}
        for contender, make in makers.items():
            try:
                calls[contender] = make()
            except (ImportError, AttributeError, OSError) as error:
                absent[contender] = timing.reason(error)
        return calls

    others = {
        "xielu": {},
        "relu2": {"TE SReLU": lambda: te("SReLU"), "Liger ReLU^2": liger_relu2},
        "swiglu": {"TE SwiGLU": lambda: te("SwiGLU"), "Liger SwiGLU": liger_swiglu},
    }
    for name, makers in others.items():
        torch.compiler.reset()  # after eight compilations of one function torch.compile would run it eagerly
        calls = benchmark.contenders(activations.get(name))
        if context.on_gpu:  # which this compiler tunes for
            formula = benchmark.published_formula(activations.get(name))
            tuning = {"coordinate_descent_tuning": True}
            calls["torch.compile, tuned"] = torch.compile(formula, dynamic=False, options=tuning)
        yield name, calls | importable(makers), None
    weight, bias = torch.full((3,), 1 / 3, device=context.device), torch.ones((), device=context.device)
    learned = {"weight": weight.requires_grad_(), "bias": bias.requires_grad_()}
    if calls := importable({"Liger PolyNorm": liger_polynorm}):
        yield "xielu", calls, learned


def quantized(context: Context, data: Entries) -> str:
    """Activation and quantization in one pass, beside ours to bf16 alone and TransformerEngine's two passes."""
    context.needs_fp8()
    tokens, columns = (256, 768) if context.quick else (TOKENS, 12288)
    ceiling = data["copy_bytes_per_second"] = _ceiling(context)
    data["absent"], data["seconds"] = {}, {}
    for name in ("xielu", "relu2", "xsilu_glu2", "swiglu"):
        calls = _ways_to_fp8(context, activations.get(name), tokens, columns, data["absent"])
        for label, times in timing.in_turns(context, calls, REPEATS, data).items():
            data["seconds"][f"{name} {label}"] = times
            print(f"{name} {label:40}{statistics.median(times) * 1e3:9.3f} ms", flush=True)
        data.save()
    ideal = {FORWARD: 4, BACKWARD: 6}  # bytes per element, ungated: bf16 in, FP8 out twice
    told = []
    for label, times in data["seconds"].items():
        name, direction, *way = label.split()
        if name == "xielu" and direction in ideal:
            share = ideal[direction] * tokens * columns / statistics.median(times) / ceiling
            told.append(f"{direction} {' '.join(way)} {share:.1%}")
    return "xielu, of copy bandwidth: " + ", ".join(told)


def _ways_to_fp8(context: Context, record: Activation, tokens: int, columns: int, absent: dict) -> dict:
    """Label -> call: to bf16 alone; in one pass; to bf16 and then TransformerEngine's quantization, if it is there."""
    from megatron_xact.kernels import fp8

    p = context.parameters(record)
    x = context.randn(tokens, columns * (1 + record.gated), dtype=torch.bfloat16)
    dy = context.randn(tokens, columns, seed=1, dtype=torch.bfloat16)
    given = fp8.PerTensor(torch.ones(1, device=context.device))
    ways = {
        "bf16 forward": lambda: context.backend.forward(record, x, p),
        "bf16 backward": lambda: context.backend.backward(record, x, p, dy),
        "forward per tensor": lambda: fp8.forward(record, x, p, given),
        "backward per tensor": lambda: fp8.backward(record, x, p, dy, given),
        "forward blockwise": lambda: fp8.forward(record, x, p, fp8.Blockwise()),
        "backward blockwise": lambda: fp8.backward(record, x, p, dy, fp8.Blockwise()),
    }
    try:
        import transformer_engine_torch as tex
        from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    except (ImportError, OSError) as error:
        absent["TransformerEngine"] = timing.reason(error)
        return ways
    quantizer = Float8BlockQuantizer(tex.DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=1)
    return ways | {
        "two passes forward blockwise": lambda: quantizer(context.backend.forward(record, x, p)),
        "two passes backward blockwise": lambda: quantizer(context.backend.backward(record, x, p, dy).dx),
    }
