"""Megatron's MLPs of TransformerEngine layers with one of our activations: of TE's modules, or of its operations."""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import TEFusedMLP
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.kernels import linear, mlp_choice
from megatron_xact.layers.mlp import ActivationMLP
from megatron_xact.layers.te_ops import ActivationOperation, QuantizingActivation, without_forward_hooks


class QuantizingMLP(ActivationMLP):
    """TE's linear modules, and in FP8 the activation hands fc2 its input already cast."""

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, *args, activation: Activation, **kwargs
    ):
        super().__init__(config, submodules, *args, activation=activation, **kwargs)
        self.activation_func = QuantizingActivation(activation, self.tp_group, self.linear_fc2)


class OperationMLP(ActivationMLP, TEFusedMLP):
    """TE's operations on the modules' parameters (`--use-transformer-engine-op-fuser`), the activation one of them.

    `[xact] mlp` naming a fused backend joins the linear layers and the activation in it, where TE does not compute in
    FP8 nor overlap communication with these layers; "auto" and "unfused" leave the linear layers to TE.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, *args, activation: Activation, **kwargs
    ):
        super().__init__(config, submodules, *args, activation=activation, **kwargs)
        wanted = mlp_choice.selected()
        fused_linear = wanted if wanted in linear.BACKENDS else None
        self.activation_func = ActivationOperation(activation, self.tp_group, fused_linear=fused_linear)

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """As `ActivationMLP`."""
        assert per_token_scale is None, "experts are refused by the layer spec"
        return TEFusedMLP.forward(self, hidden_states)

    def _make_activation_op(self, *args, **kwargs) -> ActivationOperation:
        return self.activation_func

    def _register_hooks_on_fused_impl(self, fused_impl: torch.nn.Module) -> None:
        # Megatron would call the activation's hooks without its input and output; the operation calls them with both.
        with without_forward_hooks(self.activation_func):
            super()._register_hooks_on_fused_impl(fused_impl)
