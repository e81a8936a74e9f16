"""Where a law fails and what its residuals are: by group, against the noise between seeds, far from all others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from megatron_xact.studies.law import PARAMETERS, Array
from megatron_xact.studies.pairs import number
from megatron_xact.studies.table import Run, Table, budgets, ratio_names

GROUPS = 12  # of residuals at most: an IsoFLOP study has as many sizes as runs
SIGNIFICANT = 0.05  # p below which something is called found


def lack_of_fit(residuals: Array, table: Table, form: str) -> float | None:
    """p of the F test of misfit against the noise between seeds; None where no cell has two, or none tests the law."""
    cells = number([(r.size, b) for r, b in zip(table.runs, budgets(table.runs), strict=True)])
    counts = np.bincount(cells)
    means = np.bincount(cells, residuals) / counts
    misfit, noise = (counts * means**2).sum(), ((residuals - means[cells]) ** 2).sum()
    freedom = len(counts) - PARAMETERS[form], len(residuals) - len(counts)
    if min(freedom) < 1:
        return None
    return float(stats.f.sf(misfit / freedom[0] / max(noise / freedom[1], 1e-18), *freedom))


def seed_noise(table: Table) -> tuple[float, int] | None:
    """Standard deviation of the loss between seeds of one cell, nats, and its degrees of freedom."""
    cells: dict[tuple, list[float]] = {}
    for r, budget in zip(table.runs, budgets(table.runs), strict=True):
        cells.setdefault((r.activation, r.size, budget), []).append(r.loss)
    freedom = sum(len(v) - 1 for v in cells.values())
    if not freedom:
        return None
    return float(np.sqrt(sum(np.var(v) * len(v) for v in cells.values()) / freedom)), freedom


def residuals_by(residuals: Array, runs: Sequence[Run], key: str) -> list[tuple[str, int, float, float]]:
    """(group, runs, mean, rms) of the residuals, by "size" or by "tokens per parameter"; neighbours together where
    there are more than GROUPS of them.
    """
    return [(name, len(values), float(values.mean()), float(np.sqrt((values**2).mean())))
            for name, values in _groups_of(residuals, runs, key)]  # fmt: skip


def _groups_of(residuals: Array, runs: Sequence[Run], key: str) -> list[tuple[str, Array]]:
    if key == "size":
        groups = [r.size for r in runs]
        order = list(dict.fromkeys(r.size for r in sorted(runs, key=lambda r: (r.params, r.size))))
    else:
        groups = ratio_names(runs)
        order = sorted(set(groups), key=float)
    parts = np.array_split(order, min(len(order), GROUPS))
    names = [str(part[0]) if len(part) == 1 else f"{part[0]}..{part[-1]}" for part in parts]
    return [(name, residuals[np.isin(groups, part)]) for name, part in zip(names, parts, strict=True)]


def fails_at(residuals: Array, table: Table, form: str) -> list[tuple[str, int, float]]:
    """(tokens per parameter, runs, mean residual) where the law is off by more than noise explains, at 5 % for all
    groups together; by the median too, so that one diverged run is no misfit. Noise: that between seeds, or where none
    repeat the robust spread about the law.
    """
    noise = seed_noise(table)
    if noise:
        sd, freedom = noise[0] / float(table.array("loss").mean()), noise[1]
    else:
        sd, freedom = robust_sd(residuals), len(residuals) - PARAMETERS[form]
    groups = _groups_of(residuals, table.runs, "tokens per parameter")
    limit = max(sd, 1e-4) * float(stats.t.isf(SIGNIFICANT / 2 / len(groups), freedom))
    return [(name, len(values), float(values.mean())) for name, values in groups
            if min(abs(values.mean()), abs(np.median(values))) > limit / np.sqrt(len(values))]  # fmt: skip


def robust_sd(residuals: Array) -> float:
    return 1.4826 * max(float(np.median(np.abs(residuals))), 1e-4)


def outlying(residuals: Array) -> NDArray[np.bool_]:
    """The rule, stated before looking: more than 5 robust standard deviations (1.4826 x the median) off."""
    return np.abs(residuals) > 5 * robust_sd(residuals)
