"""FP8 in TransformerEngine's Python layer: who quantizes what, and what is in the tensors; run by operations.py."""

from functools import partial
from types import SimpleNamespace

import torch
from mlps import BATCH, FFN, HIDDEN, ROWS, error, pipeline, plain, randn, run


def recipes() -> dict:
    from transformer_engine.common import recipe

    return {
        "delayed": recipe.DelayedScaling(),
        "current": recipe.Float8CurrentScaling(),
        "blockwise": recipe.Float8BlockScaling(),
    }


def pipelines(counter) -> dict:
    """The pipeline under each recipe: what TE still quantized, and errors against the same with the casts apart."""
    from transformer_engine.pytorch.quantization import autocast

    from megatron_xact import activations

    x, dout = (t.bfloat16() for t in (randn(ROWS, BATCH, HIDDEN), randn(ROWS, BATCH, HIDDEN, seed=9)))
    found = {}
    for name, recipe in recipes().items():
        for activation in ("xielu", "xsilu_glu2"):
            record = activations.get(activation)
            results, counts, amax = {}, {}, {}
            for label, cast in (("apart", False), ("one pass", True)):
                model, parameters = pipeline(record, dtype=torch.bfloat16, fused_cast=cast)
                counter.shapes.clear()
                try:
                    with autocast(enabled=True, recipe=recipe):
                        results[label] = run(model, parameters, x, dout)
                except NotImplementedError as refusal:
                    found[f"{name} refused"] = str(refusal)
                    break
                counts[label] = sorted(counter.shapes)
                if name == "delayed":
                    fc1, _, fc2 = model._module_groups[0]._basic_ops
                    quantizers = fc2.get_quantizer("forward", 0), fc1.get_quantizer("backward", 0)
                    amax[label] = [q.amax.item() for q in quantizers]
            if len(results) < 2:
                continue
            errors = {key: error(results["one pass"][key], results["apart"][key]) for key in results["apart"]}
            exact = plain(record, x.float(), dout.float(), False)
            far = {key: error(results["one pass"][key], exact[key]) for key in exact}
            found[f"{name} {activation}"] = {"apart": errors, "exact": far, "quantized": counts, "amax": amax}
    return found


def override(counter) -> dict:
    """A recipe with a backward pass in 16 bits: casts are TE's, in forward only; none where TE knows no override."""
    from transformer_engine.common.recipe import Float8CurrentScaling
    from transformer_engine.pytorch.quantization import autocast

    from megatron_xact import activations

    if not hasattr(Float8CurrentScaling(), "backward_override"):
        return {}
    record, found = activations.get("xielu"), {}
    x, dout = (t.bfloat16() for t in (randn(ROWS, BATCH, HIDDEN), randn(ROWS, BATCH, HIDDEN, seed=9)))
    for kind in ("high_precision", "dequantized"):
        results = []
        for cast in (False, True):
            model, parameters = pipeline(record, dtype=torch.bfloat16, fused_cast=cast)
            counter.shapes.clear()
            with autocast(enabled=True, recipe=Float8CurrentScaling(backward_override=kind)):
                results.append(run(model, parameters, x, dout))
        same = all(torch.equal(results[0][key], results[1][key]) for key in results[0])
        found[kind] = {"same": same, "quantized": len(counter.shapes)}
    return found


