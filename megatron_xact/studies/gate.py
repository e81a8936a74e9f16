"""Does FP8 train as well as BF16? The verdict on two runs of one config, from what lies in their folders.

The gap is the mean of loss(FP8) - loss(BF16) over the last part of training, paired by step: both runs see the same
tokens in the same order, so what a step's batch adds to both losses cancels. Differences of neighbouring steps resemble
each other, so the interval of their mean comes from a few stretches of consecutive ones instead of from single steps.

Layers are named by what FP8 does to the operand with the largest outliers, the post-activation that enters fc2: its
error in e4m3 (see pretraining/statistics.py), and how much its largest magnitude has grown, on which the scale depends.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_xact.studies import curves
from megatron_xact.studies.effects import Estimate, t_interval
from megatron_xact.studies.law import Array
from megatron_xact.studies.state import report_of

SHARE, LEAST = 0.1, 20  # of the steps, that a window has by itself; but of records no fewer
STRETCHES = 5
"""Of a window. Simulated coverage of the 95 % interval, of AR(1) differences: with 100 records 95, 93 and 89 % where
neighbours correlate by 0.5, 0.8 and 0.9; with 20 records 92, 80 and 62 %. More stretches cover less."""
FIRST = 3  # records of statistics whose median is what a layer started from
WORST = 3  # layers that are named


@dataclass(frozen=True)
class Layer:
    """Of the FP8 run, `bf16` of its twin; nan where not recorded or not defined."""

    number: int  # from 1
    error: float  # relative RMS error of the post-activation in e4m3, at the last record
    flushed: float  # share of its values that become 0 by that
    growth: float  # its largest magnitude at the last record, over that of the first ones
    error_bf16: float
    growth_bf16: float


@dataclass(frozen=True)
class Gate:
    threshold: float
    losses: dict[str, tuple[Array, Array]]  # "fp8", "bf16" -> steps and losses, as recorded
    steps: Array  # that both have
    differences: Array  # at these, FP8 - BF16
    window: Array  # of the steps, those that count
    gap: Estimate | None  # None: FP8 diverged
    validation_gap: float | None
    diverged: int | None  # the last step before FP8 did; 0: it did at once; None: it did not
    layers: tuple[Layer, ...]
    measured: tuple[int, int] | None  # steps of the first and last record of FP8's layers

    @property
    def passed(self) -> bool:
        return self.gap is not None and self.gap.value <= self.threshold

    @property
    def settled(self) -> bool:
        """Whether the whole interval says the same."""
        return self.gap is None or self.gap.high <= self.threshold or self.gap.low > self.threshold

    def worst(self, by: str) -> list[Layer]:
        """By "error" or "growth", the worst first."""
        known = [layer for layer in self.layers if not math.isnan(getattr(layer, by))]
        return sorted(known, key=lambda layer: -getattr(layer, by))[:WORST]


def judge(fp8: Path, bf16: Path, threshold: float, window: int | None = None, diverged: bool = False) -> Gate:
    """Of the two runs' folders. window: steps at the end that count, by default SHARE of them.

    diverged: FP8 broke off with a loss or gradient that is not finite; BF16 need not be there. ValueError: there is
    nothing to compare.
    """
    losses = {"fp8": _losses(fp8), "bf16": _losses(bf16)}
    until = _last_finite(*losses["fp8"], diverged)
    if not np.isfinite(losses["bf16"][1]).all():
        raise ValueError(f"the loss in {bf16} is not finite: BF16 diverges by itself, with nothing for FP8 to equal")
    steps, of_fp8, of_bf16 = np.intersect1d(losses["fp8"][0], losses["bf16"][0], return_indices=True)
    differences = losses["fp8"][1][of_fp8] - losses["bf16"][1][of_bf16]
    if until is None and not len(steps):
        raise ValueError(f"{fp8} and {bf16} have no step of progress.jsonl in common")
    chosen = _window(steps, window)
    end = math.inf if until is None else until
    mine, others = (
        [r for r in curves.records(folder / "statistics.jsonl") if r["step"] <= end] for folder in (fp8, bf16)
    )
    layers = tuple(_layers(mine, others))
    return Gate(
        threshold=threshold, losses=losses, steps=steps, differences=differences, window=steps[chosen],
        gap=gap(differences[chosen]) if until is None else None,
        validation_gap=_validation_gap(fp8, bf16) if until is None else None, diverged=until, layers=layers,
        measured=(mine[0]["step"], mine[-1]["step"]) if layers else None,
    )  # fmt: skip


def gap(differences: Array) -> Estimate:
    """Their mean with its 95 % interval, whole stretches only; unbounded where there are too few for one."""
    if len(differences) < 2 * STRETCHES:
        return Estimate(float(differences.mean()), -math.inf, math.inf)
    length = len(differences) // STRETCHES
    return t_interval(differences[-length * STRETCHES :], np.repeat(np.arange(STRETCHES), length), 0.95)


def _losses(folder: Path) -> tuple[Array, Array]:
    found = curves.records(folder / "progress.jsonl")
    return np.array([r["step"] for r in found], int), np.array([r["loss"] for r in found], float)


def _last_finite(steps: Array, losses: Array, diverged: bool) -> int | None:
    """The last step before the loss was not; 0: there was none; None: it always was."""
    bad = ~np.isfinite(losses)
    if not (diverged or bad.any()):
        return None
    until = int(bad.argmax()) if bad.any() else len(steps)
    return int(steps[until - 1]) if until else 0


def _window(steps: Array, width: int | None) -> Array:
    """Which of the steps count, as booleans."""
    if not len(steps):
        return np.zeros(0, bool)
    chosen = steps > steps[-1] - (width or SHARE * steps[-1])
    if width is None:
        chosen[-LEAST:] = True
    return chosen


def _validation_gap(fp8: Path, bf16: Path) -> float | None:
    ours, theirs = (report_of(folder).get("validation_loss") for folder in (fp8, bf16))
    return None if ours is None or theirs is None else ours - theirs


def _layers(fp8: Sequence[dict], bf16: Sequence[dict]) -> list[Layer]:
    def last(records: Sequence[dict], layer: str, name: str) -> float:
        value = records[-1]["statistics"].get(layer, {}).get(name) if records else None
        return math.nan if value is None else value

    def growth(records: Sequence[dict], layer: str) -> float:
        values = [r["statistics"].get(layer, {}).get("postact_max") for r in records]
        values = [v for v in values if v]
        return values[-1] / statistics.median(values[: min(FIRST, len(values) // 2)]) if len(values) > 1 else math.nan

    return [
        Layer(
            number=int(layer), error=last(fp8, layer, "postact_fp8_error"),
            flushed=last(fp8, layer, "postact_fp8_flushed"), growth=growth(fp8, layer),
            error_bf16=last(bf16, layer, "postact_fp8_error"), growth_bf16=growth(bf16, layer),
        )
        for layer in sorted(fp8[-1]["statistics"] if fp8 else (), key=int)
    ]  # fmt: skip
