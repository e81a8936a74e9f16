"""The MLP that the programs of this folder run: of TransformerEngine's operations, and by autograd in fp32."""

import torch

ROWS, BATCH, HIDDEN, FFN = 64, 2, 256, 128  # small enough for kernels.cpu to leave alone what it would compile
NAMES = ("xielu", "xsilu_glu2", "relu2")  # two parameters; gated, with one; none
WAYS = {"apart": None, "joint": "unfused"}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(a, b) -> float:
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30)).item()


def weights(record, dtype=torch.float32):
    width = FFN * (1 + record.gated)
    w1 = randn(width, HIDDEN, seed=1, dtype=dtype) / HIDDEN**0.5
    return w1, randn(width, seed=2, dtype=dtype), randn(HIDDEN, FFN, seed=3, dtype=dtype) / FFN**0.5


def pipeline(record, *, bias=False, dtype=torch.float32, main_grad=False, **options):
    """(Sequential, {name: parameter}) of BasicLinear, (Bias), ours, BasicLinear."""
    import transformer_engine.pytorch.ops as ops

    from megatron_xact.layers.te.operation import ActivationOperation

    w1, b1, w2 = weights(record, dtype)
    fc1 = ops.BasicLinear(HIDDEN, w1.shape[0], dtype=dtype, device="cpu", accumulate_into_main_grad=main_grad)
    fc2 = ops.BasicLinear(FFN, HIDDEN, dtype=dtype, device="cpu", accumulate_into_main_grad=main_grad)
    activation = ActivationOperation(record, **options)
    parts = [fc1, activation, fc2]
    with torch.no_grad():
        fc1.weight.copy_(w1), fc2.weight.copy_(w2)
        parameters = {"w1": fc1.weight, "w2": fc2.weight} | dict(activation.named_parameters())
        if bias:
            parts.insert(1, ops.Bias(w1.shape[0], dtype=dtype, device="cpu"))
            parts[1].bias.copy_(b1)
            parameters["bias"] = parts[1].bias
    return ops.Sequential(*parts), parameters


def run(model, parameters, x, dout) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(dout)
    gradients = {name: p.grad.clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return {"y": y.detach(), "x": x.grad} | gradients


def plain(record, x, dout, bias) -> dict[str, torch.Tensor]:
    """The same by autograd through the record's formula."""
    w1, b1, w2 = (w.requires_grad_() for w in weights(record))
    raw = {name: torch.full((1,), value, requires_grad=True) for name, value in record.initial_raw().items()}
    x = x.detach().clone().requires_grad_()
    pre = x @ w1.T + b1 if bias else x @ w1.T
    y = record.forward(pre, record.effective(raw)) @ w2.T
    y.backward(dout)
    found = {"y": y.detach(), "x": x.grad, "w1": w1.grad, "w2": w2.grad} | {n: t.grad for n, t in raw.items()}
    return found | ({"bias": b1.grad} if bias else {})


def forward_ops(model) -> list[str]:
    """What TE's fuser made of the pipeline."""
    (fuser,) = model._module_groups
    return [type(op).__name__ for op, _ in fuser._forward_ops]
