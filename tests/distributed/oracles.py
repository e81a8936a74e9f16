"""What tests hold an activation to, stated once and apart from its record: formula, bounds, limits, special functions.

A formula is written from its paper, as the terms whose sum is the value, in effective values by parameter name. It is
read twice: with mpmath's numbers, at 80 digits, as the truth about value and slopes (tests/unit); and with torch's fp64
tensors, of raw parameters, differentiated by autograd (the unsharded twins in tests/distributed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

import pytest
import torch
from mpmath import mp
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation

INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Oracle:
    """terms:             (x, **effective values by name) -> the terms whose sum is f(x); of gated ones f of the gate.
    limits:            (**effective values by name) -> (f(-inf), f(inf)), NAN where the record gives that.
    special_functions: instructions per element of y, (forward, backward), where the result is 16 bits wide: one for an
                       exp2, a rsqrt or `reciprocal` of the device function.
    above:             by name, the bound of effective = bound + softplus(raw): a number or a parameter's name.
    fixed:             by name, what is not trained, and its value.
    conditioning:      (x) -> how many times the largest term's rounding a correct computation may be off by.
    """

    terms: Callable[..., list]
    limits: Callable[..., tuple[float, float]] | None = None
    special_functions: tuple[int, int] | None = None
    above: Mapping[str, float | str] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    conditioning: Callable = lambda x: 1 + 0 * x

    def of_raw(self, x: Tensor, **raw: Tensor) -> Tensor:
        """f(x), differentiable; raw: by name, of the learned parameters."""
        p = {**self.fixed, **raw}
        for name, bound in self.above.items():
            p[name] = (p[bound] if isinstance(bound, str) else bound) + torch.nn.functional.softplus(p[name])
        return sum(self.terms(x, **p))


def unfit(record: Activation) -> str | None:
    """What a record's oracle lacks, or where it says something else, in one line; None if nothing."""
    here = "in tests/distributed/oracles.py"
    if record.name not in ORACLES:
        return f"{record.name} has no oracle: add its formula to ORACLES {here}"
    oracle = ORACLES[record.name]
    for key in ("limits", "special_functions"):
        if getattr(oracle, key) is None:
            return f"{record.name}: its oracle has no {key}; add them {here}"
    above = {q.name: q.lower for q in record.parameters if q.lower is not None}
    fixed = {q.name: q.init for q in record.parameters if not q.trainable}
    for key, ours, theirs in (("above", above, oracle.above), ("fixed", fixed, oracle.fixed)):
        if ours != theirs:
            return f"{record.name}: {key} is {ours} by its record and {theirs} by its oracle {here}"
    return None


def oracle_of(name: str) -> Oracle:
    """Skips the calling test where it is unfit: of that, one test fails (test_nothing_is_missing), not all."""
    if reason := unfit(activations.get(name)):
        pytest.skip(reason)
    return ORACLES[name]


# --- functions of an mpmath number or of a tensor ---------------------------------------------------------------------
def both(of_tensor: Callable, of_number: Callable) -> Callable:
    return lambda x: of_tensor(x) if isinstance(x, Tensor) else of_number(x)


exp, expm1, tanh = both(torch.exp, mp.exp), both(torch.expm1, mp.expm1), both(torch.tanh, mp.tanh)
normal = both(torch.special.ndtr, mp.ncdf)
arctan = both(lambda x: torch.atan(x) / math.pi + 0.5, lambda x: mp.atan(x) / mp.pi + 0.5)


def sigmoid(x):
    return 1 / (1 + exp(-x))


def two_sided(right: Callable[..., list], left: Callable[..., list]) -> Callable[..., list]:
    """The terms of right for x > 0, of left for x <= 0; neither sees an x of the other side."""

    def terms(x, **p):
        if not isinstance(x, Tensor):
            return right(x, **p) if x > 0 else left(x, **p)
        sides = right(torch.where(x > 0, x, 1.0), **p), left(torch.where(x > 0, -1.0, x), **p)
        return [torch.where(x > 0, r, s) for r, s in zip_longest(*sides, fillvalue=0.0)]

    return terms


# --- shapes shared by several formulas --------------------------------------------------------------------------------
def positive(x, alpha_p, beta, **others):
    return [alpha_p * x**2, beta * x]


def cubic(x, alpha_p, beta, **others):
    return [alpha_p * x**3, beta * x]


def exponential(x, alpha_n, beta, **others):
    return [alpha_n * expm1(x), -alpha_n * x, beta * x]


def square(x, alpha_n, beta, **others):
    return [alpha_n * x * x, beta * x]


def zero(x, **others):
    return [0 * x]