def tensors() -> dict:
    """Our tensors of each kind, as TE's own Python code reads them back; errors against fp32 y."""
    import transformer_engine_torch as tex
    from extension import decoded
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    from megatron_xact import activations
    from megatron_xact.kernels.backends import select_backend
    from megatron_xact.layers.te import quantized
    from megatron_xact.layers.te.quantized import can_quantize, is_non_tn_fp8_gemm_supported, quantized_forward

    e4m3, amax = tex.DType.kFloat8E4M3, torch.tensor([0.25])
    current = partial(Float8CurrentScalingQuantizer, e4m3, "cpu")
    makers = {
        "delayed": partial(Float8Quantizer, torch.tensor(8.0), amax, e4m3),
        "current": partial(current, amax_epsilon=1e-3),
        "current, powers of two": partial(current, force_pow_2_scales=True),
        "blockwise": partial(Float8BlockQuantizer, e4m3, block_scaling_dim=1),
    }
    record = activations.get("xielu")
    x = randn(3, 60, 256, dtype=torch.bfloat16)
    p = {q.symbol: torch.tensor([q.init]) if q.trainable else q.init for q in record.parameters}
    exact, found = record.forward(x.float(), p), {}
    for name, make in makers.items():
        quantizer = make(rowwise=True, columnwise=True)
        one = found[name] = {"can": can_quantize(quantizer, record, x, 256)}
        for internal in (True, False):
            y = quantized_forward(record, x, p, quantizer, rows=True, columns=True, internal=internal)
            label = "internal " if internal else ""
            one[f"{label}class"] = type(y).__name__
            one[f"{label}rows"], one[f"{label}columns"] = (error(decoded(y, c), exact) for c in (False, True))
        if name == "blockwise":
            factors = y._rowwise_scale_inv
            one["TE reads"] = error(y.dequantize(), exact)
            y.update_usage(rowwise_usage=False, columnwise_usage=True)
            one["TE reads columns"] = error(y.dequantize(), exact)
            any_factor = Float8BlockQuantizer(
                e4m3, rowwise=True, columnwise=True, block_scaling_dim=1, force_pow_2_scales=False
            )
            y = quantized_forward(record, x, p, any_factor, rows=True, columns=False, internal=False)
            one["powers of two"] = [whole_exponents(f) for f in (factors, y._rowwise_scale_inv)]
        only = quantized_forward(record, x, p, quantizer, rows=True, columns=False, internal=False)
        one["shape"], one["dtype"] = list(only.shape), str(only.dtype)
    quantized_forward(record, x / 8, p, makers["delayed"](), rows=True, columns=False, internal=False)
    found["amax"], found["largest"] = amax.item(), exact.abs().max().item()  # of all since it was last set to 0
    y = quantized_forward(record, x * 1e-6, p, makers["current"](), rows=True, columns=True, internal=False)
    found["floor"] = y._scale_inv.item() * 448.0
    quantized.is_non_tn_fp8_gemm_supported = lambda: True
    y = quantized_forward(record, x, p, makers["current"](), rows=True, columns=True, internal=False)
    found["on Blackwell"] = [t is None for t in (y._data, y._transpose)]
    quantized.is_non_tn_fp8_gemm_supported = is_non_tn_fp8_gemm_supported
    refused = {
        "2D blocks": Float8BlockQuantizer(e4m3, rowwise=True, columnwise=True, block_scaling_dim=2),
        "epsilon": Float8BlockQuantizer(e4m3, rowwise=True, columnwise=True, block_scaling_dim=1, amax_epsilon=1e-3),
        "none": None,
        "unknown": SimpleNamespace(dtype=e4m3),
    }
    reduced = current()
    reduced.with_amax_reduction = True
    refused["amax over ranks"] = reduced
    found["refused"] = {name: can_quantize(q, record, x, 256) for name, q in refused.items()}
    found["refused"]["eps"] = can_quantize(current(), activations.get("xielu", eps=-1e-6), x, 256)
    blocks = makers["blockwise"](rowwise=True, columnwise=True)
    found["refused"]["columns of no whole block"] = can_quantize(blocks, record, x, 200)
    select_backend("reference")
    found["refused"]["kernels = reference"] = can_quantize(current(), record, x, 256)
    select_backend("auto")
    return found


def whole_exponents(factors: torch.Tensor) -> float:
    """Which share of the factors, but for padding, are powers of two."""
    return (factors[factors > 0].log2() % 1 == 0).float().mean().item()


