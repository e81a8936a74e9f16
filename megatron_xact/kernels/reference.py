"""The records' own formulas, operation by operation: any device, any dtype, no compiler."""

from __future__ import annotations

from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Grads, Values


def forward(activation: Activation, x: Tensor, p: Values) -> Tensor:
    """As `Activation.forward`."""
    return activation.forward(x, p)


def backward(activation: Activation, x: Tensor, p: Values, dy: Tensor) -> tuple[Tensor, Grads]:
    """As `Activation.backward`."""
    return activation.backward(x, p, dy)
