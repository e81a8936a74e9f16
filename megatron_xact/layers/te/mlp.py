"""Megatron's MLPs of TransformerEngine layers with one of our activations: of TE's modules, or of its operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import TEFusedMLP
from torch import Tensor
from transformer_engine.pytorch.ops import GEGLU, GELU, Sequential

from megatron_xact.activations import Activation
from megatron_xact.kernels import mlp_choice
from megatron_xact.layers import fused_mlp, parallel_linear
from megatron_xact.layers.mlp import ActivationMLP, to_return
from megatron_xact.layers.te.joint import JOINT_FUSION
from megatron_xact.layers.te.linear_input import QuantizingActivation
from megatron_xact.layers.te.operation import ActivationOperation, without_forward_hooks


class QuantizingMLP(ActivationMLP):
    """TE's linear modules, and in FP8 the activation hands fc2 its input already cast."""

    def make_activation(self, activation: Activation) -> QuantizingActivation:
        return QuantizingActivation(activation, self.tp_group, self.linear_fc2)


class OperationMLP(ActivationMLP, TEFusedMLP):
    """TE's operations on the modules' parameters (`--use-transformer-engine-op-fuser`), the activation one of them.

    The linear layers stay TE's until the layer's first forward pass in training, where `fused_mlp.decide` may join them
    with the activation, by `[xact] mlp`: a fused backend that is named, or that "auto" finds to be the fastest. Not
    where TE computes in FP8 or overlaps communication with these layers.
    """

    def make_activation(self, activation: Activation) -> ActivationOperation:
        return ActivationOperation(activation, self.tp_group)

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """As `ActivationMLP`."""
        assert per_token_scale is None, "experts are refused by the layer spec"
        if self.way is None and self.training:
            self.way = fused_mlp.decide(self, hidden_states, self._unfit())
            if self.way != fused_mlp.UNFUSED:
                self.activation_func.fused_linear = self.way
                self._fused_impl = None  # made anew, if by an evaluation before: TE keeps what it has not joined
        output, bias = TEFusedMLP.forward(self, hidden_states)
        return output, to_return(bias)

    def _unfit(self) -> str | None:
        """Why the linear layers stay TE's, or None."""
        if not JOINT_FUSION:
            return "joining TransformerEngine's operations needs TransformerEngine >= 2.17"
        return fused_mlp.unfit_config(self.config, mlp_choice.selected())

    def _make_fused_impl(self) -> Sequential:
        """Megatron's operations, made as for GELU, in the place of which ours then stands: it knows few functions."""
        self.__dict__["activation_func"] = F.gelu  # found before the module of that name
        try:
            operations = super()._make_fused_impl()
        finally:
            del self.__dict__["activation_func"]
        (at,) = (i for i, op in enumerate(operations) if isinstance(op, (GELU, GEGLU)))
        operations[at] = self.activation_func
        return operations

    def _register_hooks_on_fused_impl(self, fused_impl: torch.nn.Module) -> None:
        # Megatron 0.19 goes on with the pre-hooks that are there in the first step, for which DDP takes its own away.
        fused_impl.register_forward_pre_hook(lambda *_: parallel_linear.await_parameters(self))
        # Megatron would call the activation's hooks without its input and output; the operation calls them with both.
        with without_forward_hooks(self._modules["activation_func"]):
            super()._register_hooks_on_fused_impl(fused_impl)
