"""The one door through which layers apply an activation: forward, analytic backward, nothing saved but the input.

Instead of letting autograd trace the formula (which keeps several intermediates of the widest tensor in the model), the
activation is one operator, `xact::activation_forward`, whose gradient is another, `xact::activation_backward`. Both
are known to torch.library, so torch.compile, activation checkpointing and export see single nodes of known shapes.

Autocast changes nothing: the operator runs in the dtype it is given, computes in fp32 or wider and rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Grads, Values
from megatron_xact.kernels import reference
from megatron_xact.kernels.backends import backend_of, select_backend, triton_unavailable_reason
from megatron_xact.kernels.keys import record_of
from megatron_xact.kernels.operators import key_in_graph, library, without_gradient

__all__ = ["apply_activation", "learned_of", "select_backend", "stacked", "triton_unavailable_reason", "values_of"]


def apply_activation(
    activation: Activation,
    x: Tensor,
    p: dict[str, Tensor | float],
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """y = scale * activation(x + bias) with its effective parameters `p` (symbol -> (1,) tensor, or float where fixed).

    x: [..., F] (gated: [..., 2F], gate half first), any float dtype and layout; y: [..., F] in x's dtype. bias: as long
    as x's last dimension. scale: one number per row, x.shape[:-1]. Differentiable once in x, bias, scale and every
    tensor of `p`; a parameter's gradient is the sum over all elements, in the parameter's dtype (fp32).
    """
    if torch._C._are_functorch_transforms_active():  # torch.func (vmap, jvp, ...) differentiates the plain formula
        return reference.forward(activation, x, p, bias, scale)
    return torch.ops.xact.activation_forward(x, learned_of(activation, p), bias, scale, key_in_graph(activation))


library.define("activation_forward(Tensor x, Tensor[] learned, Tensor? bias, Tensor? scale, str key) -> Tensor")
library.define(
    "activation_backward(Tensor dy, Tensor x, Tensor[] learned, Tensor? bias, Tensor? scale, str key)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(library, "activation_forward", "CompositeExplicitAutograd")
def _forward(x: Tensor, learned: list[Tensor], bias: Tensor | None, scale: Tensor | None, key: str) -> Tensor:
    activation = record_of(key)
    return backend_of(activation, x).forward(activation, x, values_of(activation, learned), bias, scale).contiguous()


@torch.library.impl(library, "activation_backward", "CompositeExplicitAutograd")
def _backward(
    dy: Tensor, x: Tensor, learned: list[Tensor], bias: Tensor | None, scale: Tensor | None, key: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, gradients of the learned parameters [n], of bias, of scale); empty where there is none."""
    activation = record_of(key)
    result = backend_of(activation, x).backward(activation, x, values_of(activation, learned), dy, bias, scale)
    dp = stacked(activation, result.parameters, x)
    return result.dx.contiguous(), dp, _like(result.bias, bias, x), _like(result.scale, scale, x)


def learned_of(activation: Activation, p: Values) -> list[Tensor]:
    return [p[q.symbol] for q in activation.trainable]


def values_of(activation: Activation, learned: Sequence[Tensor]) -> dict[str, Tensor | float]:
    """Effective values by symbol, of the learned ones in their order; the others are fixed."""
    values = iter(learned)
    return {q.symbol: next(values) if q.trainable else q.init for q in activation.parameters}


def stacked(activation: Activation, gradients: Grads, x: Tensor) -> Tensor:
    """Those of the learned parameters in their order, [n]."""
    return torch.stack(learned_of(activation, gradients)) if activation.trainable else x.new_empty(0)


def _like(gradient: Tensor | None, tensor: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if gradient is None else gradient.to(tensor.dtype)


@torch.library.register_fake("xact::activation_forward", lib=library)
def _fake_forward(x, learned, bias, scale, key):
    if not record_of(key).gated:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.register_fake("xact::activation_backward", lib=library)
def _fake_backward(dy, x, learned, bias, scale, key):
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(len(learned), dtype=wide) if learned else x.new_empty(0),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
        x.new_empty(0) if scale is None else torch.empty_like(scale),
    )


# asked for by somebody who records gradients in the backward pass: create_graph=True
_call_backward = without_gradient(
    "activation_backward", "activations have no second derivative here; differentiate activation.forward twice"
)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, scale, key, *learned):
        ctx.key = key
        ctx.save_for_backward(x, bias, scale, *learned)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.xact.activation_forward(x, learned, bias, scale, key)

    @staticmethod
    def backward(ctx, dy):
        x, bias, scale, *learned = ctx.saved_tensors
        dx, dp, dbias, dscale = _call_backward(dy, x, learned, bias, scale, ctx.key)
        dlearned = (dp[i].reshape(t.shape).to(t.dtype) for i, t in enumerate(learned))
        return dx, None if bias is None else dbias, None if scale is None else dscale, None, *dlearned


@torch.library.impl(library, "activation_forward", "Autograd")
def _autograd(x, learned, bias, scale, key):
    return _Differentiable.apply(x, bias, scale, key, *learned)
