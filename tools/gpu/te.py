"""Our operations in TransformerEngine: right in bf16 and in every FP8 recipe, the same bits twice, and how fast.

The layer is an MLP of TE's operations: BasicLinear, (Bias), an activation, BasicLinear. tests/te runs the same in TE's
Python layer without a GPU; what is left for one are TE's own products and casts, and ours beside them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.kernels import linear
from tools.gpu import timing
from tools.gpu.context import Context, Entries, Skip

NAMES = ("xielu", "xsilu_glu2")
BF16_BOUND = 0.02  # largest error over largest number, of sums of products of numbers rounded to bf16
NO_WORSE = 1.05  # RMS error in FP8, one pass against TE's two: one rounding instead of two
UNLIKE = 1e-4  # of FP8 values where both round the same fp32 number; compilers may contract products differently
TOKENS, HIDDEN, FFN = 16384, 2048, 12288
REPEATS = 20


def correctness(context: Context, data: Entries) -> str:
    """Errors against fp64, FP8 tensors beside those of TE's quantizers, determinism."""
    _needs_te(context)
    told = [_bf16(context, data), _tensors(context, data), _fp8(context, data), _between_modules(context, data)]
    return "; ".join(told)


def _needs_te(context: Context) -> None:
    if not context.on_gpu:
        raise Skip("TransformerEngine computes on GPUs only; tests/te covers its Python layer")
    try:
        import megatron_xact.layers.te.joint  # noqa: F401
    except (ImportError, OSError) as error:
        raise Skip(timing.reason(error)) from None


# --- correctness ------------------------------------------------------------------------------------------------------


def _sizes(context: Context) -> tuple[int, int, int]:
    return (256, 256, 512) if context.quick else (2048, 1024, 3072)  # tokens, hidden, ffn


def _weights(context: Context, record: Activation, hidden: int, ffn: int) -> tuple[Tensor, Tensor, Tensor]:
    """fc1's weight and bias, fc2's weight, in bf16."""
    width = ffn * (1 + record.gated)
    w1, w2 = context.randn(width, hidden, seed=1) / hidden**0.5, context.randn(hidden, ffn, seed=2) / ffn**0.5
    return w1.bfloat16(), context.randn(width, seed=3).bfloat16(), w2.bfloat16()


def _mlp(context: Context, record: Activation, hidden: int, ffn: int, bias: bool, **options):
    """(Sequential, {name: parameter}) with the weights of `_weights`."""
    import transformer_engine.pytorch.ops as ops

    from megatron_xact.layers.te.operation import ActivationOperation

    w1, b1, w2 = _weights(context, record, hidden, ffn)
    fc1 = ops.BasicLinear(hidden, w1.shape[0], device=context.device, dtype=w1.dtype)
    fc2 = ops.BasicLinear(ffn, hidden, device=context.device, dtype=w1.dtype)
    activation = ActivationOperation(record, **options).to(context.device)
    parameters = {"w1": fc1.weight, "w2": fc2.weight} | dict(activation.named_parameters())
    parts = [fc1, activation, fc2]
    with torch.no_grad():
        fc1.weight.copy_(w1), fc2.weight.copy_(w2)
        if bias:
            parts.insert(1, ops.Bias(w1.shape[0], device=context.device, dtype=w1.dtype))
            parts[1].bias.copy_(b1)
            parameters["bias"] = parts[1].bias
    return ops.Sequential(*parts), parameters


