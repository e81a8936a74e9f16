"""What one activation is worth against a baseline, in compute: m with L_other(C) = L_baseline(m C).

Runs are paired by size, token budget and seed. With a common law L = E + R(N, D), the baseline has E + R e^h and the
other E + R e^-h, so that a pair's difference is -2 R sinh h, and ln m = 2 h / gamma: m N^.. parameters and tokens, in
the proportion of the frontier, would take the baseline to the other's loss. Swapping the two gives 1/m exactly.

The interval has two sources. *Noise of the differences*: pairs, or whole trunks where runs branch from one, are
collapsed to one number each, and their scatter gives a t distribution. *The law*: what a loss difference is worth in
compute depends on E and the exponents, so the law is refitted to resampled residuals (wild bootstrap by the same
clusters, which keeps the design) and the interval is that of the mixture over these laws. At m = 1 the law cancels:
the test of "no difference" is a t test.

The law here has free exponents. The tied form extrapolates better (fit.py), but where alpha and beta differ it prices a
nat wrongly: in simulations with 0.27 and 0.16 the 95 % interval of m = 1.05 then held it in 0 of 100 studies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import optimize, special, stats

from megatron_xact.studies import solver
from megatron_xact.studies.fit import require
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
from megatron_xact.studies.table import Run, Table


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; (nan, nan) where the runs allow none."""

    value: float
    low: float
    high: float

    def exp(self) -> Estimate:
        return Estimate(*(float(np.exp(v)) for v in (self.value, self.low, self.high)))

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Trend:
    """Does ln m change along a variable? `slope`: change of ln m per factor e."""

    slope: Estimate
    p: float


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
    trends: dict[str, Trend]  # along "size" and "tokens per parameter"
    step_time: Estimate | None  # other / baseline
    wall_clock: Estimate | None  # multiplier of time
    law: Law
    form: str  # of the law
    params_ratio: Interval  # other / baseline, least and greatest
    flops_ratio: Interval | None

    @property
    def detected(self) -> bool:
        return not self.multiplier.holds(1.0)

    @property
    def excluded(self) -> float:
        """A deviation of m from 1, as a factor minus 1, that is excluded at the level; inf if none is."""
        low = self.multiplier.low  # 0: an open end of the interval
        return max(self.multiplier.high, 1 / low if low else np.inf) - 1


@dataclass(frozen=True)
class Effects:
    """Of every cluster under each of B laws: x = sinh h [B, G] and its weight [B, G]; gamma [B]: of the laws."""

    x: Array
    weight: Array
    gamma: Array

    def mean(self) -> tuple[Array, Array]:
        """Weighted mean and its standard error, [B]."""
        total = self.weight.sum(1)
        mean = (self.weight * self.x).sum(1) / total
        scatter = (self.weight * (self.x - mean[:, None]) ** 2).sum(1) / (self.x.shape[1] - 1)
        return mean, np.sqrt(scatter / total)

    def slope(self, z: Array) -> tuple[Array, Array]:
        """Weighted regression on z [G]: slope and its standard error, [B]."""
        total = self.weight.sum(1, keepdims=True)
        x = self.x - (self.weight * self.x).sum(1, keepdims=True) / total
        z = z - (self.weight * z).sum(1, keepdims=True) / total
        spread = (self.weight * z**2).sum(1)
        slope = (self.weight * z * x).sum(1) / spread
        left = (self.weight * (x - slope[:, None] * z) ** 2).sum(1) / (self.x.shape[1] - 2)
        return slope, np.sqrt(left / spread)


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
    if form == "auto":
        tried = partial(compare, table, baseline, other, cluster=cluster, level=level, draws=draws, seed=seed,
                        workers=workers)  # fmt: skip
        free = tried(form="free")
        at_bound = min(float(free.law.alpha), float(free.law.beta)) <= 1.01 * solver.EXPONENTS[0]
        return tried(form="tied") if at_bound or not np.isfinite(free.excluded) else free
    runs = table.only(baseline).runs + table.only(other).runs
    table = table.where(lambda r: r.activation in (baseline, other))
    pairs = pair(runs, baseline, other, table.name)
    require(table, f"{table.name}, {baseline} and {other}", form)
    distinct = len(set(keys(table.runs)))
    if distinct <= PARAMETERS[form]:
        raise ValueError(f"{table.name}: {distinct} cells of size, tokens and seed are too few for a law with "
                         f"{PARAMETERS[form]} parameters; {PARAMETERS[form] + 1} are the least")  # fmt: skip
    problem, phi, half = common_law(table, pairs, other, form)
    law = problem.law(phi)
    ids, clustered_by = clusters(pairs, _x(law, pairs)[0], cluster)
    count = int(ids.max()) + 1
    if count < 2:
        raise ValueError(f"{table.name}: all pairs of {baseline} and {other} are one of the {clustered_by}; without a "
                         "second one nothing tells effect from noise")  # fmt: skip
    laws = problem.law(_refit(problem, phi, table, pairs, ids, draws, np.random.default_rng(seed), workers))
    effects = _effects(laws, pairs, ids)
    value = 2 * half / float(law.gamma)
    distribution = _mixture(*effects.mean(), laws.gamma, count - 1)
    p = distribution(0.0)
    return Comparison(
        baseline=baseline, other=other, pairs=tuple(pairs), unpaired=len(table) - 2 * len(pairs), level=level,
        clusters=count, clustered_by=clustered_by, multiplier=_estimate(value, distribution, level).exp(),
        p=2 * min(p, 1 - p), difference=t_interval(differences(pairs), ids, level),
        by_size=_by_size(law, laws, pairs, ids, level), trends=_trends(law, effects, laws, pairs, ids, level),
        step_time=(time := _step_time(pairs, level)) and time.exp(),
        wall_clock=time and _minus(_estimate(value, distribution, level), time).exp(), law=law,
        form=form,
        params_ratio=ratio(pairs, "params"), flops_ratio=ratio(pairs, "flops"),
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
        x, weight = _x(law, pairs)
        new = float(np.arcsinh((weight * x).sum() / weight.sum()))
        if abs(new - half) < 1e-10:
            break
        half = new
        # An optimum on its way to E = 0 must not be followed below the measured losses.
        level = min(float(law.E), 0.999 * L.min())
        problem = Problem.of(N, D, level + (L - level) * np.exp(side * half), form)
        phi = solver.minimise(phi[None], problem).phi[0]
    return problem, phi, half


def _x(law: Law, pairs: Pairs) -> tuple[Array, Array]:
    """sinh h by each pair and its weight: [n], or [B, n] for many laws. Corrects for params that are not equal."""
    D_a, D_b = column_of(pairs, 0, "tokens"), column_of(pairs, 1, "tokens")
    at_a, at_b = law.reducible(column_of(pairs, 0, "params"), D_a), law.reducible(column_of(pairs, 1, "params"), D_b)
    middle = (at_a + at_b) / 2
    return -(differences(pairs) - (at_b - at_a)) / (2 * middle), middle**2


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
    table = table.where(lambda r: r.activation in (baseline, other))
    problem, phi, half = common_law(table, pair(table.runs, baseline, other, table.name), other, "tied")
    return float(np.exp(2 * half / problem.law(phi).gamma))


# -- estimates --------------------------------------------------------------------------------------------------------


def _effects(laws: Law, pairs: Pairs, ids: Ids) -> Effects:
    x, weight = _x(laws, pairs)
    member = np.eye(int(ids.max()) + 1)[ids]
    total = weight @ member
    return Effects((weight * x) @ member / total, total, laws.gamma)


def _mixture(mean: Array, error: Array, gamma: Array, freedom: int) -> Callable[[float], float]:
    """Distribution function of ln m: under each law t around its mean, laws equally likely."""
    error = np.maximum(error, 1e-12)
    return lambda log_m: float(special.stdtr(freedom, (np.sinh(gamma * log_m / 2) - mean) / error).mean())


def _estimate(value: float, distribution: Callable[[float], float], level: float) -> Estimate:
    def quantile(q: float) -> float:
        width = 0.01
        while not (distribution(value - width) < q < distribution(value + width)):
            width *= 2
            if width > 20:  # a factor of 5e8: these runs say nothing
                return -np.inf if q < 0.5 else np.inf
        return optimize.brentq(lambda v: distribution(v) - q, value - width, value + width, xtol=1e-10)

    return Estimate(value, quantile((1 - level) / 2), quantile((1 + level) / 2))


def t_interval(values: Array, ids: Ids, level: float) -> Estimate:
    """Of the mean over clusters, which are independent of each other; a cluster weighs the same whatever its size."""
    means = np.bincount(ids, values) / np.bincount(ids)
    center = float(means.mean())
    if len(means) < 2:
        return Estimate(center, np.nan, np.nan)
    half = stats.t.ppf((1 + level) / 2, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means))
    return Estimate(center, center - half, center + half)


