"""The parts of a layer that Megatron's own no-TransformerEngine layer lacks: a norm for sequence parallelism, SDPA.

Megatron's stock "local" layer refuses sequence parallelism in its norm and computes attention with an explicit
[s, s] score matrix whose mask is allocated on CUDA. These two make it train on any device, with memory linear in s.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class Norm:
    """Builder: torch's RMSNorm or LayerNorm, as `config.normalization` says, usable under sequence parallelism."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs) -> torch.nn.Module:
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        if config.normalization not in kinds or config.layernorm_zero_centered_gamma:
            raise ValueError(
                f"normalization {config.normalization!r} (zero-centered gamma: {config.layernorm_zero_centered_gamma})"
                " needs TransformerEngine; without it use RMSNorm or LayerNorm with plain gamma"
            )
        norm = kinds[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            # Each rank sees s/tp of the sequence: Megatron sums gradients with this mark over the TP group.
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class ScaledDotProductAttention(MegatronModule):
    """Causal attention core on `torch.nn.functional.scaled_dot_product_attention` (flash kernels on GPU and CPU)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs,
    ):
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError(
                f"context-parallel-size {config.context_parallel_size} needs TransformerEngine's attention; "
                "without it use context-parallel-size 1 (or tensor parallelism with sequence parallelism)"
            )
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"attention mask {attn_mask_type} needs TransformerEngine; this core is causal only")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query: [s, b, n/tp, d]; key, value: [s, b, g/tp, d] -> [s, b, n/tp * d]. Causal, whatever mask is passed."""
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("packed sequences and attention bias need TransformerEngine's attention")
        s, b, n, d = query.shape
        if key.shape[0] != s:
            raise ValueError(f"{s} queries, {key.shape[0]} keys: a cache of keys needs TransformerEngine's attention")
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, n, s, d]
        dropout = self.dropout if self.training else 0.0
        # other heads on every tensor-parallel rank, so other masks; with sequence parallelism the block forks already
        forks = dropout > 0 and self.config.tensor_model_parallel_size > 1 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forks else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=dropout, scale=self.softmax_scale, enable_gqa=k.shape[1] != n
            )
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)
