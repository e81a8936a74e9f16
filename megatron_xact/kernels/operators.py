"""What the package's operators are registered with at torch.library, and its rules for them that are not one's alone.

They are defined key by key, and not by torch.library.custom_op, whose generic wrappers cost 130 us more per layer,
forward and backward (measured on a CPU), which a small model feels. torch.library.opcheck holds both to the same rules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import arg_tree_leaves, tree_flatten, tree_unflatten

from megatron_xact.activations import Activation
from megatron_xact.kernels.keys import key_of

library = torch.library.Library("xact", "DEF")


def key_in_graph(activation: Activation) -> str:
    return activation.key if torch.compiler.is_compiling() else key_of(activation)


def without_gradient(name: str, why: str) -> Callable:
    """The way to call an operator that cannot be differentiated; who tries gets NotImplementedError(why).

    So does who transforms it by torch.func.
    """
    operator = getattr(torch.ops.xact, name).default

    @torch.library.impl(library, name, "Autograd")
    def recorded(*args):
        with torch._C._AutoDispatchBelowAutograd():
            results = operator(*args)
        if not torch.is_grad_enabled():
            return results
        inputs = [t for t in arg_tree_leaves(*args) if isinstance(t, Tensor) and t.requires_grad]
        if not inputs:
            return results
        tensors, structure = tree_flatten(results)
        return tree_unflatten(_NoGradient.apply(why, tensors, *inputs), structure)

    def call(*args):
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(f"torch.func (vmap, grad, jvp, ...) cannot transform xact::{name}; {why}")
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return operator(*args)
        with torch._C._AutoDispatchBelowAutograd():  # spares that kernel's 5 us (measured on a CPU)
            return operator(*args)

    return call


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, why, tensors, *inputs):
        ctx.why = why
        return tuple(tensors)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(ctx.why)
