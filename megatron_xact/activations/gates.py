"""Self-gated functions x g(x), their expanded forms of trainable range, and the gated linear units of both.

g is a gate in (0, 1). The expanded gate g(x) (1 + 2a) - a lies in (-a, 1 + a); a = 0 is the plain one. Each
has two gated linear units: first order, expanded gate(xW) * xV, and second order, activation(xW) * xV. xELU
is not self-gated, so it has no first order. Nothing cancels in a tail or near 0: erfc and atan2 make g for
negative x, and expm1, erf and atan make d gate / da = 2g - 1.

At x = -inf, functions (xELU too) give nan for a = 0 (0 * -inf, as in torch's silu and gelu), else
sign(a) * inf; expanded gates give -a. At x = +inf, functions give +inf while a > -1, gates 1 + a.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_xact.activations.record import Activation, Grads, Parameter, Values

Unary = Callable[[Tensor], Tensor]


def negative_part(x: Tensor) -> Tensor:
    """min(x, 0). Not `clamp`: there autograd at x = 0 depends on the torch version."""
    return torch.where(x > 0, 0.0, x)


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def dsigmoid(x: Tensor) -> Tensor:
    """g (1 - g), where for large x the difference would lose its bits."""
    g = sigmoid(x)  # that of the value: compiled code computes it once
    return g * torch.where(x > 0, torch.exp(-x) * g, 1.0 - g)


def sigmoid_odd(x: Tensor) -> Tensor:
    g = sigmoid(x)
    magnitude = -torch.expm1(-x.abs()) * torch.maximum(g, 1.0 - g)
    return torch.where(x > 0, magnitude, -magnitude)


def normal(x: Tensor) -> Tensor:
    """Phi, the exact gate of GELU."""
    return 0.5 * torch.special.erfc(x * -math.sqrt(0.5))


def dnormal(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))


def normal_odd(x: Tensor) -> Tensor:
    return torch.special.erf(x * math.sqrt(0.5))


def arctan(x: Tensor) -> Tensor:
    """atan(x)/pi + 1/2, as the angle of the point (-x, 1): that keeps its relative accuracy for x -> -inf."""
    return torch.atan2(torch.ones_like(x), -x) * (1.0 / math.pi)


def darctan(x: Tensor) -> Tensor:
    return (1.0 / math.pi) / (x * x + 1.0)


def arctan_odd(x: Tensor) -> Tensor:
    return torch.atan(x) * (2.0 / math.pi)


@dataclass(frozen=True)
class SelfGated:
    """x g(x)."""

    gate: Unary
    dgate: Unary

    def value(self, x: Tensor, p: Values) -> Tensor:
        return x * self.gate(x)

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        return self.gate(x) + x * self.dgate(x), {}


@dataclass(frozen=True)
class ExpandedGate:
    """g(x) (1 + 2a) - a. `odd` is 2g - 1."""

    gate: Unary
    dgate: Unary
    odd: Unary

    def value(self, x: Tensor, p: Values) -> Tensor:
        a = p["a"]
        return self.gate(x) * (1.0 + 2.0 * a) - a

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        return self.dgate(x) * (1.0 + 2.0 * p["a"]), {"a": self.odd(x)}


@dataclass(frozen=True)
class Expanded:
    """x times an expanded gate."""

    inner: ExpandedGate

    def value(self, x: Tensor, p: Values) -> Tensor:
        return x * self.inner.value(x, p)

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        dgate, partials = self.inner.slopes(x, p)
        return self.inner.value(x, p) + x * dgate, {"a": x * partials["a"]}


@dataclass(frozen=True)
class ExpandedELU:
    """(1 + 2a) ELU(x) - a x."""

    def value(self, x: Tensor, p: Values) -> Tensor:
        a = p["a"]
        return torch.where(x > 0, (1.0 + a) * x, (1.0 + 2.0 * a) * torch.expm1(negative_part(x)) - a * x)

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        a = p["a"]
        neg = negative_part(x)
        slope = (1.0 + 2.0 * a) * torch.exp(neg) - a  # 1 + a for x >= 0
        return slope, {"a": torch.where(x > 0, x, 2.0 * torch.expm1(neg) - x)}


SIGMOID = ExpandedGate(sigmoid, dsigmoid, sigmoid_odd)
NORMAL = ExpandedGate(normal, dnormal, normal_odd)
ARCTAN = ExpandedGate(arctan, darctan, arctan_odd)

record = partial(
    Activation,
    parameters=(Parameter("alpha", "a", init=0.0),),
    source="Huang 2024, Expanded Gating Ranges Improve Activation Functions, arXiv:2405.20768",
)
XELU = "Huang & Schlag 2024, Deriving Activation Functions Using Integration, arXiv:2411.13010, A.8"

RECORDS = (
    record("xsilu", "x (s(x) (1 + 2a) - a), s = sigmoid", maths=Expanded(SIGMOID)),
    record("xgelu", "x (Phi(x) (1 + 2a) - a), Phi = normal cdf", maths=Expanded(NORMAL)),
    record("xatlu", "x ((atan(x)/pi + 1/2) (1 + 2a) - a)", maths=Expanded(ARCTAN)),
    record("xelu", "(1 + 2a) ELU(x) - a x", source=XELU, maths=ExpandedELU()),
    record("xsilu_glu1", "(s(x) (1 + 2a) - a) * up", maths=SIGMOID, gated=True, aliases=("xglu",)),
    record("xgelu_glu1", "(Phi(x) (1 + 2a) - a) * up", maths=NORMAL, gated=True),
    record("xatlu_glu1", "((atan(x)/pi + 1/2) (1 + 2a) - a) * up", maths=ARCTAN, gated=True),
    record("xsilu_glu2", "xsilu(x) * up", maths=Expanded(SIGMOID), gated=True, aliases=("xswiglu",)),
    record("xgelu_glu2", "xgelu(x) * up", maths=Expanded(NORMAL), gated=True, aliases=("xgeglu",)),
    record("xatlu_glu2", "xatlu(x) * up", maths=Expanded(ARCTAN), gated=True, aliases=("xatglu",)),
    record("xelu_glu2", "xelu(x) * up", source=XELU, maths=ExpandedELU(), gated=True, aliases=("xeglu",)),
)
