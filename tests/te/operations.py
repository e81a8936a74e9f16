"""Runs our operations in TransformerEngine's real Python layer and prints what came out, as one line of JSON.

    python operations.py TE_FOLDER [FOLDER_OF_ITS_REQUIREMENTS]

What it computes is compared here with plain autograd in fp32 or with other ways through TE; what is right is said by
test_te_ops.py. Errors are the largest difference over the largest number.
"""

import itertools
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from mlps import BATCH, HIDDEN, NAMES, ROWS, WAYS, error, forward_ops, pipeline, plain, randn, run
from te_without_gpu import install_whole


def parity() -> dict:
    from megatron_xact import activations

    found = {}
    x, dout = randn(ROWS, BATCH, HIDDEN), randn(ROWS, BATCH, HIDDEN, seed=9)
    for name in NAMES:
        record = activations.get(name)
        for bias in (False, True):
            exact = plain(record, x, dout, bias)
            for way, fused in WAYS.items():
                model, parameters = pipeline(record, bias=bias, fused_linear=fused)
                ours = run(model, parameters, x, dout)
                found[f"{name} {'bias ' * bias}{way}"] = {
                    "errors": {key: error(ours[key], exact[key]) for key in exact},
                    "ops": forward_ops(model),
                }
    return found


def bf16() -> dict:
    """Largest errors against fp32 in bf16, where intermediate results are rounded."""
    from megatron_xact import activations

    record = activations.get("xielu")
    x, dout = (t.bfloat16() for t in (randn(ROWS, BATCH, HIDDEN), randn(ROWS, BATCH, HIDDEN, seed=9)))
    found = {}
    for way, fused in WAYS.items():
        model, parameters = pipeline(record, bias=True, dtype=torch.bfloat16, fused_linear=fused)
        ours = run(model, parameters, x, dout)
        exact = plain(record, x.float(), dout.float(), True)
        found[way] = {key: error(ours[key], exact[key]) for key in exact}
        found[f"{way} dtypes"] = sorted(f"{key} {str(t.dtype).removeprefix('torch.')}" for key, t in ours.items())
    return found


def saved() -> dict:
    """Elements kept for backward beside the parameters, by distinct storage, in units of rows x batch."""
    from megatron_xact import activations

    found = {}
    for name, (way, fused) in itertools.product(("xielu", "relu2"), WAYS.items()):
        model, parameters = pipeline(activations.get(name), fused_linear=fused)
        own = {p.untyped_storage().data_ptr() for p in parameters.values()}
        kept = {}

        def pack(t, own=own, kept=kept):
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.numel()
            return t

        x = randn(ROWS, BATCH, HIDDEN).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
        found[f"{name} {way}"] = sum(kept.values()) / (ROWS * BATCH)
    return found


def bookkeeping() -> dict:
    """main_grad accumulated or overwritten, the flag for Megatron's hooks, what stands in .grad meanwhile."""
    from megatron_xact import activations

    record = activations.get("xielu")
    x, dout = randn(ROWS, BATCH, HIDDEN), randn(ROWS, BATCH, HIDDEN, seed=9)
    exact = plain(record, x, dout, False)
    found = {}
    for way, fused in WAYS.items():
        for overwrite in (False, True):
            model, parameters = pipeline(record, main_grad=True, fused_linear=fused)
            for key in ("w1", "w2"):
                weight = parameters[key]
                weight.main_grad = torch.ones_like(weight)
                weight.grad_added_to_main_grad = False
                weight.overwrite_main_grad = overwrite
                weight.zero_out_wgrad = True
            model(x.clone().requires_grad_()).backward(dout)
            found[f"{way} {'overwrite' if overwrite else 'add'}"] = {
                key: {
                    "error": error(parameters[key].main_grad, exact[key] + (not overwrite)),
                    "flag": parameters[key].grad_added_to_main_grad,
                    "dummy": not parameters[key].grad.any().item(),
                }
                for key in ("w1", "w2")
            } | {"alpha": error(parameters["alpha_p"].grad, exact["alpha_p"])}
    return found


