"""IsoFLOP parabolas: at one compute, loss against ln N and its minimum. A diagnostic beside the law, never the answer.

They are biased even without noise (width of the grid, minima off its centre, alpha != beta: arXiv:2603.22339). Ladders
rarely hold several sizes at one compute, so each size's loss is interpolated in ln C between its own budgets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from megatron_xact.studies.law import Array
from megatron_xact.studies.table import Table, budgets


@dataclass(frozen=True)
class Parabola:
    """At `flops` = 6 N D. `optimum`: params at its minimum, None where that is not inside the sizes."""

    flops: float
    params: Array
    losses: Array
    coefficients: Array  # of numpy.polyval in ln N
    optimum: float | None


def parabolas(table: Table, levels: int = 5) -> list[Parabola]:
    """Of one activation; empty where no compute has three sizes."""
    curves = [curve for size in table.sizes if (curve := _curve(table.where(lambda r, s=size: r.size == s)))]
    if len(curves) < 3:
        return []
    ends = [(curve[1].x[0], curve[1].x[-1]) for curve in curves]
    grid = np.linspace(min(low for low, _ in ends), max(high for _, high in ends), 400)
    covered = grid[[sum(low <= c <= high for low, high in ends) >= 3 for c in grid]]
    if not len(covered):
        return []
    wanted = np.linspace(covered[0], covered[-1], levels)
    chosen = sorted({float(covered[np.abs(covered - c).argmin()]) for c in wanted})
    return [_parabola(c, [curve for curve, (low, high) in zip(curves, ends, strict=True) if low <= c <= high])
            for c in chosen]  # fmt: skip


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


def _parabola(log_flops: float, curves: list[tuple[float, PchipInterpolator]]) -> Parabola:
    params = np.array([N for N, _ in curves])
    losses = np.array([float(loss(log_flops)) for _, loss in curves])
    coefficients = np.polyfit(np.log(params), losses, 2)
    optimum = None
    if coefficients[0] > 0:
        lowest = float(np.exp(-coefficients[1] / (2 * coefficients[0])))
        optimum = lowest if params.min() < lowest < params.max() else None
    return Parabola(float(np.exp(log_flops)), params, losses, coefficients, optimum)
