"""A configured record as a string, and back: what an operator's schema, a compiled graph or an export can hold."""

from __future__ import annotations

import functools
import json

from megatron_xact import activations
from megatron_xact.activations import Activation


@functools.cache
def key_of(activation: Activation) -> str:
    """e.g. {"name": "xielu", "trainable": ["alpha_p", "alpha_n"], "eps": 0.0, "init": {"alpha_p": 0.8, ...}}"""
    key = json.dumps(
        {
            "name": activation.name,
            "trainable": [q.name for q in activation.trainable],
            "eps": activation.eps,
            "init": {q.name: q.init for q in activation.parameters},
        }
    )
    if record_of(key) != activation:
        raise ValueError(f"activation {activation.name!r} is not one that activations.get returns; add it to a RECORDS")
    return key


@functools.cache
def record_of(key: str) -> Activation:
    spec = json.loads(key)
    return activations.get(spec["name"], trainable=spec["trainable"], eps=spec["eps"], **spec["init"])
