"""The records' own formulas, operation by operation, on any device in any dtype: what every backend computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Grads, Values


class Backward(NamedTuple):
    """Gradients: of x in its dtype; of parameters by symbol (0-dim), bias and scale in fp32 or wider; and y again."""

    dx: Tensor
    parameters: Grads
    bias: Tensor | None = None
    scale: Tensor | None = None
    y: Tensor | None = None


def forward(
    activation: Activation, x: Tensor, p: Values, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """y = scale activation(x + bias) in x's dtype, rounded once.

    bias: one number per column of x (fc1's bias). scale: one per row, x.shape[:-1] (probabilities of a router).
    """
    if bias is None and scale is None:
        return activation.forward(x, p)
    y = activation.forward(_biased(x, bias), p)
    return (y if scale is None else y * scale.unsqueeze(-1)).to(x.dtype)


def backward(
    activation: Activation,
    x: Tensor,
    p: Values,
    dy: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    emit_y: bool = False,
) -> Backward:
    """What `Backward` holds; y, for the gradient of the weight that follows, only with emit_y."""
    parts, dp, dbias, dscale = backward_in_parts(activation, x, p, dy, bias, scale)
    dx = torch.cat(parts, dim=-1) if activation.gated else parts[0]
    return Backward(dx, dp, dbias, dscale, forward(activation, x, p, bias, scale) if emit_y else None)


def backward_in_parts(
    activation: Activation, x: Tensor, p: Values, dy: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Grads, Tensor | None, Tensor | None]:
    """(dx in the parts of `Activation.backward_in_parts`, gradients of parameters, of bias, of scale)."""
    if bias is None and scale is None:
        return *activation.backward_in_parts(x, p, dy), None, None
    z = _biased(x, bias)
    dy = dy.to(z.dtype)
    parts, dp = activation.backward_in_parts(z, p, dy if scale is None else dy * scale.unsqueeze(-1))
    dbias = torch.cat([part.reshape(-1, part.shape[-1]).sum(0) for part in parts]) if bias is not None else None
    dscale = (dy * activation.forward(z, p)).sum(-1) if scale is not None else None
    return tuple(part.to(x.dtype) for part in parts), dp, dbias, dscale


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    return z if bias is None else z + bias
