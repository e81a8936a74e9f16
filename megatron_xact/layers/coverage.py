"""What the layer specs do not cover: refused in one line; Megatron would fail far from the cause, or go on without it.

`refuse` reads Megatron's arguments, before a run starts, as well as the TransformerConfig that a spec is given.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


NO_TE = "TransformerEngine is not installed"


class Unsupported(ValueError):
    """What was asked for is not covered; the message, one line, says what to do instead."""


@dataclass(frozen=True)
class Feature:
    flag: str  # Megatron's, without the dashes
    names: tuple[str, ...]  # of the value among Megatron's arguments and in its TransformerConfig
    way_out: str
    what: str = ""  # in words, where the flag does not say it
    off: tuple = (None, False)


NEVER = (
    Feature("num-experts", ("num_experts", "num_moe_experts"), "leave it out", "mixture of experts", (None, 0)),
    Feature("multi-latent-attention", ("multi_latent_attention",), "leave it out", "multi-latent attention"),
    Feature("mtp-num-layers", ("mtp_num_layers",), "leave it out", "multi-token prediction", (None,)),
    Feature("experimental-attention-variant", ("experimental_attention_variant",), "leave it out", "other attention"),
    Feature("hybrid-layer-pattern", ("hybrid_layer_pattern",), "leave it out", "layers of several kinds"),
    Feature("heterogeneous-layers-config-path", ("heterogeneous_layers_config_path",), "leave it out",
            "layers of several kinds"),
    Feature("enable-mhc-connections", ("enable_mhc_connections",), "leave it out", "hyper-connections"),
)  # fmt: skip
_FULL = "leave it out, for attention to all of the past"
_OWN_FP8 = 'mlp = "fp8" in [xact] computes the MLPs in FP8 without it'
# The local layer computes without these what Megatron's flags ask for: it must not go on as if they were not there.
WITH_TE = (
    Feature("fp8-format", ("fp8",), _OWN_FP8),
    Feature("fp4-format", ("fp4",), _OWN_FP8),
    Feature("context-parallel-size", ("context_parallel_size",),
            "for long sequences use tensor-model-parallel-size with sequence-parallel", off=(None, 1)),
    Feature("apply-layernorm-1p", ("layernorm_zero_centered_gamma",), "leave it out"),
    Feature("window-size", ("window_size",), _FULL),
    Feature("softmax-type", ("softmax_type",), "leave it out", off=(None, "vanilla")),
    Feature("reset-attention-mask", ("reset_attention_mask",), _FULL),
    Feature("tp-comm-overlap", ("tp_comm_overlap",), "leave it out"),
    Feature("cpu-offloading-num-layers", ("cpu_offloading_num_layers",), "use recompute-granularity to save memory",
            off=(None, 0)),
)  # fmt: skip


def why_local(transformer_impl: str, has_te: bool) -> str | None:
    """Why the layer will be the local one, not TransformerEngine's; None: it will be TransformerEngine's."""
    if transformer_impl != "transformer_engine":
        return f"transformer-impl = {transformer_impl!r}"
    return None if has_te else NO_TE


def refuse(config: Namespace | TransformerConfig, local: str | None) -> None:
    """Unsupported: the first of NEVER, or of WITH_TE in the local layer, that is asked for.

    local: what `why_local` returns.
    """
    for feature in NEVER:
        if (value := _asked_for(config, feature)) is not None:
            raise Unsupported(
                f"{feature.what} ({feature.flag} = {value!r}) is not supported by megatron_xact's layer specs; "
                f"{feature.way_out}"
            )
    for feature in WITH_TE if local is not None else ():
        if (value := _asked_for(config, feature)) is not None:
            raise Unsupported(
                f"{feature.flag} = {value!r} needs TransformerEngine's layer, and this run has the local one "
                f"({local}); {feature.way_out}"
            )


def _asked_for(config: Namespace | TransformerConfig, feature: Feature) -> object | None:
    value = next((getattr(config, name) for name in feature.names if hasattr(config, name)), None)
    return None if value in feature.off else value
