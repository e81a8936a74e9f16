"""The tensor-parallel rule of activation parameters, and the only place that knows it.

alpha is replicated over tensor-parallel ranks while every rank applies it to its own shard of the ffn dimension, so
what a rank computes is a partial sum of alpha's gradient. The true gradient is the SUM over the tensor-parallel group,
with sequence parallelism on or off (fc1 gathers the sequence before the activation sees it). Megatron sums only
gradients tagged `sequence_parallel`, and averages those tagged `average_gradients_across_tp_domain`: neither is right.

The sum is part of autograd here (identity forward, all-reduce backward), so it is right in every trainer and cannot be
forgotten by an optimizer. Its cost is one all-reduce of a few floats per layer and microbatch.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor


def sum_gradients_over_tensor_parallel(
    p: dict[str, Tensor | float], group: torch.distributed.ProcessGroup
) -> dict[str, Tensor | float]:
    """Return `p` unchanged in value; gradients flowing back into its tensors are summed over `group`.

    p: symbol -> (1,) tensor (or float: left alone). All tensors share one all-reduce.
    """
    learned = {symbol: value for symbol, value in p.items() if isinstance(value, Tensor)}
    if not learned or group.size() == 1:
        return p
    replicated = copy_to_tensor_model_parallel_region(torch.cat(list(learned.values())), group=group)
    return p | dict(zip(learned, replicated.split(1), strict=True))
