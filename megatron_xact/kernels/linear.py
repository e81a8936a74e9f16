"""A linear layer and its activation together, forward and backward: the door over every way to run the two.

"unfused" is always there: torch's matrix product and the kernel of `kernels.ops`, two kernels with the pre-activation
going through memory between them. The others compute the activation on the tile that the matrix product has just made,
while it is in registers. Which one is faster at a shape is for a measurement to say, not for this module.

All of them compute the same: the pre-activation is rounded to the operands' dtype before anything is done with it, so
where two accumulate in the same order their results have the same bits; what is saved for backward is the rounded
pre-activation, without the bias, and nothing else; or the output, of an activation whose slope that alone tells, where
forward then writes nothing else and backward need not make it again. Everything after that is fp32 and rounded once.
Sums over tokens are added in a fixed order without atomics, nothing waits for the GPU, and a CUDA graph may capture any
of it.

Nothing here is differentiable by autograd or knows of tensor parallelism: that is the caller's.

Shape suffixes: M = tokens, H = hidden size, F = width of y (of this rank), W = rows of fc1's weight: F, or 2F where the
activation is gated, gate half first.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Grads, Values
from megatron_xact.kernels.backends import backend_of

UNFUSED = "unfused"
BACKENDS = ("triton", "quack")  # fused; each a module: `unavailable_reason`, `candidates`, `forward` and `backward`
_MODULES = {"triton": "triton_gemm", "quack": "quack_gemm"}
FORWARD, BACKWARD = DIRECTIONS = ("forward", "backward")


class Way(NamedTuple):
    """How an MLP runs: "unfused" or one of BACKENDS, and the names of its tiles; None: the default ones.

    A tile sets the order in which sums over tokens are added: for the same bits, ranks must go the same way.
    """

    backend: str
    forward: str | None = None
    backward: str | None = None


class Forward(NamedTuple):
    """saved: what `backward` is to be given, pre_MW or y_MF itself (see `saves_output`). pre_MW = x @ w1^T rounded to
    x's dtype, without the bias; None where it is not made. y_MF = activation(pre + bias), in x's dtype."""

    saved: Tensor
    y_MF: Tensor
    pre_MW: Tensor | None


class Backward(NamedTuple):
    """What one pass over dout @ w2 leaves.

    dpre_MW: gradient of the pre-activation, in its dtype: input of fc1's data and weight gradients.
    y_MF: the activation's output again, input of fc2's weight gradient, which therefore comes after this; if it is
    what was saved, that tensor.
    parameters: symbol -> sum over all elements, 0-dim, fp32 (of effective values, trainable ones only).
    bias: [W] fp32, the sum of dpre over tokens before it was rounded; None without a bias.
    """

    dpre_MW: Tensor
    y_MF: Tensor
    parameters: Grads
    bias: Tensor | None = None


def unavailable_reason(backend: str, activation: Activation, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `backend` cannot serve this activation for operands of this dtype on this device, in a phrase; None: it can.

    ValueError for a name that is not "unfused" or one of BACKENDS.
    """
    if backend == UNFUSED:
        return None
    try:
        module = _module(backend)
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return module.unavailable_reason(activation, dtype, torch.device(device))


def tiles(backend: str, direction: str, activation: Activation, *tensors: Tensor, bias: bool = False) -> list[str]:
    """Names of a fused backend's tiles, the default first: forward for an x, w1 and y, backward for a dout, w2 and pre
    like these."""
    return [str(tile) for tile in _module(backend).candidates(direction, activation, *tensors, bias=bias)]


def tile_named(name: str | None, candidates: Sequence) -> object:
    """The candidate of that name; else the default, as for a number of tokens that has other candidates.

    Those depend on sizes alone, so that this is the same on every rank.
    """
    return next((tile for tile in candidates if str(tile) == name), candidates[0]) if name else candidates[0]


def saves_output(activation: Activation, dtype: torch.dtype) -> bool:
    """Is y what backward needs, and not the pre-activation? In fp16 never: squares of small numbers are 0 there."""
    return activation.of_output is not None and dtype != torch.float16


