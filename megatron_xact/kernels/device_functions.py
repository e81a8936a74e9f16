"""The activations as Triton device functions: the only part of the GPU kernels that differs between activations.

A device function takes x (fp32 block), the effective values of up to three parameters in the order of the record
(fp32 scalars), and EXACT; it returns (f, df/dx, df/dp0, df/dp1, df/dp2). Kernels use what they need of that, and the
compiler drops the rest: forward pays for f alone. In the place of a derivative that does not exist stands x.
`device_function(record)` finds the one of a record.

Everything is fp32 and built from exp2, rsqrt, multiplication and addition, because that is what a GPU has and what
Triton's interpreter can check. Nothing is computed as a difference that cancels: expm1(x) - x, erf, atan and the gates'
tails are polynomials (fitted for the smallest largest relative error, which is in the comments, then rounded to fp32).
EXACT says the result is stored in fp32 or fp16: then exp is a polynomial and a reciprocal gets a step of Newton's,
since a GPU's special functions are off by up to 2 ulps. In bf16 these (and exp's relative error of about |x| 2^-24 for
exp(-|x|)) are as good after rounding: its numbers are too far apart to come close to a root.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.activations.baselines import IDENTITY, RELU2_OF_OUTPUT

MAX_PARAMETERS = 3


# --- building blocks --------------------------------------------------------------------------------------------------
@triton.jit
def exp(x):
    """Plain: relative error about (|x| + 2) 2^-23; 0 where the result is below 2^-126. (tl.exp costs three more.)"""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def exp_of_minus(u, low, EXACT: tl.constexpr):
    """exp(-u) for u >= 0, below 2^-126 too. If EXACT to an ulp, and it is exp(-u + low), |low| < 0.11."""
    if EXACT:
        high = tl.where(u > 110.0, -110.0, -u)  # nan stays nan
        shifted = high * 1.4426950408889634 + 12582912.0  # 1.5 * 2^23: rounds to the nearest integer
        n = shifted - 12582912.0
        r = ((high - n * 0.693359375) + n * 2.12194440e-4) + low  # n ln 2 in two parts, the first of them exact
        # exp(r) = 1 + r + r^2 P(r): relative error 3e-8 for |r| < 0.465. A GPU's exp2 may be off by 2 ulps.
        p = 0.0013753474922850728
        p = p * r + 0.008396842516958714
        p = p * r + 0.04167230427265167
        p = p * r + 0.16666197776794434
        p = p * r + 0.49999961256980896
        p = (r * r * p + r) + 1.0
        n = shifted.to(tl.int32, bitcast=True) - 0x4B400000
        return p * power_of_two(n >> 1) * power_of_two(n - (n >> 1))  # two, of which none is below 2^-126
    h = tl.exp2(u * -0.7213475204444817)  # squared: a GPU's exp2 is 0 below 2^-126, a product is not
    return h * h


@triton.jit
def power_of_two(n):
    """2^n in fp32 for -126 <= n <= 127, int32."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(d, EXACT: tl.constexpr):
    """1/d for d >= 1. The hardware's reciprocal square root comes as one instruction, a division as eight."""
    if EXACT:
        d = tl.where(d > 8.507059173023462e37, 8.507059173023462e37, d)  # 2^126; nan stays nan
    r = tl.math.rsqrt(d)
    r *= r
    return r + r * (1.0 - d * r) if EXACT else r


