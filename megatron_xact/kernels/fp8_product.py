"""Matrix products of FP8 operands, and what quantizes these: per-tensor current scaling by powers of two.

Powers of two round nothing, so what a shard loses by being quantized with its own factor, and not with the whole
tensor's, is confined to what a format's range leaves out. On GPUs with FP8 tensor cores (Ada, Hopper and newer) the
product is cuBLASLt's, by torch, with `use_fast_accum` off: Hopper's tensor cores add up with about 14 bits, and every
128 products or so go into an fp32 sum. Elsewhere the operands are widened, exactly: FP8 values are also bf16 values and
products of two of them fp32 values. So a CPU or an A100 computes the same sums, in another order and in fp32 (a GPU
then rounds them to bf16), without FP8's speed: enough to tell what FP8 does to a model.

Suffixes: M, N = outer dimensions, K = inner one; C = columns of a matrix that is quantized.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels import fp8
from megatron_xact.kernels.fp8 import PerTensor, Quantized, gpu_has_fp8
from megatron_xact.kernels.fp8_operators import NO_GRADIENT
from megatron_xact.kernels.operators import library, without_gradient

VALUES = torch.float8_e4m3fn  # of activations and weights
GRADIENTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
MULTIPLE = 16  # of elements, in cuBLASLt's inner and last dimensions


def product(a_MK: Tensor, a_scale_inv: Tensor, b_NK: Tensor, b_scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """(a * a_scale_inv) @ (b * b_scale_inv)^T as [M, N] of this dtype. a, b: FP8, not both e5m2; factors: (1,) fp32."""
    return _call_product(a_MK, a_scale_inv, b_NK, b_scale_inv, dtype)


# operators, as `fp8`'s are: compiled, both would be made of other instructions and have other bits
library.define("fp8_product(Tensor a, Tensor a_scale_inv, Tensor b, Tensor b_scale_inv, ScalarType dtype) -> Tensor")
library.define("fp8_smoothing(Tensor activation_amax, Tensor weight_amax) -> Tensor")


@torch.library.impl(library, "fp8_product", "CompositeExplicitAutograd")
def _product(a_MK, a_scale_inv, b_NK, b_scale_inv, dtype):
    tiles = a_MK.shape[1] % MULTIPLE == b_NK.shape[0] % MULTIPLE == 0
    if a_MK.is_cuda and gpu_has_fp8(a_MK.device) and tiles:
        return torch._scaled_mm(a_MK, b_NK.T, scale_a=a_scale_inv, scale_b=b_scale_inv, out_dtype=dtype)
    wide = torch.bfloat16 if a_MK.is_cuda else torch.float32
    with torch._C._DisableAutocast():  # torch.autocast(..., enabled=False) takes 5 us more (measured on a CPU)
        sums = a_MK.to(wide) @ b_NK.to(wide).T
    return (sums.float() * (a_scale_inv * b_scale_inv)).to(dtype)


@torch.library.register_fake("xact::fp8_product", lib=library)
def _fake_product(a_MK, a_scale_inv, b_NK, b_scale_inv, dtype):
    torch._check(a_MK.shape[1] == b_NK.shape[1], lambda: f"{a_MK.shape} and {b_NK.shape} differ in the inner dimension")
    return a_MK.new_empty(a_MK.shape[0], b_NK.shape[0], dtype=dtype)


def scaling_for(amax: Tensor, dtype: torch.dtype) -> PerTensor:
    """The factor for a tensor whose largest magnitude is amax (1,); of an infinite one NaN.

    Rounding to FP8 saturates: it would make finite, wrong gradients of an overflow, and no step would be skipped.
    """
    return PerTensor(torch.where(amax.isinf(), torch.nan, fp8.factor(amax, dtype, power_of_two=True)))


def scaling_of(value: Tensor, dtype: torch.dtype) -> PerTensor:
    """The factor for this tensor."""
    return scaling_for(fp8.amax(value), dtype)


def quantized(value: Tensor, dtype: torch.dtype, *, rows: bool = False, columns: bool = False) -> Quantized:
    """A tensor [..., C] in FP8, scaled by its own amax."""
    return fp8.cast(value, scaling_of(value, dtype), dtype, rows=rows, columns=columns)


class SecondProduct(NamedTuple):
    """How y and fc2's weight are quantized for y w2^T: factors, and what y's columns are multiplied by and w2's
    divided by first, [F], or None. w2_alone: w2's factor for other products, where it is not divided."""

    y: PerTensor
    w2: PerTensor
    multiplier: Tensor | None
    w2_alone: PerTensor


def second_product(
    activation: Activation, pre: Tensor, p: Values, bias: Tensor | None, w2_HF: Tensor, smooth: bool
) -> SecondProduct:
    """y = activation(pre + bias); smooth: with a multiplier, see `smoothing`."""
    if not smooth:
        amax = fp8.forward_amax(activation, pre, p, bias)
        w2 = scaling_of(w2_HF, VALUES)
        return SecondProduct(scaling_for(amax, VALUES), w2, None, w2)
    y_peaks, w2_peaks = fp8.forward_amax(activation, pre, p, bias, by_column=True), fp8.amax(w2_HF, by_column=True)
    multiplier = smoothing(y_peaks, w2_peaks)
    # of columns multiplied by powers of two, these are the largest exactly
    y, w2, w2_alone = (
        scaling_for(peaks.amax().reshape(1), VALUES)
        for peaks in (y_peaks * multiplier, w2_peaks * (1.0 / multiplier), w2_peaks)
    )
    return SecondProduct(y, w2, multiplier, w2_alone)


def smoothing(activation_amax: Tensor, weight_amax: Tensor) -> Tensor:
    """m [F] of powers of two: y_f m_f and w_f / m_f have the same largest magnitude, within a factor of 2.

    Outliers of a few channels make a per-tensor factor so small that the others fall below FP8's range; half of a
    channel's excess (as a logarithm) moves into the weight, where quantization is as hard then. Xiao et al. 2022,
    SmoothQuant, arXiv:2211.10438, equation 4 with migration strength 1/2; in training, per-channel factors of an MLP's
    output: Fishman et al. 2024, arXiv:2409.12517 (Smooth-SwiGLU). 1 where either side is 0 or not finite.
    """
    return _call_smoothing(activation_amax, weight_amax)


@torch.library.impl(library, "fp8_smoothing", "CompositeExplicitAutograd")
def _smoothing(activation_amax, weight_amax):
    exponent = ((weight_amax.log2() - activation_amax.log2()) / 2).round()
    return torch.where(exponent.isfinite(), exponent, 0.0).clamp(-60, 60).exp2()


@torch.library.register_fake("xact::fp8_smoothing", lib=library)
def _fake_smoothing(activation_amax, weight_amax):
    return torch.empty_like(activation_amax)


_call_product, _call_smoothing = (without_gradient(f"fp8_{name}", NO_GRADIENT) for name in ("product", "smoothing"))