def forward(
    backend: str,
    activation: Activation,
    x_MH: Tensor,
    w1_WH: Tensor,
    p: Values,
    bias_W: Tensor | None = None,
    *,
    tile: str | None = None,
    with_pre: bool = False,
) -> Forward:
    """What `Forward` holds. with_pre: makes the pre-activation also where backward does not need it.

    tile: of a fused backend, by name, if it is among `tiles` of these operands; else the default.

    p: effective values by symbol, tensors of one element where learned, numbers where fixed. bias_W: any float dtype,
    added in fp32. ValueError if the shapes do not fit.
    """
    _check(activation, "x", x_MH, "w1", w1_WH, 1, w1_WH.shape[0], bias_W)
    by_output = saves_output(activation, x_MH.dtype)
    if backend != UNFUSED:
        with_pre = with_pre or not by_output
        pre_MW, y_MF = _module(backend).forward(activation, x_MH, w1_WH, p, bias_W, tile, with_pre=with_pre)
    else:
        pre_MW = x_MH @ w1_WH.T
        y_MF = backend_of(activation, pre_MW).forward(activation, pre_MW, p, bias_W).contiguous()
    return Forward(y_MF if by_output else pre_MW, y_MF, pre_MW)


def backward(
    backend: str,
    activation: Activation,
    dout_MH: Tensor,
    w2_HF: Tensor,
    saved: Tensor,
    p: Values,
    bias_W: Tensor | None = None,
    *,
    tile: str | None = None,
) -> Backward:
    """dpre = (dout @ w2) activation'(pre + bias), and what else `Backward` holds; bias_W and tile as in forward, whose
    `saved` this takes.

    A fused backend multiplies the fp32 accumulator of dy = dout @ w2; unfused, dy goes through memory and is rounded
    to dout's dtype first. ValueError if the shapes do not fit.
    """
    _check(activation, "dout", dout_MH, "w2", w2_HF, 0, saved.shape[-1], bias_W)
    rows, width = dout_MH.shape[0], w2_HF.shape[1] * (1 + activation.gated)
    if saved.shape != (rows, width):
        raise ValueError(f"{activation.name}: what was saved has shape {tuple(saved.shape)}, not {(rows, width)}")
    by_output = saves_output(activation, saved.dtype)
    if by_output:  # y has the bias in it, so that adds nothing, and still tells that its gradient is wanted
        activation, bias_W = activation.of_output, None if bias_W is None else torch.zeros_like(bias_W)
    if backend != UNFUSED:
        back = _module(backend).backward(activation, dout_MH, w2_HF, saved, p, bias_W, tile, emit_y=not by_output)
    else:
        dy_MF = dout_MH @ w2_HF
        one = backend_of(activation, saved).backward(activation, saved, p, dy_MF, bias_W, emit_y=not by_output)
        y_MF = None if by_output else one.y.contiguous()
        back = Backward(one.dx.contiguous(), y_MF, one.parameters, one.bias)
    return back._replace(y_MF=saved) if by_output else back


def _module(backend: str):
    if backend not in _MODULES:
        raise ValueError(f"linear backend {backend!r} is not one of {', '.join((UNFUSED, *BACKENDS))}")
    return importlib.import_module(f"megatron_xact.kernels.{_MODULES[backend]}")


def _check(activation: Activation, a_name, a, b_name, b, inner, width, bias) -> None:
    """a [M, H] times b, whose dimension `inner` is H; bias: [width]."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[inner]:
        raise ValueError(
            f"{activation.name}: {a_name} {tuple(a.shape)} and {b_name} {tuple(b.shape)} are not matrices that share "
            "the hidden size; flatten the tokens to one dimension"
        )
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"{activation.name}: {a_name} is {a.dtype} on {a.device}, {b_name} {b.dtype} on {b.device}; cast one"
        )
    if activation.gated and width % 2:
        raise ValueError(f"{activation.name} is gated: {width} columns of the pre-activation have no two halves")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"{activation.name}: bias has shape {tuple(bias.shape)}, not {(width,)}")
