"""Builds small models through our layer spec, with TransformerEngine's layers and without, and prints them as JSON.

    python spec.py TE_FOLDER

Of the layer made of TE's operations (`--use-transformer-engine-op-fuser`) the MLP is also run, forward and backward,
and on two ranks with a choice (chosen.py).
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import chosen
from te_without_gpu import install_whole
from two_ranks import on_two_ranks


def build(transformer_impl: str, **options):
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from megatron_xact.layers import specs

    settings = dict(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        normalization="RMSNorm",
        qk_layernorm=True,
        add_bias_linear=False,
        use_cpu_initialization=True,
        transformer_impl=transformer_impl,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    transformer = TransformerConfig(**settings | options)
    config = GPTModelConfig(
        transformer=transformer,
        vocab_size=256,
        seq_length=32,
        position_embedding_type="rope",
        transformer_layer_spec=specs.xielu,
    )
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def describe(model) -> dict:
    mlp = model.decoder.layers[0].mlp
    state = model.sharded_state_dict()
    return {
        "classes": {name: type(child).__name__ for name, child in mlp.named_children()},
        "final_norm": type(model.decoder.final_layernorm).__name__,
        "alpha_dtypes": sorted({str(p.dtype) for p in mlp.activation_func.parameters()}),
        # Extra state is TE's own (FP8 scales); the rest must not depend on the kind of layer.
        "checkpoint": {v.key: list(v.global_shape) for v in state.values() if "_extra_state" not in v.key},
    }


def run_operations(model) -> dict:
    """Megatron's MLP of TE's operations in bf16, apart and joined, against autograd in fp32 through its formula."""
    import torch

    from megatron_xact.layers.te.operation import ActivationOperation

    mlp, found = model.decoder.layers[0].mlp, {}
    record = mlp.activation_func.activation
    x, dout = (torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))

    def exact() -> dict:
        names = {"norm": mlp.linear_fc1.layer_norm_weight, "w1": mlp.linear_fc1.weight, "w2": mlp.linear_fc2.weight}
        names |= dict(mlp.activation_func.named_parameters())
        leaves = {name: p.detach().float().requires_grad_() for name, p in names.items()} | {
            "x": x.clone().requires_grad_()
        }
        normed = torch.nn.functional.rms_norm(leaves["x"], (64,), leaves["norm"], mlp.config.layernorm_epsilon)
        raw = {name: leaves[name] for name in record.initial_raw()}
        y = record.forward(normed @ leaves["w1"].T, record.effective(raw)) @ leaves["w2"].T
        y.backward(dout)
        return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    for way in ("apart", "joint"):
        if way == "joint":
            mlp.activation_func = ActivationOperation(record, mlp.tp_group, fused_linear="unfused")
            mlp._fused_impl = None
        seen = []
        hook = mlp.activation_func.register_forward_hook(lambda m, args, y, seen=seen: seen.append(list(y.shape)))
        own = x.bfloat16().requires_grad_()
        mlp(own)
        awaited = []  # as by DDP, which puts its hooks on every module after the first step
        waiting = [m.register_forward_pre_hook(lambda m, _, a=awaited: a.append(m)) for m in mlp.children()]
        y, bias = mlp(own)
        y.backward(dout.bfloat16())
        for handle in (hook, *waiting):
            handle.remove()
        fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
        ours = {"y": y.detach(), "x": own.grad, "norm": fc1.layer_norm_weight.grad, "w1": fc1.weight.grad}
        ours |= {"w2": fc2.weight.grad} | {name: p.grad for name, p in mlp.activation_func.named_parameters()}
        true = exact()
        (fuser,) = mlp._fused_impl[0]._module_groups
        found[way] = {
            "errors": {n: ((ours[n].float() - true[n]).abs().max() / true[n].abs().max()).item() for n in true},
            "ops": [type(op).__name__ for op, _ in fuser._forward_ops],
            "hooked": seen,
            "awaited": sorted({type(module).__name__ for module in awaited}),
            "bias": bias,
        }
        mlp.zero_grad()
    return found


def recompute_operations() -> dict[str, float]:
    """Largest relative difference of every gradient between that MLP, with biases, as it is and recomputed."""
    import torch
    from megatron.core import tensor_parallel
    from transformer_engine.pytorch.ops.basic import bias

    bias.canonicalize_device = lambda device: torch.device(device or "cpu")  # it asks CUDA for a number
    mlp = build("transformer_engine", use_transformer_engine_op_fuser=True, add_bias_linear=True).decoder.layers[0].mlp
    x, dout = (torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    calls = []

    def counted(own):
        calls.append(None)
        if len(calls) > 3:  # as it is; forward and again in backward
            raise RuntimeError("recomputed without end")
        return mlp(own)

    def gradients(run) -> dict:
        own = x.clone().requires_grad_()
        y, b = run(own)
        (y + b).backward(dout)
        found = {"x": own.grad} | {name: p.grad for name, p in mlp.named_parameters()}
        mlp.zero_grad()
        return found

    plain, again = gradients(counted), gradients(lambda own: tensor_parallel.checkpoint(counted, False, own))
    return {n: ((plain[n] - again[n]).abs().max() / plain[n].abs().max()).item() for n in plain}


def main() -> None:
    warnings.filterwarnings("ignore")
    install_whole(sys.argv[1])
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder:
        found = {"chosen": on_two_ranks(chosen.rank, Path(folder))}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    torch.manual_seed(1)  # of the weights, which are made on the CPU
    model_parallel_cuda_manual_seed(1)
    local = describe(build("local"))
    torch.cuda.is_available = lambda: True  # TE refuses to build modules otherwise
    modules = describe(build("transformer_engine"))
    operations = build("transformer_engine", use_transformer_engine_op_fuser=True)
    found |= {"te": modules, "local": local, "operations": describe(operations), "run": run_operations(operations)}
    found["recomputed"] = recompute_operations()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