def _run(model, parameters: dict[str, Tensor], x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = model(x)
    gradients = torch.autograd.grad(y, [x, *parameters.values()], dout)
    return {"y": y.detach(), "x": gradients[0]} | dict(zip(parameters, gradients[1:], strict=True))


def _exact(context: Context, record: Activation, hidden: int, ffn: int, x: Tensor, dout: Tensor, bias: bool):
    """The same in fp64, by autograd through the formula."""
    w1, b1, w2 = (w.double().requires_grad_() for w in _weights(context, record, hidden, ffn))
    initial = record.initial_raw().items()
    # rounded to the fp32 numbers that a module starts with
    raw = {n: torch.tensor([v], device=context.device).double().requires_grad_() for n, v in initial}
    x = x.double().requires_grad_()
    y = record.forward(x @ w1.T + b1 * bias, record.effective(raw)) @ w2.T
    y.backward(dout.double())
    named = {"x": x, "w1": w1, "w2": w2} | raw | ({"bias": b1} if bias else {})
    return {"y": y.detach()} | {name: t.grad for name, t in named.items()}


def _bf16(context: Context, data: Entries) -> str:
    """Every way to run the MLP in bf16, its error against fp64, and the same bits from two runs."""
    tokens, hidden, ffn = _sizes(context)
    found, differ = data.setdefault("bf16", {}), data.setdefault("two runs differ", [])
    x, dout = (context.randn(tokens, hidden, seed=s).bfloat16() for s in (4, 5))
    for name in NAMES:
        record = activations.get(name)
        for bias in (False, True):
            exact = _exact(context, record, hidden, ffn, x, dout, bias)
            for way, fused in _ways(record, context, data):
                model, parameters = _mlp(context, record, hidden, ffn, bias, fused_linear=fused)
                first, second = (_run(model, parameters, x, dout) for _ in range(2))
                errors = {key: _largest(first[key], exact[key]) for key in exact}
                label = f"{name}{' bias' * bias} {way}"
                found |= {f"{key} of {label}": error for key, error in errors.items()}
                if not all(torch.equal(first[key], second[key]) for key in first):
                    differ.append(label)
                data.save()
    data.all_at_most("bf16 error", BF16_BOUND, found)
    data.target("ways of which two runs differ", len(differ), at_most=0)
    return f"{len(found)} results in bf16"


def _ways(record: Activation, context: Context, data: Entries) -> Iterator[tuple[str, str | None]]:
    """TE's linear layers, and joined through every backend that can run here (TE >= 2.17)."""
    from megatron_xact.layers.te.joint import JOINT_FUSION

    yield "apart", None
    for backend in (linear.UNFUSED, *linear.BACKENDS) if JOINT_FUSION else ():
        reason = linear.unavailable_reason(backend, record, torch.bfloat16, context.device)
        if reason is None:
            yield f"joined, {backend}", backend
        else:
            data.setdefault("absent", {})[f"{record.name} {backend}"] = reason


def _recipes() -> dict:
    from transformer_engine.common import recipe

    return {
        "delayed": recipe.DelayedScaling(),
        "current": recipe.Float8CurrentScaling(),
        "blockwise": recipe.Float8BlockScaling(),
    }


def _fp8(context: Context, data: Entries) -> str:
    """RMS errors of the third step (delayed scaling needs scales) under each recipe, casts in one pass and apart."""
    from transformer_engine.pytorch.quantization import autocast

    tokens, hidden, ffn = _sizes(context)
    x, dout = (context.randn(tokens, hidden, seed=s).bfloat16() for s in (4, 5))
    found, ratios = data.setdefault("fp8", {}), {}
    for recipe_name, recipe in _recipes().items():
        for name in NAMES:
            record, runs = activations.get(name), {}
            exact = _exact(context, record, hidden, ffn, x, dout, False)
            label = f"{name} {recipe_name}"
            try:
                for way, cast in (("two passes", False), ("one pass", True)):
                    model, parameters = _mlp(context, record, hidden, ffn, False, fused_cast=cast)
                    for _ in range(3):
                        with autocast(enabled=True, recipe=recipe):
                            y = _run(model, parameters, x, dout)
                    runs[way] = {key: _rms(y[key], exact[key]) for key in exact}
            except (NotImplementedError, AssertionError) as error:
                data.setdefault("absent", {})[label] = timing.reason(error)
                continue
            found[label] = runs
            for key in ("y", "x", "w1", "w2"):  # an alpha is one number, whose error is luck
                ratios[f"{key} of {label}"] = runs["one pass"][key] / runs["two passes"][key]
            data.save()
    data.all_at_most("FP8 error beside that by TE's casts", NO_WORSE, ratios)
    return f"FP8 in {len(found)} of {3 * len(NAMES)} recipes and activations"


def _tensors(context: Context, data: Entries) -> str:
    """Our FP8 values beside those of TE's quantizers: of fp32 y the same; of y rounded to bf16, how many are."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    from megatron_xact.layers.te.quantized import quantized_forward

    tokens, _, ffn = _sizes(context)
    both, e4m3 = {"rowwise": True, "columnwise": True}, tex.DType.kFloat8E4M3
    amax = torch.zeros(1, device=context.device)
    scale = torch.tensor([8.0], device=context.device)
    quantizers = {
        "delayed": Float8Quantizer(scale, amax, e4m3, **both),
        "current": Float8CurrentScalingQuantizer(e4m3, context.device, **both),
        "blockwise": Float8BlockQuantizer(e4m3, block_scaling_dim=1, **both),
    }
    found, unlike, shares = data.setdefault("tensors", {}), {}, []
    for name in NAMES:
        record = activations.get(name)
        x = context.randn(tokens, ffn * (1 + record.gated), seed=6).bfloat16()
        p = context.parameters(record)
        wide = context.backend.forward(record, x.float(), p)
        for kind, quantizer in quantizers.items():
            ours = quantized_forward(record, x, p, quantizer, rows=True, columns=True, internal=False)
            label = f"{name} {kind}"
            found[label] = {}
            for what, value in (("of fp32", wide), ("of bf16", wide.bfloat16())):
                found[label][what] = _compared(_buffers(ours), _buffers(quantizer(value)))
            unlike[label] = 1 - min(entry["same"] for entry in found[label]["of fp32"].values())
            shares.append(min(entry["same"] for entry in found[label]["of bf16"].values()))
        data.target(f"{name}: the delayed amax", amax.item(), at_least=wide.abs().amax().item())
        amax.zero_()
    data.all_at_most("share of FP8 values that are not TE's, of the same fp32 numbers", UNLIKE, unlike)
    return f"rounded to bf16 first, at least {min(shares):.1%} of FP8 values are the same"


def _buffers(tensor) -> dict[str, Tensor]:
    names = ("_data", "_transpose", "_rowwise_data", "_columnwise_data")
    found = {name: getattr(tensor, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _compared(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict:
    """By buffer: which part has the same bits, and the largest difference in steps of the format."""
    if ours.keys() != theirs.keys():
        return {"buffers": {"same": 0.0, "steps": None, "ours": sorted(ours), "theirs": sorted(theirs)}}

    def order(codes: Tensor) -> Tensor:  # sign and magnitude as a number that counts steps
        codes = codes.short()
        return torch.where(codes >= 128, 128 - codes, codes)

    return {
        name: {
            "same": (ours[name] == theirs[name]).float().mean(dtype=torch.float64).item(),
            "steps": (order(ours[name]) - order(theirs[name])).abs().max().item(),
        }
        for name in ours
    }


def _between_modules(context: Context, data: Entries) -> str:
    """te.Linear takes the activation's FP8 output: its result and gradients beside those of its own cast."""
    import transformer_engine.pytorch as te_modules
    from transformer_engine.pytorch.quantization import autocast

    from megatron_xact.layers.activation import TrainableActivation
    from megatron_xact.layers.te.linear_input import QuantizingActivation

    tokens, hidden, ffn = _sizes(context)
    record, group = activations.get("xielu"), SimpleNamespace(size=lambda: 1)  # no tensor parallelism
    data["between"] = found = {}
    for recipe_name, recipe in _recipes().items():
        results, kinds = [], []
        for own_cast in (True, False):
            fc2 = te_modules.Linear(ffn, hidden, bias=False, params_dtype=torch.bfloat16, device=context.device)
            with torch.no_grad():
                fc2.weight.copy_(_weights(context, record, hidden, ffn)[2])
            module = TrainableActivation(record, group) if own_cast else QuantizingActivation(record, group, fc2)
            module.to(context.device)
            x, dout = context.randn(tokens, ffn, seed=6).bfloat16(), context.randn(tokens, hidden, seed=5).bfloat16()
            x.requires_grad_()
            try:
                for _ in range(3):
                    with autocast(enabled=True, recipe=recipe):
                        y = module(x)
                        out = fc2(y)
                    inputs = [x, fc2.weight, *module.parameters()]
                    results_now = [out.detach(), *torch.autograd.grad(out, inputs, dout)]
            except (NotImplementedError, AssertionError) as error:
                found[recipe_name] = timing.reason(error)
                break
            results.append(results_now)
            kinds.append(type(y).__name__)
        else:
            errors = [_rms(ours, theirs) for theirs, ours in zip(*results, strict=True)]
            found[recipe_name] = {"output of the activation": kinds, "against its own cast": errors}
            data.target(f"te.Linear, {recipe_name}: outputs that stayed in 16 bits", kinds[1] == "Tensor", at_most=0)
            # FP8 rounds by up to 2^-4 with 3 bits of mantissa
            named = dict(zip(("y", "dx", "dw2"), errors, strict=False))
            data.all_at_most(f"te.Linear, {recipe_name}: error beside its own cast", 0.1, named)
    return f"te.Linear beside ours: {sum(isinstance(entry, dict) for entry in found.values())} recipes"


def _largest(ours: Tensor, true: Tensor) -> float:
    return ((ours.double() - true.double()).abs().max() / true.double().abs().max()).item()


def _rms(ours: Tensor, true: Tensor) -> float:
    return ((ours.double() - true.double()).square().mean() / true.double().square().mean()).sqrt().item()


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(context: Context, data: Entries) -> str:
    """Forward and backward of the MLP, ours and TE's activations with as many parameters, in bf16 and each recipe."""
    _needs_te(context)
    sizes = (512, 256, 768) if context.quick else (TOKENS, HIDDEN, FFN)
    data["absent"] = {}
    data["seconds"] = seconds = {}
    for recipe_name, recipe in ({"bf16": None} | _recipes()).items():
        calls = {f"{recipe_name} {label}": step for label, step in _contenders(context, data, *sizes, recipe)}
        for name, times in timing.in_turns(context, calls, REPEATS, data).items():
            seconds[name] = times
            print(f"{name:44}{statistics.median(times) * 1e3:9.3f} ms", flush=True)
        data.save()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    told = []
    for recipe_name in ("bf16", *_recipes()):
        ours = [value for name, value in medians.items() if name.startswith(f"{recipe_name} xielu")]
        theirs = medians.get(f"{recipe_name} TE SReLU")
        told += [f"{recipe_name} {min(ours) / theirs:.3f} x TE SReLU's time"] if ours and theirs else []
    return "MLP forward + backward, xielu: " + ", ".join(told)


def _contenders(
    context: Context, data: Entries, tokens: int, hidden: int, ffn: int, recipe
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(label, a step of it); recipe: of TE's FP8, None: bf16."""
    import transformer_engine.pytorch.ops as ops
    from transformer_engine.pytorch.quantization import autocast

    x = context.randn(tokens, hidden, seed=4).bfloat16().requires_grad_()
    dout = context.randn(tokens, hidden, seed=5).bfloat16()

    def step_of(model):
        parameters = [x, *model.parameters()]

        def step():
            with autocast(enabled=recipe is not None, recipe=recipe):
                y = model(x)
            return torch.autograd.grad(y, parameters, dout)

        return step

    record = activations.get("xielu")
    if recipe is None:
        for way, fused in _ways(record, context, data):
            yield f"xielu {way}", step_of(_mlp(context, record, hidden, ffn, False, fused_linear=fused)[0])
    else:
        for way, cast in (("two passes", False), ("one pass", True)):
            yield f"xielu {way}", step_of(_mlp(context, record, hidden, ffn, False, fused_cast=cast)[0])
    for name, width in (("SReLU", ffn), ("SwiGLU", ffn * 2 // 3)):  # as many parameters
        if not hasattr(ops, name):
            continue
        options = {"device": context.device, "dtype": torch.bfloat16}
        fc1 = ops.BasicLinear(hidden, width * (2 if name == "SwiGLU" else 1), **options)
        fc2 = ops.BasicLinear(width, hidden, **options)
        yield f"TE {name}", step_of(ops.Sequential(fc1, getattr(ops, name)(), fc2))
