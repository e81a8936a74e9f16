"""What this room needs of the rooms with torch and Megatron. The command line hands it in; nothing is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_xact.pretraining.planning.counts import Shape
from megatron_xact.studies.law import Array


@dataclass(frozen=True)
class Model:
    """What the trainer makes of a run's config."""

    activation: str  # its name, not an alias
    shape: Shape
    micro_batch: int  # sequences
    ranks: int  # processes that hold one copy of the model


@dataclass(frozen=True)
class Asked:
    """What a run's config asks for, as far as the FP8 gate must know."""

    text: str  # of the resolved config, in TOML
    fp8: bool
    steps: int | None  # None: it counts samples instead
    log_interval: int  # steps
    statistics_interval: int  # steps; 0: none
    save_interval: int | None  # steps


Layer = tuple[Path | str, dict[str, dict[str, object]]]
"""Tables over a config, and the place that messages name: a file, whose table is named too, or what is to be said."""


Values = Callable[[str, dict[str, float], Array], Array]
"""(activation, effective parameters, x) -> f(x); parameters that are not given have their initial values."""


@dataclass(frozen=True)
class Outside:
    values: Values
    """For the report's picture of activations."""
    model: Callable[[Path, list[Layer]], Model]
    """Of a config file with layers over it. ValueError, OSError: why it cannot be trained."""
    speed: Callable[[Path, list[Layer], str, int], float]
    """Tokens per second that `xact plan` expects of that on so many GPUs of a kind."""
    asked: Callable[[Path, list[str]], Asked]
    """Of a config file with overrides (TABLE.KEY=VALUE in TOML). ValueError, OSError: why it cannot be trained."""