def plain(g):
    return lambda x, **others: [x * g(x)]


def gate(g):
    return lambda x, alpha: [g(x) * (1 + 2 * alpha), -alpha]


def expanded(g):
    return lambda x, alpha, **others: [x * g(x) * (1 + 2 * alpha), -alpha * x]


def gelu_tanh(x):
    scale = both(lambda x: math.sqrt(2 / math.pi), lambda x: mp.sqrt(2 / mp.pi))(x)
    return [x / 2, x / 2 * tanh(scale * (x + 0.044715 * x**3))]


xelu = two_sided(
    lambda x, alpha: [(1 + 2 * alpha) * x, -alpha * x], lambda x, alpha: [(1 + 2 * alpha) * expm1(x), -alpha * x]
)
relu = two_sided(lambda x: [x], zero)
relu2 = two_sided(lambda x: [x**2], zero)


# --- limits, and the conditioning of a gate ---------------------------------------------------------------------------
def to(low: float, high: float) -> Callable[..., tuple[float, float]]:
    return lambda **others: (low, high)


def of_gate(alpha):
    return -alpha, 1 + alpha


def of_product(alpha=0.0, **others):
    """x g(x): 0 * inf at -inf, where nothing expands g."""
    return math.copysign(INF, alpha) if alpha else NAN, INF


def squared_exponent(x):
    """A gate made of exp(-x^2/2) carries the rounding of that argument in its tail: x^2/2 ulps."""
    return 1 + x * x


# --- one per activation -----------------------------------------------------------------------------------------------
ALPHA_P, BETA = {"alpha_p": 0.0}, {"beta": 0.5}
ALPHAS = {"alpha_p": 0.0, "alpha_n": 0.0}
ALPHA_N_ABOVE_BETA = {"alpha_p": 0.0, "alpha_n": "beta"}
SIGMOID = (2, 2)  # an exp and a reciprocal
NORMAL = (2, 2)  # the same
ARCTAN = (1, 2)  # a reciprocal, and 1/(1 + x^2)
EXP = (1, 1)
NONE = (0, 0)

ORACLES = {
    "xielu": Oracle(two_sided(positive, exponential), to(INF, INF), EXP, ALPHA_N_ABOVE_BETA, BETA),
    "xiprelu": Oracle(two_sided(positive, square), to(INF, INF), NONE, ALPHAS, BETA),
    "xielu_cubic": Oracle(two_sided(cubic, exponential), to(INF, INF), EXP, ALPHA_N_ABOVE_BETA, BETA),
    "xielu_neg_silu": Oracle(two_sided(positive, plain(sigmoid)), of_product, SIGMOID, ALPHA_P, BETA),
    "xielu_neg_xsilu": Oracle(two_sided(positive, expanded(sigmoid)), of_product, SIGMOID, ALPHA_P, BETA),
    "xielu_neg_zero": Oracle(two_sided(positive, zero), to(0.0, INF), NONE, ALPHA_P, BETA),
    "xsilu": Oracle(expanded(sigmoid), of_product, SIGMOID),
    "xgelu": Oracle(expanded(normal), of_product, NORMAL, conditioning=squared_exponent),
    "xatlu": Oracle(expanded(arctan), of_product, ARCTAN),
    "xelu": Oracle(xelu, of_product, EXP),
    "xsilu_glu1": Oracle(gate(sigmoid), of_gate, SIGMOID),
    "xgelu_glu1": Oracle(gate(normal), of_gate, NORMAL, conditioning=squared_exponent),
    "xatlu_glu1": Oracle(gate(arctan), of_gate, ARCTAN),
    "xsilu_glu2": Oracle(expanded(sigmoid), of_product, SIGMOID),
    "xgelu_glu2": Oracle(expanded(normal), of_product, NORMAL, conditioning=squared_exponent),
    "xatlu_glu2": Oracle(expanded(arctan), of_product, ARCTAN),
    "xelu_glu2": Oracle(xelu, of_product, EXP),
    "relu": Oracle(relu, to(0.0, INF), NONE),
    "relu2": Oracle(relu2, to(0.0, INF), NONE),
    "gelu": Oracle(plain(normal), of_product, NORMAL, conditioning=squared_exponent),
    "gelu_tanh": Oracle(gelu_tanh, of_product, SIGMOID, conditioning=squared_exponent),
    "silu": Oracle(plain(sigmoid), of_product, SIGMOID),
    "swiglu": Oracle(plain(sigmoid), of_product, SIGMOID),
    "geglu": Oracle(plain(normal), of_product, NORMAL, conditioning=squared_exponent),
    "reglu": Oracle(relu, to(0.0, INF), NONE),
}
