"""The one door through which layers apply an activation: forward, analytic backward, nothing saved but the input.

Instead of letting autograd trace the formula (which keeps several intermediates of the widest tensor in the model),
the activation is one autograd node that keeps the pre-activation and the handful of effective parameters.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.kernels import cpu, reference


def apply_activation(activation: Activation, x: Tensor, p: dict[str, Tensor | float]) -> Tensor:
    """y = activation(x) with its effective parameters `p` (symbol -> (1,) tensor, or float where it is fixed).

    x: [..., F] (gated: [..., 2F], gate half first), any float dtype; y: [..., F] in x's dtype. Differentiable in x
    and in every tensor of `p`; parameter gradients are sums over all elements, in the parameter's dtype (fp32).
    """
    return _ActivationFunction.apply(activation, x, tuple(p), *p.values())


def _backend(activation: Activation, x: Tensor) -> ModuleType:
    # eps asks for the bits of code that rounds after every operation: no fused pass keeps them.
    return cpu if cpu.serves(x) and not activation.eps else reference


class _ActivationFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation: Activation, x: Tensor, symbols: tuple[str, ...], *values: Tensor | float) -> Tensor:
        p = dict(zip(symbols, values, strict=True))
        ctx.activation, ctx.symbols = activation, symbols
        ctx.fixed = {symbol: value for symbol, value in p.items() if not isinstance(value, Tensor)}
        ctx.learned = tuple(symbol for symbol in symbols if symbol not in ctx.fixed)
        ctx.save_for_backward(x, *(p[symbol] for symbol in ctx.learned))
        return _backend(activation, x).forward(activation, x, p)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, *tensors = ctx.saved_tensors
        learned = dict(zip(ctx.learned, tensors, strict=True))
        dx, dp = _backend(ctx.activation, x).backward(ctx.activation, x, learned | ctx.fixed, dy)
        grads = (dp[s].reshape(learned[s].shape).to(learned[s].dtype) if s in learned else None for s in ctx.symbols)
        return None, dx, None, *grads
