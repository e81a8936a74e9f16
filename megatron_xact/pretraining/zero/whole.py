"""Parameters in full, also where ZeRO 3 keeps shards of them between their uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch


def whole(parameters: Iterable[torch.nn.Parameter]) -> contextlib.AbstractContextManager:
    """Within, every one of `parameters` has all of its elements (of this tensor-parallel rank) to read.

    A collective over the data-parallel ranks for those that ZeRO 3 has sharded; others are left alone.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)
