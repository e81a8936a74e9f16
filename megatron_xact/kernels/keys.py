"""A configured record as a string, and back: what an operator's schema, a compiled graph or an export can hold."""

from __future__ import annotations

import functools
import json

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.activations.baselines import IDENTITY


@functools.cache
def key_of(activation: Activation) -> str:
    """The record's key, from which `record_of` finds it again."""
    if record_of(activation.key) != activation:
        raise ValueError(f"activation {activation.name!r} is not one that activations.get returns; add it to a RECORDS")
    return activation.key


@functools.cache
def record_of(key: str) -> Activation:
    if key == IDENTITY.key:  # which `activations.get` does not know
        return IDENTITY
    spec = json.loads(key)
    return activations.get(spec["name"], trainable=spec["trainable"], eps=spec["eps"], **spec["init"])
