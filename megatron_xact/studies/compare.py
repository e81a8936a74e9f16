"""What one activation is worth against a baseline, in compute: m with L_other(C) = L_baseline(m C).

Runs are paired by size, token budget and seed. With a common law L = E + R(N, D), the baseline has E + R e^h and the
other E + R e^-h, so that a pair's difference is -2 R sinh h, and ln m = 2 h / gamma: the baseline reaches the other's
loss with m times the compute, spent in the proportion of the frontier. Swapping the two gives 1/m exactly.

The interval has two sources. *Noise of the differences*: pairs, or whole trunks where runs branch from one, are
collapsed to one number each, and what each contributes to the scatter gives a t distribution. *The law*: what a loss
difference is worth in compute depends on E and the exponents, so the law is refitted to resampled residuals (wild
bootstrap by the same clusters, which keeps the design) and the interval is that of the mixture over these laws. At m =
1 the law cancels: the test of "no difference" is a t test.

The law here has free exponents. The tied form extrapolates better (forms.py), but where alpha and beta differ it prices
a nat wrongly: in simulations with 0.27 and 0.16 the 95 % interval of m = 1.05 then held it in 0 of 100 studies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from megatron_xact.studies import effects, solver
from megatron_xact.studies.diagnostics import SIGNIFICANT, outlying
from megatron_xact.studies.effects import Estimate, Trend, t_interval
from megatron_xact.studies.forms import require, require_slope
from megatron_xact.studies.law import PARAMETERS, Array, Law, Problem
from megatron_xact.studies.pairs import (
    Ids,
    Interval,
    Pairs,
    clusters,
    column_of,
    differences,
    keys,
    number,
    pair,
    ratio,
)
from megatron_xact.studies.table import Run, Table, ratio_names


@dataclass(frozen=True)
class Comparison:
    """Of `other` against `baseline`. Multipliers above 1: the other needs less compute for the same loss."""

    baseline: str
    other: str
    pairs: tuple[tuple[Run, Run], ...]
    unpaired: int  # runs of the two that have no partner; the law uses them
    level: float
    clusters: int
    clustered_by: str
    multiplier: Estimate
    p: float  # of no difference
    difference: Estimate  # mean of the paired loss differences, other - baseline, nats
    by_size: dict[str, Estimate]
    by_tokens: dict[str, Estimate]  # per parameter
    shares: dict[str, float]  # of the weight in `multiplier`, by size
    trends: dict[str, Trend | str]  # along effects.SIZE and effects.TOKENS, or why that was not tested
    step_time: Estimate | None  # other / baseline
    wall_clock: Estimate | None  # multiplier of time
    law: Law
    form: str  # of the law
    params_ratio: Interval  # other / baseline, least and greatest
    flops_ratio: Interval | None
    outliers: tuple[tuple[Run, Run], ...]  # pairs far from the others
    without: Comparison | None = None  # those; None where there are none, or the rest is too little

    @property
    def detected(self) -> bool:
        return not self.multiplier.holds(1.0)

    @property
    def changes_with(self) -> list[str]:
        """The variables along which a trend was found: where there is one, no single number describes the pairs."""
        return _changing(self.trends)

    @property
    def excluded(self) -> float:
        """A deviation of m from 1, as a factor minus 1, that is excluded at the level; inf if none is."""
        low = self.multiplier.low  # 0: an open end of the interval
        return max(self.multiplier.high, 1 / low if low else np.inf) - 1


def _changing(trends: dict[str, Trend | str]) -> list[str]:
    return [name for name, t in trends.items() if isinstance(t, Trend) and t.p < SIGNIFICANT]


def compare(
    table: Table, baseline: str, other: str, *, form: str = "auto", cluster: str = "auto", level: float = 0.95,
    draws: int = 1000, seed: int = 0, workers: int | None = None,
) -> Comparison:  # fmt: skip
    """cluster: what is independent: "pair", "ladder" (all budgets of one size and seed), or "auto": the column `trunk`
    where there is one, else pairs unless the budgets of a ladder look alike. Results depend on `seed`, not `workers`.

    form: of the law: "free", "tied", or "auto": free, or tied where that says nothing because these runs cannot tell
    the exponents of N and D apart (one of them lies at its bound, or the interval is open).
    """
    if baseline == other:
        raise ValueError(f"{baseline} cannot be compared with itself; seeds of one activation are not two activations")
    asked = {"baseline": baseline, "other": other, "cluster": cluster, "level": level, "draws": draws, "seed": seed,
             "workers": workers}  # fmt: skip
    found = _by_form(table, form, **asked)
    if not found.outliers:
        return found
    out = {id(r) for both in found.outliers for r in both}
    try:
        return replace(found, without=_by_form(table.where(lambda r: id(r) not in out), form, **asked))
    except ValueError:
        return found


def _by_form(table: Table, form: str, **asked) -> Comparison:
    """form: free, tied or auto, see `compare`."""
    if form != "auto":
        return _compare(table, form, **asked)
    free = _compare(table, "free", **asked)
    at_bound = min(float(free.law.alpha), float(free.law.beta)) <= 1.01 * solver.EXPONENTS[0]
    return _compare(table, "tied", **asked) if at_bound or not np.isfinite(free.excluded) else free


def _compare(
    table: Table, form: str, baseline: str, other: str, cluster: str, level: float, draws: int, seed: int,
    workers: int | None,
) -> Comparison:  # fmt: skip
    table = table.only(baseline, other)
    pairs = pair(table.runs, baseline, other, table.name)
    require(table, f"{table.name}, {baseline} and {other}", form)
    distinct = len(set(keys(table.runs)))
    if distinct <= PARAMETERS[form]:
        raise ValueError(f"{table.name}: {distinct} cells of size, tokens and seed are too few for a law with "
                         f"{PARAMETERS[form]} parameters; {PARAMETERS[form] + 1} are the least")  # fmt: skip
    problem, phi, half = common_law(table, pairs, other, form)
    law = problem.law(phi)
    require_slope(law, table, f"{table.name}, {baseline} and {other}")
    ids, clustered_by = clusters(pairs, effects.of_pairs(law, pairs)[0], cluster)
    count = int(ids.max()) + 1
    if count < 2:
        raise ValueError(f"{table.name}: all pairs of {baseline} and {other} are one of the {clustered_by}; without a "
                         "second one nothing tells effect from noise")  # fmt: skip
    laws = problem.law(_refit(problem, phi, table, pairs, ids, draws, np.random.default_rng(seed), workers))
    value = 2 * half / float(law.gamma)
    mean, error, freedom = effects.of_clusters(laws, pairs, ids).mean()
    multiplier = effects.estimate(value, effects.mixture(laws.gamma, mean, error, freedom), level)
    trends = effects.trends(law, laws, pairs, ids, level)
    time = _log_step_time(pairs, level)
    return Comparison(
        baseline=baseline, other=other, pairs=tuple(pairs), unpaired=len(table) - 2 * len(pairs), level=level,
        clusters=count, clustered_by=clustered_by, multiplier=multiplier.exp(),
        p=effects.p_of_none(mean, error, freedom), difference=t_interval(differences(pairs), ids, level),
        by_size=effects.by_group(law, laws, pairs, ids, [a.size for a, _ in pairs], level),
        by_tokens=_by_tokens(law, laws, pairs, ids, level), shares=effects.shares(law, pairs), trends=trends,
        step_time=time and time.exp(), wall_clock=time and _minus(multiplier, time).exp(), law=law, form=form,
        params_ratio=ratio(pairs, "params"), flops_ratio=ratio(pairs, "flops"), outliers=_outliers(law, pairs, trends),
    )  # fmt: skip


# -- the law ----------------------------------------------------------------------------------------------------------


def common_law(table: Table, pairs: Pairs, other: str, form: str) -> tuple[Problem, Array, float]:
    """The law halfway between the two, of all their runs, and h: found in turns, since each needs the other."""
    N, D, L = (table.array(c) for c in ("params", "tokens", "loss"))
    side = np.array([1.0 if r.activation == other else -1.0 for r in table.runs])
    problem = Problem.of(N, D, L, form)
    found = solver.solve(problem, starts=3)
    phi, half = found.phi[found.best], np.inf
    for _ in range(50):
        law = problem.law(phi)
        x, weight = effects.of_pairs(law, pairs)
        new = float(np.arcsinh((weight * x).sum() / weight.sum()))
        if abs(new - half) < 1e-10:
            break
        half = new
        # An optimum on its way to E = 0 must not be followed below the measured losses.
        level = min(float(law.E), 0.999 * L.min())
        problem = Problem.of(N, D, level + (L - level) * np.exp(side * half), form)
        phi = solver.minimise(phi[None], problem).phi[0]
    return problem, phi, half


def _refit(
    problem: Problem, phi: Array, table: Table, pairs: Pairs, ids: Ids, draws: int,
    rng: np.random.Generator, workers: int | None,
) -> Array:  # fmt: skip
    """Wild bootstrap: residuals with random signs by cluster, widened for the parameters that the fit used up."""
    cluster_of = {id(r): i for p, i in zip(pairs, ids, strict=True) for r in p}
    cells = keys(table.runs)
    numbers = number([cluster_of.get(id(r), cell) for r, cell in zip(table.runs, cells, strict=True)])
    count = len(set(cells))
    predicted = np.logaddexp.reduce(problem.terms @ phi, axis=1)
    wide = (problem.y - predicted) * np.sqrt(count / (count - len(phi)))
    signs = rng.choice([-1.0, 1.0], (draws, int(numbers.max()) + 1))[:, numbers]
    return solver.minimise(np.tile(phi, (draws, 1)), problem, y=predicted + signs * wide, workers=workers).phi


def tied_multiplier(table: Table, baseline: str, other: str) -> float:
    """m under a law with one exponent: beside that of `compare` it tells how much the law matters."""
    table = table.only(baseline, other)
    problem, phi, half = common_law(table, pair(table.runs, baseline, other, table.name), other, "tied")
    return float(np.exp(2 * half / problem.law(phi).gamma))


# -- estimates --------------------------------------------------------------------------------------------------------


def _by_tokens(law: Law, laws: Law, pairs: Pairs, ids: Ids, level: float) -> dict[str, Estimate]:
    names = ratio_names([a for a, _ in pairs])
    found = effects.by_group(law, laws, pairs, ids, names, level)
    return {name: found[name] for name in sorted(found, key=float)}


def _outliers(law: Law, pairs: Pairs, trends: dict[str, Trend | str]) -> tuple[tuple[Run, Run], ...]:
    """By the rule of fits, for what a pair's difference is away from that of a typical pair, in nats: of its size and
    tokens, where the multiplier changes with them. Their slopes are medians of all pairs of points (Theil and Sen), so
    that what is far off does not hide itself.
    """
    x, weight = effects.of_pairs(law, pairs)
    log_N, log_D = np.log(column_of(pairs, 0, "params")), np.log(column_of(pairs, 0, "tokens"))
    for name, z in ((effects.SIZE, log_N), (effects.TOKENS, log_D - log_N)):
        if name in _changing(trends):
            x = x - stats.theilslopes(x, z).slope * z
    away = 2 * np.sqrt(weight) * (x - np.median(x))
    return tuple(both for both, out in zip(pairs, outlying(away), strict=True) if out)


def _log_step_time(pairs: Pairs, level: float) -> Estimate | None:
    """ln of other / baseline over the pairs that measured both; a size is one measurement, whatever its seeds."""
    timed = [p for p in pairs if all(r.step_time_s for r in p)]
    if not timed:
        return None
    ratios = np.log(column_of(timed, 1, "step_time_s") / column_of(timed, 0, "step_time_s"))
    return t_interval(ratios, number([a.size for a, _ in timed]), level)


def _minus(a: Estimate, b: Estimate) -> Estimate:
    """a - b of independent estimates whose intervals need not be symmetric (MOVER: Zou and Donner, 2008)."""
    value = a.value - b.value
    low = value - np.hypot(a.value - a.low, b.high - b.value)
    return Estimate(value, low, value + np.hypot(a.high - a.value, b.value - b.low))