def between_modules() -> dict:
    """`QuantizingActivation` before a layer with a quantizer, beside the plain module; when it stays in 16 bits."""
    import transformer_engine_torch as tex
    from extension import decoded
    from transformer_engine.common.recipe import Float8CurrentScaling
    from transformer_engine.debug.pytorch.debug_state import TEDebugState
    from transformer_engine.pytorch import cpu_offload
    from transformer_engine.pytorch.distributed import activation_recompute_forward
    from transformer_engine.pytorch.quantization import autocast
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    from megatron_xact import activations
    from megatron_xact.layers.activation import TrainableActivation
    from megatron_xact.layers.te.linear_input import QuantizingActivation

    recipe, alone = Float8CurrentScaling(), SimpleNamespace(size=lambda: 1)
    quantizer = Float8CurrentScalingQuantizer(tex.DType.kFloat8E4M3, "cpu")
    quantizer.internal = True
    follower = SimpleNamespace(
        quantizers={"scaling_fwd": [quantizer]}, fp8_meta={"recipe": recipe}, weight=torch.ones(1, requires_grad=True)
    )
    found, record = {}, activations.get("xielu")
    bias, dy = randn(FFN, seed=4, dtype=torch.bfloat16), randn(ROWS, BATCH, FFN, seed=5, dtype=torch.bfloat16)
    results = []
    for module in (TrainableActivation(record, alone), QuantizingActivation(record, alone, follower)):
        x, b = randn(ROWS, BATCH, FFN, dtype=torch.bfloat16).requires_grad_(), bias.clone().requires_grad_()
        with autocast(enabled=True, recipe=recipe):
            y = module(x, b)
        found[type(module).__name__] = type(y).__name__
        y.backward(dy)
        results.append({"x": x.grad, "bias": b.grad} | {n: p.grad for n, p in module.named_parameters()})
        if type(y) is not torch.Tensor:
            exact = record.forward(x.detach().float() + bias.float(), record.effective(dict(module.named_parameters())))
            found["y"] = [error(decoded(y, columns), exact) for columns in (False, True)]
    found["same gradients"] = all(torch.equal(results[0][key], results[1][key]) for key in results[0])

    def kind(recipe=recipe, enabled=True, x=x, recomputed=False, **changes):
        changed = SimpleNamespace(**(vars(follower) | changes))
        with autocast(enabled=enabled, recipe=recipe), activation_recompute_forward(activation_recompute=recomputed):
            return type(QuantizingActivation(record, alone, changed)(x)).__name__

    delayed = {"recipe": recipes()["delayed"], "fp8_meta": {"recipe": recipes()["delayed"]}}
    delayed["quantizers"] = {"scaling_fwd": [Float8Quantizer(torch.tensor(8.0), torch.zeros(1), tex.DType.kFloat8E4M3)]}
    found["delayed"], found["delayed, recomputed"] = kind(**delayed), kind(**delayed, recomputed=True)
    found["recomputed"] = kind(recomputed=True)
    TEDebugState.debug_enabled = True
    found["debugged"] = kind()
    TEDebugState.debug_enabled = None
    cpu_offload.OFFLOAD_SYNCHRONIZER = object()  # TE's sign that somebody offloads
    found["offloaded"] = kind()
    cpu_offload.OFFLOAD_SYNCHRONIZER = None
    return found | {
        "nothing": kind(x=x[:0]),
        "sharded": kind(fsdp_group=object()),
        "FP8": kind(),
        "first step": kind(quantizers={}),
        "no FP8": kind(enabled=False),
        "other recipe": kind(fp8_meta={"recipe": recipes()["blockwise"]}),
        "own settings": kind(te_quant_params=object()),
        "saves its input": kind(save_original_input=True),
    }


def bf16_layers() -> list[str]:
    """Type of the activation's output in each of four layers under --first-last-layers-bf16, in Megatron's contexts."""
    import transformer_engine_torch as tex
    from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    from megatron_xact import activations
    from megatron_xact.layers.te.linear_input import QuantizingActivation

    config = TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, fp8="hybrid", fp8_recipe="tensorwise",
        first_last_layers_bf16=True, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1,
    )  # fmt: skip
    follower = SimpleNamespace(
        quantizers={"scaling_fwd": [Float8CurrentScalingQuantizer(tex.DType.kFloat8E4M3, "cpu")]},
        fp8_meta={"recipe": get_fp8_recipe(config)},
        weight=torch.ones(1),
    )
    module = QuantizingActivation(activations.get("xielu"), SimpleNamespace(size=lambda: 1), follower)
    kinds = []
    for layer in range(4):
        with get_fp8_context(config, layer):
            kinds.append(type(module(randn(4, 2, FFN, dtype=torch.bfloat16))).__name__)
    return kinds
