"""A trainable activation as a module: fp32 parameters that stay fp32, replicated over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.kernels.ops import apply_activation
from megatron_xact.layers.tensor_parallel import sum_gradients_over_tensor_parallel


class TrainableActivation(torch.nn.Module):
    """`activation` with its raw parameters, each of shape (1,) and fp32 (DESIGN.md, decisions 3 and 4).

    Inside an MLP the parameters are named `mlp.activation_func.alpha_p` and so on: the names, shapes ([1] per layer,
    [L, 1] in a distributed checkpoint) and raw values that existing xIELU checkpoints use.
    """

    def __init__(self, activation: Activation, tp_group: torch.distributed.ProcessGroup):
        super().__init__()
        self.activation = activation
        self.tp_group = tp_group
        for name, raw in activation.initial_raw().items():
            self.register_parameter(name, torch.nn.Parameter(torch.full((1,), raw, dtype=torch.float32)))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [s, b, F/tp] (gated: [s, b, 2 F/tp], gate half first), bias: x's last dimension -> [s, b, F/tp]."""
        return apply_activation(self.activation, x, self.differentiable_values(), bias=bias)

    def differentiable_values(self) -> dict[str, Tensor | float]:
        """Effective values by symbol; gradients that come back into them are summed over the tensor-parallel ranks."""
        p = self.activation.effective(self.raw())
        return sum_gradients_over_tensor_parallel(p, self.tp_group)

    def tell_hooks(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """To the forward hooks, what they would have seen, from a layer that has computed y itself.

        RuntimeError: a hook would change y, which can no longer be done.
        """
        for number, hook in list(self._forward_hooks.items()):
            kwargs = ({},) if number in self._forward_hooks_with_kwargs else ()
            if hook(self, (x, bias), *kwargs, y) is not None:
                raise RuntimeError("a forward hook changes the activation's output, which a fused layer cannot follow")

    def raw(self) -> dict[str, torch.nn.Parameter]:
        """The raw parameters by name, also while `hide` keeps them from those who ask for a module's parameters."""
        return {q.name: getattr(self, q.name) for q in self.activation.trainable}

    def hide(self) -> None:
        """From now on `raw` alone tells of the parameters. For ZeRO 3, which shards and flattens all that it finds."""
        for name, parameter in self.raw().items():
            del self._parameters[name]
            object.__setattr__(self, name, parameter)

    @torch.no_grad()
    def effective_values(self) -> dict[str, Tensor]:
        """Parameter name -> effective value, [1], e.g. alpha_p and alpha_n, 0.8 at initialisation."""
        p = self.activation.effective(self.raw())
        return {q.name: p[q.symbol] for q in self.activation.trainable}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Replicated over tensor- and data-parallel ranks: any TP/PP can load what any other saved.

        Megatron's default for plain modules makes every tensor-parallel rank the main replica, and saving then fails.
        """
        return make_sharded_tensors_for_checkpoint(
            self.raw(),
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )

    def extra_repr(self) -> str:
        return f"{self.activation.name}: {self.activation.formula}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableActivation:
        # Float16Module (and any .half()/.bfloat16()) reaches every parameter through here. Follow the move to another
        # device, refuse the cast: bf16 resolves an alpha near 0.8 only in steps of 0.5 %.
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)
