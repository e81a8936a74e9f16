"""How fast the kernels are on a GPU: bandwidth at training shapes, and beside what others offer."""

from __future__ import annotations

import importlib

import torch

from megatron_xact import activations
from megatron_xact.kernels import benchmark
from megatron_xact.kernels.benchmark import BACKWARD, FORWARD, Measurement
from tools.gpu.context import Context, Failure

# Of the measured copy bandwidth at M = 16384, F = 12288, bf16 on an H200; and beside others.
TARGETS = {FORWARD: 0.92, BACKWARD: 0.90}
OF_RELU2, OF_COMPILED_FORMULA = 1.02, 1.5
TOKENS, WIDTHS, TENSOR_PARALLEL = 16384, (6144, 9216, 12288, 43008), (1, 2, 4, 8)


def _ceiling(context: Context) -> float:
    return benchmark.copy_ceiling(1 << (22 if context.quick else 31), context.device, 20)


def _of(found: list[Measurement], contender: str, name: str, direction: str) -> Measurement:
    return next(m for m in found if (m.contender, m.activation, m.direction) == (contender, name, direction))


def bandwidth(context: Context, data: dict) -> str:
    """Ours, bf16, per width and tensor-parallel slice; the targets are for one shape."""
    tokens, widths = (64, (768,)) if context.quick else (TOKENS, WIDTHS)
    ceiling = data["copy_bytes_per_second"] = _ceiling(context)
    found: list[Measurement] = []
    for name in ("xielu", "xiprelu", "relu2", "xsilu_glu2", "swiglu"):
        record = activations.get(name)
        learned = {q.symbol: torch.tensor([q.init], device=context.device).requires_grad_() for q in record.trainable}
        for columns in sorted({width // tp for width in widths for tp in TENSOR_PARALLEL}):
            found += benchmark.measure("xact", benchmark.ours_alone(record), record, torch.bfloat16, tokens, columns,
                                       context.device, 30, learned)  # fmt: skip
            line = "  ".join(f"{m.direction} {m.bytes_per_second / ceiling:5.1%}" for m in found[-2:])
            print(f"{name:12}{tokens:7}{columns:7}  {line}", flush=True)
    data["measurements"] = [m.as_dict() for m in found]
    if context.quick:
        return f"{len(found)} measurements; too small for the targets"
    missed, told = [], []
    for direction, target in TARGETS.items():
        at_shape = {m.activation: m for m in found if m.columns == 12288 and m.direction == direction}
        share = at_shape["xielu"].bytes_per_second / ceiling
        beside = at_shape["xielu"].median / at_shape["relu2"].median
        told.append(f"{direction} {share:.1%} of copy, {beside:.3f} x relu2's time")
        missed += [f"{direction} {share:.1%} < {target:.0%} of copy"] if share < target else []
        missed += [f"{direction} {beside:.3f} x relu2's time > {OF_RELU2}"] if beside > OF_RELU2 else []
    if missed:
        raise Failure("; ".join(missed))
    return "; ".join(told)


def peers(context: Context, data: dict) -> str:
    """The published formula (eager, torch.compile), TransformerEngine's and Liger's kernels, where importable."""
    tokens, columns = (64, 768) if context.quick else (TOKENS, 12288)
    found = benchmark.compare(["xielu", "relu2", "swiglu"], [torch.bfloat16], tokens, columns, context.device, 30)
    for name, contender, call in _others(data):
        found += benchmark.measure(contender, call, activations.get(name), torch.bfloat16, tokens, columns,
                                   context.device, 30)  # fmt: skip
    for m in found:
        print(f"{m.activation:10}{m.contender:16}{m.direction:10}{m.median * 1e3:9.3f} ms", flush=True)
    data["measurements"] = [m.as_dict() for m in found]
    ratios = benchmark.speedups(found)
    data["speedups"] = {" ".join(key): ratio for key, ratio in ratios.items()}
    ratio = ratios["xielu", "bfloat16", "torch.compile"]
    if not context.quick and ratio < OF_COMPILED_FORMULA:
        raise Failure(f"{ratio:.2f} x the speed of the compiled published formula < {OF_COMPILED_FORMULA}")
    return f"xielu: {ratio:.2f} x the speed of the compiled published formula, forward + backward"


def _others(data: dict):
    """(activation, contender, call) of what is installed; why not, for the rest, in data["absent"]."""
    data["absent"] = absent = {}

    def te(op: str):
        layer = getattr(importlib.import_module("transformer_engine.pytorch.ops"), op)()
        return lambda x, raw: layer(x)

    def liger_relu2():
        function = importlib.import_module("liger_kernel.ops.relu_squared").LigerReLUSquaredFunction
        return lambda x, raw: function.apply(x)

    def liger_swiglu():
        function = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        return lambda x, raw: function.apply(*(half.contiguous() for half in x.chunk(2, -1)))

    for name, contender, make in (
        ("relu2", "TE SReLU", lambda: te("SReLU")),
        ("swiglu", "TE SwiGLU", lambda: te("SwiGLU")),
        ("relu2", "Liger", liger_relu2),
        ("swiglu", "Liger", liger_swiglu),
    ):
        try:
            yield name, contender, make()
        except (ImportError, AttributeError, OSError) as error:
            absent[f"{contender} {name}"] = f"{type(error).__name__}: {error}"
