"""How fast the kernels are on a GPU: bandwidth at training shapes, and beside what others offer."""

from __future__ import annotations

import importlib
import statistics

import torch

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.kernels import benchmark
from megatron_xact.kernels.benchmark import BACKWARD, FORWARD, Measurement
from tools.gpu.context import Context, Failure, Skip

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
            found += benchmark.measure({"xact": benchmark.ours_alone(record)}, record, torch.bfloat16, tokens, columns,
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
    for name, contender, call, learned in _others(context, data):
        found += benchmark.measure({contender: call}, activations.get(name), torch.bfloat16, tokens, columns,
                                   context.device, 30, learned)  # fmt: skip
    for m in found:
        print(f"{m.activation:10}{m.contender:16}{m.direction:10}{m.median * 1e3:9.3f} ms", flush=True)
    data["measurements"] = [m.as_dict() for m in found]
    ratios = benchmark.speedups(found)
    data["speedups"] = {" ".join(key): ratio for key, ratio in ratios.items()}
    ratio = ratios["xielu", "bfloat16", "torch.compile"]
    if not context.quick and ratio < OF_COMPILED_FORMULA:
        raise Failure(f"{ratio:.2f} x the speed of the compiled published formula < {OF_COMPILED_FORMULA}")
    return f"xielu: {ratio:.2f} x the speed of the compiled published formula, forward + backward"


def _others(context: Context, data: dict):
    """(activation, contender, call, its parameters) of what is installed; why not, for the rest, in data["absent"].

    PolyNorm, another function of learned coefficients (of x^3, x^2 and x, normalized by row), is set beside xIELU.
    """
    data["absent"] = absent = {}
    polynorm = {"weight": torch.full((3,), 1 / 3, device=context.device), "bias": torch.ones((), device=context.device)}

    def te(op: str):
        layer = getattr(importlib.import_module("transformer_engine.pytorch.ops"), op)()
        return lambda x, raw: layer(x)

    def liger_relu2():
        function = importlib.import_module("liger_kernel.ops.relu_squared").LigerReLUSquaredFunction
        return lambda x, raw: function.apply(x)

    def liger_swiglu():
        function = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        return lambda x, raw: function.apply(*(half.contiguous() for half in x.chunk(2, -1)))

    def liger_polynorm():
        function = importlib.import_module("liger_kernel.ops.poly_norm").LigerPolyNormFunction
        # not in place: that would write dx over the dy which the next repetition needs
        return lambda x, learned: function.apply(x, learned["weight"], learned["bias"], 1e-6, False)

    for name, contender, make, learned in (
        ("relu2", "TE SReLU", lambda: te("SReLU"), {}),
        ("swiglu", "TE SwiGLU", lambda: te("SwiGLU"), {}),
        ("relu2", "Liger", liger_relu2, {}),
        ("swiglu", "Liger", liger_swiglu, {}),
        ("xielu", "Liger PolyNorm", liger_polynorm, {n: t.requires_grad_() for n, t in polynorm.items()}),
    ):
        try:
            yield name, contender, make(), learned
        except (ImportError, AttributeError, OSError) as error:
            absent[f"{contender} {name}"] = f"{type(error).__name__}: {error}"


def quantized(context: Context, data: dict) -> str:
    """Activation and quantization in one pass, beside ours to bf16 alone and TransformerEngine's two passes."""
    if context.device.type == "cuda" and torch.cuda.get_device_capability(context.device) < (8, 9):
        raise Skip("this GPU has no FP8")
    tokens, columns = (256, 768) if context.quick else (TOKENS, 12288)
    ceiling = data["copy_bytes_per_second"] = _ceiling(context)
    data["seconds"] = seconds = {}
    for name in ("xielu", "relu2", "xsilu_glu2", "swiglu"):
        record = activations.get(name)
        for label, call in _ways_to_fp8(context, record, tokens, columns, data).items():
            seconds[f"{name} {label}"] = benchmark.clock(call, context.device, 30)
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    ideal = {"forward": 4, "backward": 6}  # bytes per element, ungated: bf16 in, FP8 out twice
    told = []
    for label, median in medians.items():
        print(f"{label:44}{median * 1e3:9.3f} ms", flush=True)
        words = label.split()
        if words[0] == "xielu" and words[1] in ideal:
            share = ideal[words[1]] * tokens * columns / median / ceiling
            told.append(f"{' '.join(words[1:])} {share:.1%}")
    return "xielu, of copy bandwidth: " + ", ".join(told)


def _ways_to_fp8(context: Context, record: Activation, tokens: int, columns: int, data: dict) -> dict:
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
        data["absent"] = f"transformer-engine: {type(error).__name__}: {error}"
        return ways
    quantizer = Float8BlockQuantizer(tex.DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=1)
    return ways | {
        "two passes forward blockwise": lambda: quantizer(context.backend.forward(record, x, p)),
        "two passes backward blockwise": lambda: quantizer(context.backend.backward(record, x, p, dy).dx),
    }
