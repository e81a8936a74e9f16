"""xIELU, xIPReLU and the ablations of the xIELU paper (Table 4), each made of a positive and a negative half.

    f(x) = positive(x) for x > 0, negative(x) for x <= 0

A half and its parameter derivatives are 0 at 0; where both halves have slope b there, f is smooth. The rest
of Table 4 is parameters: fixed alphas (trainable=()), trainable beta (trainable=(..., "beta")), beta=0.0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_xact.activations.gates import SIGMOID, Expanded, SelfGated, dsigmoid, negative_part, sigmoid
from megatron_xact.activations.record import Activation, Grads, Parameter, Pointwise, Values


@dataclass(frozen=True)
class TwoSided:
    positive: Pointwise
    negative: Pointwise

    def value(self, x: Tensor, p: Values) -> Tensor:
        return torch.where(x > 0, self.positive.value(x, p), self.negative.value(negative_part(x), p))

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        right, partials = self.positive.slopes(x.clamp(min=0.0), p)
        left, others = self.negative.slopes(negative_part(x), p)
        for symbol, partial in others.items():  # each is 0 on the other side
            partials[symbol] = partials[symbol] + partial if symbol in partials else partial
        return torch.where(x > 0, right, left), partials


@dataclass(frozen=True)
class Power:
    """a x^degree + b x; `symbol` says which parameter a is."""

    symbol: str
    degree: int

    def value(self, x: Tensor, p: Values) -> Tensor:
        return (p[self.symbol] * x ** (self.degree - 1) + p["b"]) * x

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        lower = x ** (self.degree - 1)
        return self.degree * p[self.symbol] * lower + p["b"], {self.symbol: lower * x, "b": x}


@dataclass(frozen=True)
class Exponential:
    """a_n (expm1(x) - x) + b x for x <= 0, with the coefficients of x joined: -inf gives +inf, not nan."""

    def value(self, x: Tensor, p: Values) -> Tensor:
        return p["a_n"] * torch.expm1(x) + (p["b"] - p["a_n"]) * x

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        e = torch.expm1(x)
        return p["a_n"] * e + p["b"], {"a_n": expm1_minus_x(x, e), "b": x}


@dataclass(frozen=True)
class Zero:
    def value(self, x: Tensor, p: Values) -> Tensor:
        return torch.relu(x)  # x <= 0 here: 0, and nan stays nan

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        return torch.relu(x), {}


def expm1_minus_x(x: Tensor, e: Tensor) -> Tensor:
    """expm1(x) - x for x <= 0, to a few ulps, given e = expm1(x): by Taylor series where e - x cancels.

    At -1 the difference loses 1.5 bits; terms up to x^18 (fp64) or x^11 leave a tail below half an ulp.
    """
    near = x.clamp(min=-1.0)
    last = 18 if x.dtype == torch.float64 else 11
    series = torch.full_like(near, 1.0 / math.factorial(last))
    for k in range(last - 1, 1, -1):
        series = series * near + 1.0 / math.factorial(k)
    return torch.where(x > -1.0, series * near * near, e - x)


def clamped(x: Tensor, p: Values, eps: float) -> Tensor:
    """xIELU as transformers computes it in Python: equal bits for equal effective values, in eager mode.

    Same order of operations, each in x's dtype, every constant rounded to it first. It inherits the flaws:
    off by up to |eps| a_n on (eps, 0], where their autograd has slope b - a_n and ours b, and nan at -inf.
    """

    def constant(v: Tensor | float) -> Tensor:
        return v.to(x.dtype).reshape(()) if isinstance(v, Tensor) else x.new_full((), v)

    a_p, a_n, b, low = (constant(v) for v in (p["a_p"], p["a_n"], p["b"], eps))
    return torch.where(
        x > 0,
        a_p * x * x + b * x,
        (torch.expm1(torch.minimum(x, low)) - x) * a_n + b * x,
    )


ALPHA_P = Parameter("alpha_p", "a_p", init=0.8, lower=0.0)
BETA = Parameter("beta", "b", init=0.5, trainable=False)
PAPER = "Huang & Schlag 2024, Deriving Activation Functions Using Integration, arXiv:2411.13010"
SQUARE = Power("a_p", 2)

RECORDS = (
    Activation(
        "xielu",
        "x > 0: a_p x^2 + b x; x <= 0: a_n (expm1(x) - x) + b x",
        f"{PAPER}, eq. 9",
        TwoSided(SQUARE, Exponential()),
        (ALPHA_P, Parameter("alpha_n", "a_n", init=0.8, lower="beta"), BETA),
        hf="xielu",
        clamped=clamped,
    ),
    Activation(
        "xiprelu",
        "x > 0: a_p x^2 + b x; x <= 0: a_n x^2 + b x",
        f"{PAPER}, eq. 12",
        TwoSided(SQUARE, Power("a_n", 2)),
        (ALPHA_P, Parameter("alpha_n", "a_n", init=0.8, lower=0.0), BETA),
    ),
    Activation(
        "xielu_cubic",
        "x > 0: a_p x^3 + b x; x <= 0: a_n (expm1(x) - x) + b x",
        f"{PAPER}, Table 4",
        TwoSided(Power("a_p", 3), Exponential()),
        (ALPHA_P, Parameter("alpha_n", "a_n", init=0.8, lower="beta"), BETA),
    ),
    Activation(
        "xielu_neg_silu",
        "x > 0: a_p x^2 + b x; x <= 0: x s(x), s = sigmoid",
        f"{PAPER}, Table 4",
        TwoSided(SQUARE, SelfGated(sigmoid, dsigmoid)),
        (ALPHA_P, BETA),
    ),
    Activation(
        "xielu_neg_xsilu",
        "x > 0: a_p x^2 + b x; x <= 0: x (s(x) (1 + 2a) - a), s = sigmoid",
        f"{PAPER}, Table 4",
        TwoSided(SQUARE, Expanded(SIGMOID)),
        (ALPHA_P, Parameter("alpha", "a", init=0.0), BETA),
    ),
    Activation(
        "xielu_neg_zero",
        "x > 0: a_p x^2 + b x; x <= 0: 0",
        f"{PAPER}, Table 4",
        TwoSided(SQUARE, Zero()),
        (ALPHA_P, BETA),
    ),
)
