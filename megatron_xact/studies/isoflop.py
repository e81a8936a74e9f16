"""IsoFLOP parabolas: at one compute, loss against ln N and its minimum. A diagnostic beside the law, never the answer.

They are biased even without noise (width of the grid, minima off its centre, alpha != beta: arXiv:2603.22339). Where
three sizes were trained with one compute, these runs are shown. Ladders rarely hold that: then each size's loss is
interpolated in ln C between its own budgets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from megatron_xact.studies.law import Array
from megatron_xact.studies.table import SAME_BUDGET, Table, budgets

LEVELS = 5  # of compute, where losses are interpolated


@dataclass(frozen=True)
class Parabola:
    """At `flops` = 6 N D. `optimum`: params at its minimum, None where that is not inside the sizes."""

    flops: float
    params: Array
    losses: Array
    coefficients: Array  # of numpy.polyval in ln N
    optimum: float | None
    measured: bool  # at this compute; else interpolated


def parabolas(table: Table) -> list[Parabola]:
    """Of one activation; empty where no compute has three sizes."""
    return _measured(table) or _interpolated(table)


def _measured(table: Table) -> list[Parabola]:
    """At every compute, within SAME_BUDGET, that three sizes were trained with; seeds averaged."""
    N, loss = table.array("params"), table.array("loss")
    log_flops = np.log(6 * N * table.array("tokens"))
    order = np.argsort(log_flops, kind="stable")
    found = []
    for level in np.split(order, np.flatnonzero(np.diff(log_flops[order]) > SAME_BUDGET) + 1):
        params = np.unique(N[level])
        if len(params) >= 3:
            losses = np.array([loss[level][N[level] == size].mean() for size in params])
            found.append(_parabola(float(log_flops[level].mean()), params, losses, measured=True))
    return found


def _interpolated(table: Table) -> list[Parabola]:
    """At up to LEVELS computes, each within the budgets of at least three sizes."""
    curves = [curve for size in table.sizes if (curve := _curve(table.where(lambda r, s=size: r.size == s)))]
    if len(curves) < 3:
        return []
    ends = [(curve[1].x[0], curve[1].x[-1]) for curve in curves]
    grid = np.linspace(min(low for low, _ in ends), max(high for _, high in ends), 400)
    covered = grid[[sum(low <= c <= high for low, high in ends) >= 3 for c in grid]]
    if not len(covered):
        return []
    wanted = np.linspace(covered[0], covered[-1], LEVELS)
    chosen = sorted({float(covered[np.abs(covered - c).argmin()]) for c in wanted})
    found = []
    for c in chosen:
        there = [curve for curve, (low, high) in zip(curves, ends, strict=True) if low <= c <= high]
        losses = np.array([float(loss(c)) for _, loss in there])
        found.append(_parabola(c, np.array([N for N, _ in there]), losses, measured=False))
    return found


def exponent(found: list[Parabola]) -> float | None:
    """The a in N_opt ~ C^a that the minima say; None for fewer than two."""
    points = [(np.log(p.flops), np.log(p.optimum)) for p in found if p.optimum is not None]
    return float(np.polyfit(*np.transpose(points), 1)[0]) if len(points) > 1 else None


def _curve(size: Table) -> tuple[float, PchipInterpolator] | None:
    """(params, loss over ln C) of one size, seeds averaged; None with a single budget."""
    flops = 6 * size.array("params") * size.array("tokens")
    budget = np.array(budgets(size.runs))
    groups = [budget == b for b in np.unique(budget)]
    if len(groups) < 2:
        return None
    losses = [size.array("loss")[group].mean() for group in groups]
    return float(size.array("params")[0]), PchipInterpolator([np.log(flops[g]).mean() for g in groups], losses)


def _parabola(log_flops: float, params: Array, losses: Array, measured: bool) -> Parabola:
    coefficients = np.polyfit(np.log(params), losses, 2)
    optimum = None
    if coefficients[0] > 0:
        lowest = float(np.exp(-coefficients[1] / (2 * coefficients[0])))
        optimum = lowest if params.min() < lowest < params.max() else None
    return Parabola(float(np.exp(log_flops)), params, losses, coefficients, optimum, measured)