def _by_size(law: Law, laws: Law, pairs: Pairs, ids: Ids, level: float
             ) -> dict[str, Estimate]:  # fmt: skip
    """m at each size, with the scatter within sizes pooled: one size alone has too few pairs to know its own."""
    main, effects = _effects(law[None], pairs, ids), _effects(laws, pairs, ids)
    size_of = {int(i): a.size for i, (a, _) in zip(ids, pairs, strict=True)}
    sizes = list(dict.fromkeys(size_of.values()))
    groups = [np.array([c for c in size_of if size_of[c] == s]) for s in sizes]
    freedom = effects.x.shape[1] - len(sizes)
    means = [(effects.weight[:, g] * effects.x[:, g]).sum(1) / effects.weight[:, g].sum(1) for g in groups]
    scatter = sum((effects.weight[:, g] * (effects.x[:, g] - m[:, None]) ** 2).sum(1)
                  for g, m in zip(groups, means, strict=True))  # fmt: skip
    found = {}
    for size, g, mean in zip(sizes, groups, means, strict=True):
        x = (main.weight[0, g] * main.x[0, g]).sum() / main.weight[0, g].sum()
        value = float(2 * np.arcsinh(x) / law.gamma)
        if freedom < 1:
            found[size] = Estimate(value, np.nan, np.nan).exp()
            continue
        error = np.sqrt(scatter / freedom / effects.weight[:, g].sum(1))
        found[size] = _estimate(value, _mixture(mean, error, laws.gamma, freedom), level).exp()
    return found


def _trends(law: Law, effects: Effects, laws: Law, pairs: Pairs, ids: Ids, level: float
            ) -> dict[str, Trend]:  # fmt: skip
    main = _effects(law[None], pairs, ids)
    log_N, log_D = np.log(column_of(pairs, 0, "params")), np.log(column_of(pairs, 0, "tokens"))
    found = {}
    for name, z in (("size", log_N), ("tokens per parameter", log_D - log_N)):
        z = np.bincount(ids, z) / np.bincount(ids)
        if len(z) < 3 or np.ptp(z) < 0.05:
            continue
        slope, error = effects.slope(z)
        value = float(2 * main.slope(z)[0][0] / law.gamma)
        distribution = _mixture(slope, error, laws.gamma, len(z) - 2)
        below = distribution(0.0)
        found[name] = Trend(_estimate(value, distribution, level), 2 * min(below, 1 - below))
    return found


def _step_time(pairs: Pairs, level: float) -> Estimate | None:
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
