"""Every activation by name: `names()` lists them, `get(name, ...)` returns a configured record.

A new one is an `Activation` in a file's RECORDS, and a new file's RECORDS join `_ALL` below. Config, layers, export and
plots pick it up; kernels want a device function and tests an independent formula ("Your own activation" in README.md).
"""

import difflib
from collections.abc import Iterable

from megatron_xact.activations import baselines, gates, xielu
from megatron_xact.activations.record import Activation, Parameter

__all__ = ["Activation", "Parameter", "get", "names"]

_ALL = (*xielu.RECORDS, *gates.RECORDS, *baselines.RECORDS)
_BY_NAME = {name: record for record in _ALL for name in (record.name, *record.aliases)}


def names() -> tuple[str, ...]:
    """Canonical names, aliases not included."""
    return tuple(record.name for record in _ALL)


def get(name: str, *, trainable: Iterable[str] | None = None, eps: float = 0.0, **init: float) -> Activation:
    """The record of a name or alias, with effective start values by parameter name (`alpha_p=0.8, beta=0.0`).

    trainable: names of all parameters that are learned; None keeps the record's own choice.
    eps:       0, or the negative clamp (-1e-6) for bit parity with implementations that use min(x, eps).
    Raises ValueError, one line, for an unknown name and for anything the activation cannot have.
    """
    if name not in _BY_NAME:
        near = difflib.get_close_matches(str(name).lower().replace("-", "_"), _BY_NAME, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names())}"
        raise ValueError(f"unknown activation {name!r}; {hint}")
    return _BY_NAME[name].configured(trainable=trainable, eps=eps, init=init)
