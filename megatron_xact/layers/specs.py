"""Layer specs, one per activation, usable from Megatron's own `pretrain_gpt.py`:

    --spec megatron_xact.layers.specs xielu            (gated activations also need --swiglu)

Each name is a callable that takes Megatron's model config and returns the decoder block: Megatron's stock layer
(TransformerEngine's where it is installed and `--transformer-impl` asks for it, else the local one) with the MLP, and
in the local layer also the norm and the attention core, replaced. No other module knows Megatron's spec API.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import is_te_min_version
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.utils import print_rank_0

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.layers import coverage, saving
from megatron_xact.layers.coverage import Unsupported
from megatron_xact.layers.local import Norm, ScaledDotProductAttention
from megatron_xact.layers.mlp import ActivationMLP

# Megatron's functions that the spec's activation replaces -> the flags that asked for them. (gelu is its default, and
# --swiglu is what a gated activation needs.)
REPLACED = {"squared_relu": "--squared-relu", "quick_gelu": "--quick-geglu"}


def decoder_block(
    config: GPTModelConfig | TransformerConfig, vp_stage: int | None = None, *, activation: Activation
) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage, every MLP with `activation`, and the final norm.

    config: Megatron's, or a model provider of Megatron-Bridge, which is a TransformerConfig itself.
    Raises Unsupported, a ValueError, for what the spec does not cover (`coverage`).
    """
    transformer = getattr(config, "transformer", config)
    local = coverage.why_local(transformer.transformer_impl, HAVE_TE)
    coverage.refuse(transformer, local)
    if activation.trainable:
        saving.make_savable(config, activation.name)
    use_te = local is None
    layer = _te_layer(transformer) if use_te else _local_layer(transformer)
    mlp = _te_mlp(transformer) if use_te else ActivationMLP
    layer.mlp = partial(mlp.as_mlp_submodule, submodules=layer.mlp.keywords["submodules"], activation=activation)
    _announce(activation, transformer, local)
    return TransformerBlockSubmodules(
        layer_specs=[ModuleSpec(module=TransformerLayer, submodules=layer)]
        * get_num_layers_to_build(transformer, vp_stage),
        layer_norm=TENorm if use_te else Norm,
    )


def _te_layer(config: TransformerConfig) -> TransformerLayerSubmodules:
    return get_gpt_layer_with_transformer_engine_submodules(
        qk_layernorm=config.qk_layernorm, qk_l2_norm=config.qk_l2_norm
    )


def _te_mlp(config: TransformerConfig) -> type[ActivationMLP]:
    """TE's operations where Megatron's flag asks for them, else its modules; both with our own cast to FP8 inside."""
    if not is_te_min_version("2.13.0"):
        if config.use_transformer_engine_op_fuser:
            raise Unsupported("use-transformer-engine-op-fuser with these activations needs TransformerEngine >= 2.13")
        return ActivationMLP
    from megatron_xact.layers.te import mlp  # where TransformerEngine is missing, it cannot be imported

    return mlp.OperationMLP if config.use_transformer_engine_op_fuser else mlp.QuantizingMLP


def _local_layer(config: TransformerConfig) -> TransformerLayerSubmodules:
    layer = get_gpt_layer_local_submodules(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
    )
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention = layer.self_attention.submodules
    attention.core_attention = ScaledDotProductAttention
    if config.qk_layernorm and not config.qk_l2_norm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return layer


def _announce(activation: Activation, config: TransformerConfig, local: str | None) -> None:
    # Megatron 0.19 trains its default layer, with exit code 0, when --spec names something it cannot import. So the
    # presence of this line is what tells a user (and a log search) that the activation is really in.
    learned = ", ".join(q.name for q in activation.trainable) or "none"
    layer = "TransformerEngine" if local is None else f"local ({local})" if local == coverage.NO_TE else "local"
    replaced = REPLACED.get(getattr(config.activation_func, "__name__", ""))
    replaced = f" (in the place of {replaced})" if replaced else ""
    print_rank_0(
        f"> megatron-xact: {activation.name} in every MLP{replaced}, {activation.formula}; trainable: {learned} "
        f"(fp32, gradient summed over {config.tensor_model_parallel_size} tensor-parallel ranks); {layer} layer"
    )


def into(provider: TransformerConfig, name: str) -> None:
    """Give a model provider of Megatron-Bridge the activation `name`: `specs.into(cfg.model, "xielu")`.

    That is its layer spec, whether the MLPs are gated, and what lets Megatron save fp32 alphas in a bf16 model.
    """
    activation = activations.get(name)
    provider.transformer_layer_spec = _spec(activation)
    provider.gated_linear_unit = activation.gated
    provider.register_post_wrap_hook(saving.put_fp32_first)


def _spec(activation: Activation) -> Callable[..., TransformerBlockSubmodules]:
    """`decoder_block` as a function of this module, by whose name Megatron-Bridge's saved configs find it again."""

    def spec(config: GPTModelConfig | TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        return decoder_block(config, vp_stage, activation=activation)

    spec.__name__ = spec.__qualname__ = activation.name
    return spec


# Megatron looks the spec's name up in vars(module), so the names have to be there: one per record.
globals().update({name: _spec(activations.get(name)) for name in activations.names()})
