"""Megatron's MLP with one of our activations, gated or not, with or without fc1 bias."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.typed_torch import apply_module
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.kernels.linear import Way
from megatron_xact.layers import fused_mlp
from megatron_xact.layers.activation import TrainableActivation


class ActivationMLP(MLP):
    """h -> fc1 -> activation -> fc2; weights, sharding and checkpoint keys are those of Megatron's own MLP.

    Only `activation_func` differs: a module with parameters, in place of a stateless function. `config.activation_func`
    is not used (Megatron has no slot for a function with state: its own accepts gelu, silu and relu only).
    """

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, *args, activation: Activation, **kwargs):
        if config.gated_linear_unit != activation.gated:
            is_, flag = ("gated", "add") if activation.gated else ("not gated", "remove")
            raise ValueError(
                f"activation {activation.name!r} is {is_} but gated_linear_unit is {config.gated_linear_unit}: "
                f"{flag} --swiglu (it sizes fc1 and the FLOP count; the activation itself comes from the spec)"
            )
        super().__init__(config, submodules, *args, **kwargs)
        self.activation_func = self.make_activation(activation)
        self.way: Way | None = None  # of fused_mlp.decide, once it is decided
        self.layer_number = 0

    def make_activation(self, activation: Activation) -> TrainableActivation:
        """What comes between the linear layers, which are there already."""
        return TrainableActivation(activation, self.tp_group)

    def set_layer_number(self, layer_number: int) -> None:
        """In the whole model, from 1; Megatron's layer tells it, since some of its MLPs ask."""
        self.layer_number = layer_number

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [s, b, h] ([s/tp, b, h] with sequence parallelism) -> the same shape, and fc2's bias."""
        assert per_token_scale is None, "experts are refused by the layer spec"
        if way := fused_mlp.way_for(self, hidden_states):
            output, bias = fused_mlp.run(self, hidden_states, way)
        else:
            preact, bias = apply_module(self.linear_fc1)(hidden_states)  # [s, b, F/tp] or [s, b, 2 F/tp]
            postact = self.activation_func(preact, bias)  # [s, b, F/tp]
            output, bias = apply_module(self.linear_fc2)(postact)
        return output, to_return(bias)

    @classmethod
    def as_mlp_submodule(
        cls,
        submodules: MLPSubmodules,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool,
        *,
        activation: Activation,
        **kwargs,
    ) -> ActivationMLP:
        """The builder that fills a layer spec's `mlp` slot, as Megatron's own, with the activation's record."""
        # Megatron's layers leave the ffn size out, and its MLP then warns that this is deprecated.
        kwargs = {"ffn_hidden_size": config.ffn_hidden_size} | kwargs
        return cls(config, submodules, tp_group=pg_collection.tp, activation=activation, **kwargs)


def to_return(bias: Tensor | None) -> Tensor | None:
    """fc2's bias, which the MLP leaves to the layer to add; a copy in a checkpointed MLP (recompute_modules = ["mlp"]).

    The checkpoint returns it as an output of its own: autograd would make the parameter itself a node of the graph,
    whose backward is the recomputation, which comes to the parameter again, without end.
    """
    return bias.clone() if bias is not None and not torch.is_grad_enabled() else bias
