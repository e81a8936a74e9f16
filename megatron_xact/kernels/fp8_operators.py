"""The operators behind `fp8`: schemas, what runs them, shapes without values, and no gradients.

A scaling is its factor or, blockwise, None and whether the factors are powers of two. The results are the fields of
`Quantized` that were asked for, in their order; a whole tensor's factor comes once, since no two may share memory.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.kernels import fp8_reference, reference
from megatron_xact.kernels.backends import selected, triton_unavailable_reason
from megatron_xact.kernels.fp8_reference import (
    BLOCK,
    DTYPES,
    Blockwise,
    PerTensor,
    Quantized,
    QuantizedBackward,
    Scaling,
    empty,
    largest,
    largest_of_columns,
    quantize,
)
from megatron_xact.kernels.keys import record_of
from megatron_xact.kernels.operators import library, without_gradient
from megatron_xact.kernels.ops import stacked, values_of


def _scaling(scale: Tensor | None, power_of_two: bool) -> Scaling:
    return Blockwise(power_of_two) if scale is None else PerTensor(scale)


def _results(q: Quantized) -> list[Tensor]:
    column_scale_inv = None if q.column_scale_inv is q.row_scale_inv else q.column_scale_inv
    parts = (q.rows_RC, q.columns_CR, q.row_scale_inv, column_scale_inv, q.amax)
    return [part for part in parts if part is not None]


library.define(
    "fp8_forward(Tensor x, Tensor[] learned, Tensor? bias, Tensor? multiplier, Tensor? scale, bool power_of_two,"
    " ScalarType dtype, bool rows, bool columns, str key) -> Tensor[]"
)
library.define(
    "fp8_backward(Tensor dy, Tensor x, Tensor[] learned, Tensor? bias, Tensor? scale, bool power_of_two,"
    " ScalarType dtype, bool rows, bool columns, str key) -> (Tensor[], Tensor, Tensor)"
)
library.define("fp8_forward_amax(Tensor x, Tensor[] learned, Tensor? bias, bool by_column, str key) -> Tensor")
library.define("fp8_backward_amax(Tensor dy, Tensor x, Tensor[] learned, Tensor? bias, str key) -> Tensor")
library.define("fp8_factor(Tensor amax, ScalarType dtype, bool power_of_two) -> Tensor")


@torch.library.impl(library, "fp8_forward", "CompositeExplicitAutograd")
def _forward(x, learned, bias, multiplier, scale, power_of_two, dtype, rows, columns, key):
    _check(x, dtype, rows or columns)
    activation, scaling = record_of(key), _scaling(scale, power_of_two)
    p = values_of(activation, learned)
    if triton := _triton_for(activation, x):
        return _results(triton.forward(activation, x, p, scaling, dtype, rows, columns, bias, multiplier))
    y = reference.forward(activation, _wide(x), p, bias)
    return _results(quantize(y if multiplier is None else y * multiplier, scaling, dtype, rows, columns))


@torch.library.register_fake("xact::fp8_forward", lib=library)
def _fake_forward(x, learned, bias, multiplier, scale, power_of_two, dtype, rows, columns, key):
    _check(x, dtype, rows or columns)
    return _fake(x, record_of(key).output_shape(x.shape), scale, power_of_two, dtype, rows, columns)


@torch.library.impl(library, "fp8_backward", "CompositeExplicitAutograd")
def _backward(dy, x, learned, bias, scale, power_of_two, dtype, rows, columns, key):
    """(dx, gradients of the learned parameters [n], of bias); empty where there is none."""
    activation, scaling = record_of(key), _scaling(scale, power_of_two)
    _check_backward(activation, x, dy, scaling, dtype, rows or columns)
    p = values_of(activation, learned)
    if triton := _triton_for(activation, x):
        back = triton.backward(activation, x, p, dy, scaling, dtype, rows, columns, bias)
    else:
        exact = reference.backward(activation, _wide(x), p, dy, bias)
        back = QuantizedBackward(quantize(exact.dx, scaling, dtype, rows, columns), exact.parameters, exact.bias)
    dbias = x.new_empty(0) if bias is None else back.bias.to(_wide_dtype(x))
    return _results(back.dx), stacked(activation, back.parameters, x), dbias


@torch.library.register_fake("xact::fp8_backward", lib=library)
def _fake_backward(dy, x, learned, bias, scale, power_of_two, dtype, rows, columns, key):
    _check_backward(record_of(key), x, dy, _scaling(scale, power_of_two), dtype, rows or columns)
    wide = _wide_dtype(x)
    dp = x.new_empty(len(learned), dtype=wide) if learned else x.new_empty(0)
    dbias = x.new_empty(0) if bias is None else x.new_empty(x.shape[-1], dtype=wide)
    return _fake(x, x.shape, scale, power_of_two, dtype, rows, columns), dp, dbias


def _fake(x, shape, scale, power_of_two, dtype, rows, columns) -> list[Tensor]:
    q = empty(math.prod(shape[:-1]), shape[-1], x, _scaling(scale, power_of_two), dtype, rows, columns)
    return _results(q) + ([] if scale is None else [x.new_empty(1, dtype=torch.float32)])


@torch.library.impl(library, "fp8_forward_amax", "CompositeExplicitAutograd")
def _forward_amax(x, learned, bias, by_column, key):
    activation = record_of(key)
    p = values_of(activation, learned)
    if triton := _triton_for(activation, x):
        return triton.forward_amax(activation, x, p, bias, by_column)
    y = reference.forward(activation, _wide(x), p, bias)
    return largest_of_columns(y) if by_column else largest(y)


@torch.library.register_fake("xact::fp8_forward_amax", lib=library)
def _fake_forward_amax(x, learned, bias, by_column, key):
    return x.new_empty(record_of(key).output_shape(x.shape)[-1] if by_column else 1, dtype=torch.float32)


@torch.library.impl(library, "fp8_backward_amax", "CompositeExplicitAutograd")
def _backward_amax(dy, x, learned, bias, key):
    activation = record_of(key)
    p = values_of(activation, learned)
    if triton := _triton_for(activation, x):
        return triton.backward_amax(activation, x, p, dy, bias)
    return largest(reference.backward(activation, _wide(x), p, dy, bias).dx)


@torch.library.register_fake("xact::fp8_backward_amax", lib=library)
def _fake_backward_amax(dy, x, learned, bias, key):
    return x.new_empty(1, dtype=torch.float32)


# an operator, as compiled divisions need not round as eager code's do
torch.library.impl(library, "fp8_factor", "CompositeExplicitAutograd")(fp8_reference.factor)


@torch.library.register_fake("xact::fp8_factor", lib=library)
def _fake_factor(amax, dtype, power_of_two):
    return torch.empty_like(amax, dtype=torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(x: Tensor, dtype: torch.dtype, anything: bool) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is no FP8 format; there are {', '.join(map(str, DTYPES))}")
    if x.dim() < 2:
        raise ValueError(f"x of shape {tuple(x.shape)} has no rows; FP8 needs at least two dimensions")
    if not anything:
        raise ValueError("neither rows nor columns are wanted: ask for one of them at least")


def _check_backward(activation, x: Tensor, dy: Tensor, scaling: Scaling, dtype: torch.dtype, anything: bool) -> None:
    _check(x, dtype, anything)
    if activation.gated and isinstance(scaling, Blockwise) and dy.shape[-1] % BLOCK:
        raise ValueError(f"{dy.shape[-1]} columns: blocks of {BLOCK} would join gate and up; use a multiple of it")


def _triton_for(activation: Activation, x: Tensor):
    """The module of the kernels, where they can run; else None."""
    if selected() == "reference" or not x.is_cuda or triton_unavailable_reason() or not gpu_has_fp8(x.device):
        return None
    from megatron_xact.kernels import triton_fp8, triton_launch

    return None if triton_launch.unserved_reason(activation, x.dtype) else triton_fp8


@functools.cache
def gpu_has_fp8(device: torch.device) -> bool:
    """Has it FP8 conversions and tensor cores: Ada, Hopper or newer?"""
    return torch.cuda.get_device_capability(device) >= (8, 9)


NO_GRADIENT = "rounding to FP8 has no derivative: wrap it in an autograd.Function, as layers/fp8_mlp.py does"
call_forward, call_backward, call_forward_amax, call_backward_amax, call_factor = (
    without_gradient(f"fp8_{name}", NO_GRADIENT)
    for name in ("forward", "backward", "forward_amax", "backward_amax", "factor")
)