@triton.jit
def leading_bits(x):
    """x without its last 12 bits: products of two such numbers are exact, and so is the rest."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal_residual(t, u, h):
    """1 - t (1 + 0.35 u), where t is nearly 1 / (1 + 0.35 u) and h = leading_bits(u); with or without FMA."""
    HIGH: tl.constexpr = 0.3499755859375  # HIGH + LOW is 0.35 in fp32, of which HIGH has the leading bits
    LOW: tl.constexpr = 2.440810203552246e-05
    rest = u - h
    product = 0.35 * u
    product_error = ((HIGH * h - product) + HIGH * rest + LOW * h) + LOW * rest
    d = 1.0 + product
    d_error = tl.where(product < 1.0, (1.0 - d) + product, (product - d) + 1.0) + product_error
    t_high, d_high = leading_bits(t), leading_bits(d)
    t_low, d_low = t - t_high, d - d_high
    return (((1.0 - t_high * d_high) - t_high * d_low) - t_low * d_high) - t_low * d_low - t * d_error


@triton.jit
def is_near_zero(x, EXACT: tl.constexpr):
    """Of x <= 0: is expm1_quotient for it? Beyond, in exp(x) - 1 an exp that is off by 2 ulps does no harm."""
    return x > (-1.0 if EXACT else -0.25)


@triton.jit
def expm1_quotient(x, EXACT: tl.constexpr):
    """(expm1(x) - x) / x^2 where x is near zero: relative error 2e-8 if EXACT, else 1e-7."""
    if EXACT:
        p = 0.00013700773706659675
        p = p * x + 0.0013237660750746727
        p = p * x + 0.008300237357616425
        p = p * x + 0.041658915579319
        p = p * x + 0.16666598618030548
        return p * x + 0.5
    p = 0.007669939659535885
    p = p * x + 0.04156417027115822
    p = p * x + 0.16666154563426971
    return p * x + 0.4999999701976776


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def negative_part(x):
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def with_sign_of(magnitude, x):
    return tl.where(x < 0.0, magnitude * -1.0, magnitude)  # Triton's minus is a subtraction from 0


# --- gates: (g, dg/dx, 2g - 1), and what else one has -----------------------------------------------------------------
@triton.jit
def sigmoid_gate(x, EXACT: tl.constexpr):
    """Of the logistic function."""
    u = tl.abs(x)
    e = exp_of_minus(u, 0.0, EXACT)
    s = reciprocal(1.0 + e, EXACT)
    tail = e * s  # of the gate at -u
    if EXACT:  # once more, with the reciprocal's error times the tail only
        tail = e - e * tail
        s = 1.0 - tail
    one_minus_e = tl.where(is_near_zero(-u, EXACT), u - u * u * expm1_quotient(-u, EXACT), 1.0 - e)
    return tl.where(x > 0.0, s, tail), tail * s, with_sign_of(one_minus_e * s, x)


@triton.jit
def normal_gate(x, EXACT: tl.constexpr):
    """Of the normal cdf Phi."""
    u = tl.abs(x)
    if EXACT:  # exp(-u^2/2), with u^2 = h^2 + (u - h)(u + h) and h the leading 12 bits of u, so that h^2 is exact
        u = tl.where(u > 15.0, 15.0, u)  # Phi(-15) is 0 in fp32
        h = leading_bits(u)
        e = exp_of_minus(0.5 * h * h, -0.5 * (u - h) * (u + h), EXACT)
    else:
        e = exp_of_minus(0.5 * u * u, 0.0, EXACT)
    # Phi(-u) = exp(-u^2/2) t P(t): relative error 3e-8 for 0 <= u <= 15
    t = reciprocal(1.0 + 0.35 * u, EXACT)
    last = t  # factor, which makes the reciprocal's error good: t P(t) goes about as t^1.75
    if EXACT:
        last = t + 1.75 * (t * reciprocal_residual(t, u, h))
    p = -0.02916393242776394
    p = p * t + 0.14406083524227142
    p = p * t - 0.25590193271636963
    p = p * t + 0.15939298272132874
    p = p * t - 0.02326388657093048
    p = p * t + 0.1055748239159584
    p = p * t + 0.11981549113988876
    p = p * t + 0.13986434042453766
    p = p * t + 0.13962125778198242
    tail = e * (p * last)
    # erf(u / sqrt 2) = u P(u^2): relative error 1e-9 for 0 <= u <= 1
    v = u * u
    q = -1.530841655039694e-05
    q = q * v + 0.0002269727410748601
    q = q * v - 0.0023726599756628275
    q = q * v + 0.019946645945310593
    q = q * v - 0.13298071920871735
    q = q * v + 0.7978845834732056
    odd = tl.where(u < 1.0, u * q, 1.0 - 2.0 * tail)
    if EXACT:  # where erf is small, it is the more accurate
        tail = tl.where(u < 0.6, 0.5 - 0.5 * odd, tail)
    return tl.where(x > 0.0, 1.0 - tail, tail), e * 0.3989422804014327, with_sign_of(odd, x)


@triton.jit
def arctan_gate(x, EXACT: tl.constexpr):
    """Of atan(x)/pi + 1/2; and x dg/dx, which for large -x nearly cancels g: so both are multiples of the same z."""
    u = tl.abs(x)
    z = tl.where(u > 1.0, reciprocal(u, EXACT), u)
    v = z * z
    # atan(z) = z P(z^2): relative error 2e-8 for 0 <= z <= 1
    p = 0.002849888987839222
    p = p * v - 0.016068626195192337
    p = p * v + 0.042691513895988464
    p = p * v - 0.07504294067621231
    p = p * v + 0.10640934109687805
    p = p * v - 0.14203643798828125
    p = p * v + 0.1999261975288391
    p = p * v - 0.3333307206630707
    p = p * v + 1.0
    z_over_pi = z * 0.3183098861837907
    angle = p * z_over_pi  # atan(z) / pi
    tail = tl.where(u > 1.0, angle, 0.5 - angle)  # g(-u)
    odd = tl.where(u > 1.0, 1.0 - 2.0 * angle, 2.0 * angle)
    r = 1.0 - v * reciprocal(1.0 + v, EXACT)  # 1/(1 + v), with an error that goes down with v
    dg = 0.3183098861837907 * reciprocal(x * x + 1.0, EXACT)
    return tl.where(x > 0.0, 1.0 - tail, tail), dg, with_sign_of(odd, x), with_sign_of(r * z_over_pi, x)


# --- shapes shared by several functions -------------------------------------------------------------------------------
@triton.jit
def self_gated(x, g, dg):
    return x * g, g + x * dg


@triton.jit
def expanded(x, a, g, dg, odd):
    """x (g (1 + 2a) - a)."""
    gate = g * (1.0 + 2.0 * a) - a
    return x * gate, gate + x * (dg * (1.0 + 2.0 * a)), x * odd


@triton.jit
def exponential_left(x, right, dright, a, b, EXACT: tl.constexpr):
    """x (right x + b) for x > 0, with slope dright x + b; a (expm1(x) - x) + b x for x <= 0, and its d/da.

    Near zero that too is x (c x + b). Below, expm1(x) = e - 1 with the coefficients of x joined: -inf gives +inf.
    """
    pos, neg = relu(x), negative_part(x)
    e = exp(neg)
    near = is_near_zero(neg, EXACT)
    quotient = expm1_quotient(neg, EXACT)
    below = a * e + ((b - a) * x - a)
    d_a = tl.where(near, neg * neg * quotient, (e - 1.0) - neg)
    if EXACT:
        f = tl.where(near, x * (x * tl.where(x > 0.0, right, a * quotient) + b), below)
        slope = tl.where(near, neg * (a * (neg * quotient) + a), a * e - a) + (dright * pos + b)
    else:  # rounded to bf16, f asks for less than a sum of many d_a: a quotient within 4e-5, down to -1/16
        c = a * (0.16408810019493103 * neg + 0.49997982382774353)
        f = tl.where(neg > -0.0625, x * (x * tl.where(x > 0.0, right, c) + b), below)
        slope = dright * pos + (a * e + (b - a))
    return f, slope, d_a


@triton.jit
def square_right(x, a, b, left, left_slope):
    """a x^2 + b x for x > 0, with its d/da and d/db; for x <= 0 what is given."""
    pos = relu(x)
    return tl.where(x > 0.0, x * (a * x + b), left), tl.where(x > 0.0, 2.0 * a * x + b, left_slope), pos * pos, pos


# --- one per function: (x, p0, p1, p2) -> (f, slope, df/dp0, df/dp1, df/dp2) ------------------------------------------
@triton.jit
def xielu(x, a_p, a_n, b, EXACT: tl.constexpr = False):
    f, slope, d_n = exponential_left(x, a_p, 2.0 * a_p, a_n, b, EXACT)
    pos = relu(x)
    return f, slope, pos * pos, d_n, x


@triton.jit
def xielu_cubic(x, a_p, a_n, b, EXACT: tl.constexpr = False):
    f, slope, d_n = exponential_left(x, a_p * x, 3.0 * a_p * x, a_n, b, EXACT)
    pos = relu(x)
    return f, slope, pos * pos * pos, d_n, x


@triton.jit
def xiprelu(x, a_p, a_n, b, EXACT: tl.constexpr = False):
    a = tl.where(x > 0.0, a_p, a_n)
    pos, neg = relu(x), negative_part(x)
    return x * (a * x + b), 2.0 * a * x + b, pos * pos, neg * neg, x


@triton.jit
def xielu_neg_silu(x, a_p, b, unused, EXACT: tl.constexpr = False):
    g, dg, _ = sigmoid_gate(x, EXACT)
    left, left_slope = self_gated(x, g, dg)
    f, slope, d_p, d_b = square_right(x, a_p, b, left, left_slope)
    return f, slope, d_p, d_b, x


@triton.jit
def xielu_neg_xsilu(x, a_p, a, b, EXACT: tl.constexpr = False):
    g, dg, odd = sigmoid_gate(x, EXACT)
    left, left_slope, d_a = expanded(x, a, g, dg, odd)
    f, slope, d_p, d_b = square_right(x, a_p, b, left, left_slope)
    return f, slope, d_p, tl.where(x > 0.0, 0.0, d_a), d_b


@triton.jit
def xielu_neg_zero(x, a_p, b, unused, EXACT: tl.constexpr = False):
    f, slope, d_p, d_b = square_right(x, a_p, b, relu(x), 0.0)
    return f, slope, d_p, d_b, x


@triton.jit
def xsilu(x, a, unused, unused_too, EXACT: tl.constexpr = False):
    g, dg, odd = sigmoid_gate(x, EXACT)
    f, slope, d_a = expanded(x, a, g, dg, odd)
    return f, slope, d_a, x, x


@triton.jit
def xgelu(x, a, unused, unused_too, EXACT: tl.constexpr = False):
    g, dg, odd = normal_gate(x, EXACT)
    f, slope, d_a = expanded(x, a, g, dg, odd)
    return f, slope, d_a, x, x


@triton.jit
def xatlu(x, a, unused, unused_too, EXACT: tl.constexpr = False):
    g, _, odd, x_dg = arctan_gate(x, EXACT)
    gate = g * (1.0 + 2.0 * a) - a
    return x * gate, gate + x_dg * (1.0 + 2.0 * a), x * odd, x, x


@triton.jit
def xelu(x, a, unused, unused_too, EXACT: tl.constexpr = False):
    neg = negative_part(x)
    near = is_near_zero(neg, EXACT)
    rest = neg * neg * expm1_quotient(neg, EXACT)
    e = exp_of_minus(tl.abs(neg), 0.0, EXACT)
    f = tl.where(x > 0.0, (1.0 + a) * x, (1.0 + 2.0 * a) * tl.where(near, rest + neg, e - 1.0) - a * x)
    d_a = tl.where(x > 0.0, x, tl.where(near, 2.0 * rest + neg, 2.0 * (e - 1.0) - neg))
    return f, (1.0 + 2.0 * a) * e - a, d_a, x, x


@triton.jit
def expanded_sigmoid(x, a, unused, unused_too, EXACT: tl.constexpr = False):
    g, dg, odd = sigmoid_gate(x, EXACT)
    return g * (1.0 + 2.0 * a) - a, dg * (1.0 + 2.0 * a), odd, x, x


@triton.jit
def expanded_normal(x, a, unused, unused_too, EXACT: tl.constexpr = False):
    g, dg, odd = normal_gate(x, EXACT)
    return g * (1.0 + 2.0 * a) - a, dg * (1.0 + 2.0 * a), odd, x, x


@triton.jit
def expanded_arctan(x, a, unused, unused_too, EXACT: tl.constexpr = False):
    g, dg, odd, _ = arctan_gate(x, EXACT)
    return g * (1.0 + 2.0 * a) - a, dg * (1.0 + 2.0 * a), odd, x, x


@triton.jit
def identity(x, unused, unused_too, unused_either, EXACT: tl.constexpr = False):
    return x, x * 0.0 + 1.0, x, x, x


@triton.jit
def rectified(x, unused, unused_too, unused_either, EXACT: tl.constexpr = False):
    return relu(x), tl.where(x > 0.0, 1.0, 0.0), x, x, x


@triton.jit
def rectified_square(x, unused, unused_too, unused_either, EXACT: tl.constexpr = False):
    pos = relu(x)
    return pos * pos, 2.0 * pos, x, x, x


@triton.jit
def rectified_square_of_output(y, unused, unused_too, unused_either, EXACT: tl.constexpr = False):
    bounded = tl.maximum(y, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)  # rsqrt takes smaller ones for 0
    return y, 2.0 * y * tl.math.rsqrt(bounded), y, y, y


@triton.jit
def silu(x, unused, unused_too, unused_either, EXACT: tl.constexpr = False):
    g, dg, _ = sigmoid_gate(x, EXACT)
    f, slope = self_gated(x, g, dg)
    return f, slope, x, x, x


@triton.jit
def gelu(x, unused, unused_too, unused_either, EXACT: tl.constexpr = False):
    g, dg, _ = normal_gate(x, EXACT)
    f, slope = self_gated(x, g, dg)
    return f, slope, x, x, x


@triton.jit
def gelu_tanh(x, unused, unused_too, unused_either, EXACT: tl.constexpr = False):
    v = x * x
    g, dg, _ = sigmoid_gate(x * (1.5957691216057308 + 0.07135481627260025 * v), EXACT)  # 2 sqrt(2/pi) (1, 0.044715)
    f, slope = self_gated(x, g, dg * (1.5957691216057308 + 0.21406444881780074 * v))
    return f, slope, x, x, x


# The gated linear units apply one of these to the gate half, so functions are found by the record's maths.
_BY_MATHS = {
    activations.get(name).maths: function
    for name, function in {
        "xielu": xielu,
        "xiprelu": xiprelu,
        "xielu_cubic": xielu_cubic,
        "xielu_neg_silu": xielu_neg_silu,
        "xielu_neg_xsilu": xielu_neg_xsilu,
        "xielu_neg_zero": xielu_neg_zero,
        "xsilu": xsilu,
        "xgelu": xgelu,
        "xatlu": xatlu,
        "xelu": xelu,
        "xsilu_glu1": expanded_sigmoid,
        "xgelu_glu1": expanded_normal,
        "xatlu_glu1": expanded_arctan,
        "relu": rectified,
        "relu2": rectified_square,
        "silu": silu,
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
    }.items()
} | {IDENTITY.maths: identity, RELU2_OF_OUTPUT.maths: rectified_square_of_output}


def device_function(activation: Activation) -> triton.JITFunction | None:
    """The device function of a record, or None if it has none here."""
    return _BY_MATHS.get(activation.maths) if len(activation.parameters) <= MAX_PARAMETERS else None
