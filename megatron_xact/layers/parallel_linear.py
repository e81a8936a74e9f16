"""What Megatron's parallel linear layers do around their matrix products, for autograd functions that replace these.

Column-parallel fc1, row-parallel fc2: sequences gathered and scattered, input gradients reduced while weight gradients
are computed, weight gradients added into `main_grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Grads
from megatron_xact.kernels.ops import learned_of

if TYPE_CHECKING:
    from megatron_xact.layers.mlp import ActivationMLP


@dataclass(frozen=True)
class Call:
    """What both directions need beside tensors."""

    activation: Activation
    group: ProcessGroup
    sequence_parallel: bool
    accumulate: bool  # weight gradients into main_grad
    tell_hooks: Callable[[Tensor, Tensor | None, Tensor], None]
    hooked: bool  # is there anybody to be told

    def main_grads(self, *weights: Tensor) -> list[Tensor | None]:
        """To be kept beside the saved tensors and not among them, as in Megatron's linears: they are written to."""
        return [getattr(w, "main_grad", None) if self.accumulate else None for w in weights]

    def gather(self, x: Tensor) -> Tensor:
        """The whole sequence; see `start_gathering`."""
        return self._gather(x, async_op=False)[0] if self.sequence_parallel else x

    def start_gathering(self, x: Tensor) -> tuple[Tensor, Work | None]:
        """(the whole sequence once the work is done, that work).

        It lies in Megatron's buffer, which the next to gather one overwrites. Relies on CUDA_DEVICE_MAX_CONNECTIONS=1,
        as Megatron's linears do: a collective is queued before the kernels that are to run beside it.
        """
        return self._gather(x, async_op=True) if self.sequence_parallel else (x, None)

    def _gather(self, x: Tensor, async_op: bool) -> tuple[Tensor, Work | None]:
        size = [x.shape[0] * self.group.size(), *x.shape[1:]]
        whole = get_global_memory_buffer().get_tensor(size, x.dtype, "mpu")
        work = torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=self.group, async_op=async_op)
        return whole, work

    def start_reduction(self, dx: Tensor, x: Tensor) -> tuple[Tensor, Work | None]:
        """(x's gradient once the work is done, that work): the sum over ranks, or this rank's part of it."""
        if self.sequence_parallel:
            local = torch.empty_like(x, memory_format=torch.contiguous_format)
            return local, torch.distributed.reduce_scatter_tensor(local, dx, group=self.group, async_op=True)
        if self.group.size() > 1:
            return dx, torch.distributed.all_reduce(dx, group=self.group, async_op=True)
        return dx, None

    def of_learned(self, sums: Grads, learned: Sequence[Tensor]) -> list[Tensor]:
        """Gradients in the order, shapes and dtypes of the learned parameters."""
        found = zip(learned_of(self.activation, sums), learned, strict=True)
        return [value.reshape(t.shape).to(t.dtype) for value, t in found]


class Function(Protocol):
    """x [s, b, h] ([s/tp, b, h] under sequence parallelism) -> this rank's part of fc2's sum over ranks, [s, b, h]."""

    def __call__(
        self, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, call: Call, *learned: Tensor
    ) -> Tensor: ...


def run(mlp: ActivationMLP, hidden_states: Tensor, function: Function) -> tuple[Tensor, Tensor | None]:
    """As ActivationMLP.forward, with `function` in the place of its two linear layers and the activation."""
    fc1, activation_func, fc2 = mlp.linear_fc1, mlp.activation_func, mlp.linear_fc2
    await_parameters(mlp)
    activation = activation_func.activation
    learned = learned_of(activation, activation_func.differentiable_values())
    call = Call(
        activation, mlp.tp_group, fc1.sequence_parallel, fc1.gradient_accumulation_fusion,
        activation_func.tell_hooks, bool(activation_func._forward_hooks),
    )  # fmt: skip
    out = function(hidden_states, fc1.weight, fc1.bias, fc2.weight, call, *learned)
    if fc2.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(out, group=mlp.tp_group), fc2.bias
    return reduce_from_tensor_model_parallel_region(out, group=mlp.tp_group), fc2.bias


def await_parameters(mlp: ActivationMLP) -> None:
    """DDP's pre-hooks, where the layer's parts are not called as modules: parameters on their way are waited for."""
    for module in (mlp.linear_fc1, mlp.activation_func, mlp.linear_fc2):
        for hook in module._forward_pre_hooks.values():
            hook(module, ())


def rows_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def added_to_main_grad(weight: Tensor, main_grad: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What Megatron's hooks expect in the place of a weight gradient that main_grad has; dtype: of the gradients."""
    weight.main_grad = main_grad
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    # DDP's hook runs on the main backward thread only if there is a gradient; what is in this one is not looked at,
    # unless zero_out_wgrad says that somebody will add it.
    weight.grad_added_to_main_grad = True
    zero = getattr(weight, "zero_out_wgrad", False)
    if megatron_layers.HAVE_TE:
        return megatron_layers.get_dummy_wgrad(list(main_grad.shape), dtype, zero=zero)
    return (torch.zeros if zero else torch.empty)(main_grad.shape, dtype=dtype, device=weight.device)
