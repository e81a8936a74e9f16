"""An MLP whose six matrix products have FP8 operands, without TransformerEngine: `[xact] mlp = "fp8"`. Experimental.

e4m3 for the layer's input, the weights and the activation's output; e4m3 or e5m2 for gradients; fp32 accumulation. Each
operand is scaled by its own amax, to a power of two (`kernels.fp8_product`). The activation and its derivatives are
fp32, of the 16-bit pre-activation, and leave already cast. Saved are the layer's input and the pre-activation; weights
and operands that are needed transposed are quantized again in the backward pass.

With `smooth`, the activation's output is multiplied by one factor per channel before the cast, and fc2's weight by its
inverse (`fp8_product.smoothing`); fc2's own gradient is divided by it again. The function is the same, its outliers
are less.

torch.compile makes one graph of it, with the bits of eager code, on one tensor-parallel rank and where weight gradients
are not added into main_grad. Which way a layer goes must be decided by then: its first call is to be an eager one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_xact.kernels import fp8
from megatron_xact.kernels.backends import backend_of
from megatron_xact.kernels.fp8 import PerTensor
from megatron_xact.kernels.fp8_product import (
    GRADIENTS,
    VALUES,
    product,
    quantized,
    scaling_for,
    scaling_of,
    second_product,
)
from megatron_xact.kernels.ops import values_of
from megatron_xact.layers.parallel_linear import Call, Function, added_to_main_grad, rows_of


@dataclass(frozen=True)
class Settings:
    """Of [fp8]. gradients: a key of `fp8_product.GRADIENTS`."""

    smooth: bool = False
    gradients: str = "e4m3"


_selected = Settings()


def select(settings: Settings) -> None:
    """For the whole process."""
    global _selected
    _selected = settings


def function() -> Function:
    return functools.partial(_FP8MLP.apply, _selected)


class _FP8MLP(torch.autograd.Function):
    """A `parallel_linear.Function`. Suffixes: M = tokens, H = hidden, F = ffn on this rank, W = F (gated: 2F)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, settings, x, w1_WH, b1, w2_HF, call, *learned):
        ctx.settings, ctx.call = settings, call
        ctx.main_grads = call.main_grads(w1_WH, w2_HF)
        whole = call.gather(x)
        activation, p = call.activation, values_of(call.activation, learned)

        rows = rows_of(whole)
        x_scaling, w1_scaling = scaling_of(rows, VALUES), scaling_of(w1_WH, VALUES)
        x8, w8 = fp8.cast(rows, x_scaling, VALUES, columns=False), fp8.cast(w1_WH, w1_scaling, VALUES, columns=False)
        pre_MW = product(x8.rows_RC, x8.row_scale_inv, w8.rows_RC, w8.row_scale_inv, x.dtype)
        if call.hooked:
            call.tell_hooks(pre_MW, b1, backend_of(activation, pre_MW).forward(activation, pre_MW, p, b1))

        y_scaling, w2_scaling, m_F, w2_alone = second_product(activation, pre_MW, p, b1, w2_HF, settings.smooth)
        y8 = fp8.forward(activation, pre_MW, p, y_scaling, VALUES, columns=False, bias=b1, multiplier=m_F)
        w8 = fp8.cast(w2_HF, w2_scaling, VALUES, columns=False, multiplier=None if m_F is None else 1.0 / m_F)
        out_MH = product(y8.rows_RC, y8.row_scale_inv, w8.rows_RC, w8.row_scale_inv, x.dtype)
        scales = x_scaling.scale, w1_scaling.scale, y_scaling.scale, w2_alone.scale
        ctx.save_for_backward(x, pre_MW, w1_WH, b1, w2_HF, *scales, m_F, *learned)
        return out_MH.view(*whole.shape[:-1], w2_HF.shape[0])

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx, dout):
        x, pre_MW, w1_WH, b1, w2_HF, x_scale, w1_scale, y_scale, w2_scale, m_F, *learned = ctx.saved_tensors
        call: Call = ctx.call
        activation, p = call.activation, values_of(call.activation, learned)
        whole, gathering = call.start_gathering(x)
        gradients = GRADIENTS[ctx.settings.gradients]

        dout8 = quantized(rows_of(dout), gradients, rows=True, columns=True)
        w8 = fp8.cast(w2_HF, PerTensor(w2_scale), VALUES, rows=False)
        dy_MF = product(dout8.rows_RC, dout8.row_scale_inv, w8.columns_CR, w8.column_scale_inv, x.dtype)
        dpre_scaling = scaling_for(fp8.backward_amax(activation, pre_MW, p, dy_MF, b1), gradients)
        back = fp8.backward(activation, pre_MW, p, dy_MF, dpre_scaling, gradients, bias=b1)
        dpre8 = back.dx
        y8 = fp8.forward(activation, pre_MW, p, PerTensor(y_scale), VALUES, rows=False, bias=b1, multiplier=m_F)
        dw2 = _weight_gradient(w2_HF, ctx.main_grads[1], dout8, y8, call, m_F)

        w8 = fp8.cast(w1_WH, PerTensor(w1_scale), VALUES, rows=False)
        dx_MH = product(dpre8.rows_RC, dpre8.row_scale_inv, w8.columns_CR, w8.column_scale_inv, x.dtype)
        if gathering is not None:
            gathering.wait()
        dx, reducing = call.start_reduction(dx_MH.view(whole.shape), x)
        x8 = fp8.cast(rows_of(whole), PerTensor(x_scale), VALUES, rows=False)
        dw1 = _weight_gradient(w1_WH, ctx.main_grads[0], dpre8, x8, call)
        if reducing is not None:
            reducing.wait()
        db1 = None if b1 is None else back.bias.to(b1.dtype)
        return None, dx, dw1, db1, dw2, None, *call.of_learned(back.parameters, learned)


def _weight_gradient(
    weight: Tensor, main_grad: Tensor | None, dy8: fp8.Quantized, x8: fp8.Quantized, call: Call,
    multiplier: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """dy^T x, its columns divided by x's multiplier; or, added into main_grad, what Megatron's hooks expect instead."""
    dtype = main_grad.dtype if call.accumulate else weight.dtype
    dw = product(dy8.columns_CR, dy8.column_scale_inv, x8.columns_CR, x8.column_scale_inv, dtype)
    if multiplier is not None:
        dw /= multiplier  # powers of two
    if not call.accumulate:
        return dw
    main_grad.add_(dw)
    return added_to_main_grad(weight, main_grad, weight.dtype)
