"""Activations without parameters, ungated and as gated linear units: the yardsticks for trainable ones."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_xact.activations.gates import SelfGated, dnormal, dsigmoid, normal, sigmoid
from megatron_xact.activations.record import Activation, Grads, Values


@dataclass(frozen=True)
class ReLU:
    """The slope at 0 is 0."""

    def value(self, x: Tensor, p: Values) -> Tensor:
        return torch.relu(x)

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        return (x > 0).to(x.dtype), {}


@dataclass(frozen=True)
class SquaredReLU:
    def value(self, x: Tensor, p: Values) -> Tensor:
        return torch.relu(x) ** 2

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        return 2.0 * torch.relu(x), {}


@dataclass(frozen=True)
class Identity:
    def value(self, x: Tensor, p: Values) -> Tensor:
        return x

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        return torch.ones_like(x), {}


@dataclass(frozen=True)
class SquaredReLUOfOutput:
    """y = max(x, 0)^2 -> y, and SquaredReLU's slope at x: of a rounded y, with half its relative error."""

    def value(self, y: Tensor, p: Values) -> Tensor:
        return y

    def slopes(self, y: Tensor, p: Values) -> tuple[Tensor, Grads]:
        return 2.0 * torch.sqrt(y), {}


def normal_tanh(x: Tensor) -> Tensor:
    """(1 + tanh u) / 2 = sigmoid(2u), which does not cancel for negative x."""
    return torch.sigmoid(_two_u(x))


def dnormal_tanh(x: Tensor) -> Tensor:
    return dsigmoid(_two_u(x)) * (_SCALE * (1.0 + 3.0 * _CUBIC * x * x))


def _two_u(x: Tensor) -> Tensor:
    return _SCALE * (x + _CUBIC * x * x * x)


_SCALE = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715  # both from Hendrycks & Gimpel 2016

SILU = SelfGated(sigmoid, dsigmoid)
GELU = SelfGated(normal, dnormal)
GELU_PAPER = "Hendrycks & Gimpel 2016, Gaussian Error Linear Units, arXiv:1606.08415"
GLU_PAPER = "Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202"

# No activations to train with, so not among the records. With the first, a kernel around an activation does the rest
# alone; with the other, a backward kernel takes the output for the input.
IDENTITY = Activation("identity", "x", "", Identity())
RELU2_OF_OUTPUT = Activation("relu2_of_output", "y", "", SquaredReLUOfOutput())

RECORDS = (
    Activation("relu", "max(x, 0)", "Nair & Hinton 2010, Rectified Linear Units", ReLU(), hf="relu"),
    Activation(
        "relu2",
        "max(x, 0)^2",
        "So et al. 2021, Primer, arXiv:2109.08668",
        SquaredReLU(),
        aliases=("squared_relu",),
        hf="relu2",
        of_output=RELU2_OF_OUTPUT,
    ),
    Activation("gelu", "x Phi(x), Phi = normal cdf", GELU_PAPER, GELU, hf="gelu"),
    Activation(
        "gelu_tanh",
        "x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2",
        GELU_PAPER,
        SelfGated(normal_tanh, dnormal_tanh),
        aliases=("gelu_pytorch_tanh",),
        hf="gelu_pytorch_tanh",
    ),
    Activation("silu", "x s(x), s = sigmoid", GELU_PAPER, SILU, aliases=("swish",), hf="silu"),
    Activation("swiglu", "silu(x) * up", GLU_PAPER, SILU, gated=True, hf="silu"),
    Activation("geglu", "gelu(x) * up", GLU_PAPER, GELU, gated=True, hf="gelu"),
    Activation("reglu", "relu(x) * up", GLU_PAPER, ReLU(), gated=True, hf="relu"),
)