def partial_gradients() -> dict:
    """Which gradients there are when an input, a weight or everything before the activation wants none."""
    from megatron_xact import activations

    found = {}
    for way, fused in WAYS.items():
        for label, frozen, input_too in (
            ("input without", (), True),
            ("w1 frozen", ("w1",), False),
            ("w2 frozen", ("w2",), False),
            ("input and w1", ("w1",), True),
        ):
            model, parameters = pipeline(activations.get("xielu"), fused_linear=fused)
            for name in frozen:
                parameters[name].requires_grad_(False)
            x = randn(ROWS, BATCH, HIDDEN).requires_grad_(not input_too)
            model(x).sum().backward()
            tensors = {"x": x} | parameters
            found[f"{way} {label}"] = sorted(name for name, t in tensors.items() if t.grad is not None)
    return found


def parameters_of_the_operation() -> dict:
    import transformer_engine.pytorch.ops as ops

    from megatron_xact import activations
    from megatron_xact.layers.te.operation import ActivationOperation

    op = ActivationOperation(activations.get("xielu")).bfloat16()
    seen = []
    op.register_forward_hook(lambda module, args, y: seen.append((args[0].shape, y.shape)))
    op(randn(3, 8))
    ops.Sequential(op, ops.Identity())(randn(3, 8))
    return {
        "names": [name for name, _ in op.named_parameters()],
        "dtypes": sorted({str(p.dtype) for p in op.parameters()}),
        "state": sorted(op.state_dict()),
        "hooked": len(seen),
    }


def patterns() -> dict:
    """What `fuse` makes of lists of operations, and the one line it says about those it leaves alone."""
    import transformer_engine.pytorch.ops as ops
    from transformer_engine.common.recipe import Float8CurrentScaling

    from megatron_xact import activations
    from megatron_xact.layers.te import joint
    from megatron_xact.layers.te.operation import ActivationOperation

    record, said = activations.get("xielu"), []
    joint.logger.addHandler(logging.Handler())
    joint.logger.handlers[0].emit = lambda message: said.append(message.getMessage())

    def mlp(fused="unfused", bias=False, options=None, dtype=torch.float32, middle=None):
        parts = [ops.BasicLinear(8, 16, device="cpu", userbuffers_options=options)]
        parts += [ops.Bias(16, device="cpu")] * bias
        parts += [middle or ActivationOperation(record, fused_linear=fused)]
        return [*parts, ops.BasicLinear(16, 8, dtype=dtype, device="cpu")]

    def told(parts, recipe=None):
        return [type(op).__name__ for op in joint.fuse(parts, recipe=recipe)]

    def ours():
        return ActivationOperation(record, fused_linear="unfused")

    row = mlp()
    row[-1].tensor_parallel_mode = "row"
    found = {
        "plain": told(mlp()),
        "bias": told(mlp(bias=True)),
        "two": told(mlp() + [ops.Identity()] + mlp(bias=True)),
        "shared": told([*mlp(), ours(), ops.BasicLinear(8, 8, device="cpu")]),
        "not asked": told(mlp(fused=None)),
        "GELU": told(mlp(middle=ops.GELU())),
        "cut": told(mlp()[:2]),
        "no lines": list(said),
        "userbuffers": told(mlp(options={"comm_name": "fc1"})) + told(mlp(options={"comm_name": "fc1"})),
        "recipe": told(mlp(), recipe=Float8CurrentScaling()),
        "row": told(row),
        "dtypes": told(mlp(dtype=torch.bfloat16)),
    }
    for backend in ("triton", "nonsense"):
        try:
            found[backend] = told(mlp(fused=backend))
        except ValueError as error:
            found[backend] = str(error)
    return found | {"said": said}


def main() -> None:
    warnings.filterwarnings("ignore")
    counter = install_whole(*sys.argv[1:])
    import casts
    from two_ranks import tensor_parallel

    found = {
        "parity": parity(),
        "bf16": bf16(),
        "saved": saved(),
        "bookkeeping": bookkeeping(),
        "partial": partial_gradients(),
        "operation": parameters_of_the_operation(),
        "patterns": patterns(),
        "fp8": casts.pipelines(counter),
        "override": casts.override(counter),
        "tensors": casts.tensors(),
        "between": casts.between_modules(),
        "bf16 layers": casts.bf16_layers(),
    }
    with tempfile.TemporaryDirectory() as folder:
        found["tensor parallel"] = tensor_parallel(Path(folder))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
