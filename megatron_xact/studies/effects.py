"""Estimates out of pairs: sinh h of every pair under a law, its mean, its value by group, and what it changes with.

compare.py says what h is and where the two sources of an interval come from. Here laws come in numbers, [B]: those of
the bootstrap, or the fitted one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from megatron_xact.studies.law import Array, Law
from megatron_xact.studies.pairs import Ids, Pairs, column_of, differences, number

SIZE, TOKENS = "size", "tokens per parameter"  # what a multiplier may change with


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; (nan, nan) where the runs allow none."""

    value: float
    low: float
    high: float

    @np.errstate(over="ignore")  # noise has intervals up to infinity
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
class Effects:
    """Of every cluster under each of B laws: x = sinh h [B, G] and its weight [B, G]; gamma [B]: of the laws."""

    x: Array
    weight: Array
    gamma: Array

    def of(self, clusters: Array) -> Effects:
        """Those of some clusters, by their numbers."""
        return Effects(self.x[:, clusters], self.weight[:, clusters], self.gamma)

    def center(self) -> Array:
        """Weighted mean, [B]."""
        return (self.weight * self.x).sum(1) / self.weight.sum(1)

    def scatter(self) -> Array:
        """Weighted sum of squares around it, [B]."""
        return (self.weight * (self.x - self.center()[:, None]) ** 2).sum(1)

    def mean(self) -> tuple[Array, Array, Array]:
        """Weighted mean, its standard error and the degrees of freedom of that, [B].

        The weights are right where noise is constant in nats. Noise of small models and few tokens is often larger, and
        theirs are the largest weights, so the error comes from what each cluster contributes (HC2: MacKinnon and White,
        1985), with the degrees of freedom of Bell and McCaffrey (2002), which few heavy clusters leave few of. Where
        noise was a constant share of L - E, 95 % intervals from pooled scatter held 74 % instead.
        """
        share, mean = self.weight / self.weight.sum(1, keepdims=True), self.center()
        left = np.maximum(1 - share, 1e-12)
        error = np.sqrt((share**2 * (self.x - mean[:, None]) ** 2 / left).sum(1))
        spread = (share**2 * (1 - 2 * share) / left**2).sum(1) + (share**2 / left).sum(1) ** 2
        # From 1 to G - 1, which rounding leaves where one cluster has all of the weight.
        return mean, error, 1 / np.clip(spread, 1 / (share.shape[1] - 1), 1)

    def slope(self, z: Array) -> tuple[Array, Array]:
        """Weighted regression on z [G]: slope and its standard error, [B]."""
        total = self.weight.sum(1, keepdims=True)
        x = self.x - (self.weight * self.x).sum(1, keepdims=True) / total
        z = z - (self.weight * z).sum(1, keepdims=True) / total
        spread = (self.weight * z**2).sum(1)
        slope = (self.weight * z * x).sum(1) / spread
        left = (self.weight * (x - slope[:, None] * z) ** 2).sum(1) / (self.x.shape[1] - 2)
        return slope, np.sqrt(left / spread)


def of_pairs(law: Law, pairs: Pairs) -> tuple[Array, Array]:
    """sinh h by each pair and its weight: [n], or [B, n] for many laws. Corrects for params that are not equal."""
    D_a, D_b = column_of(pairs, 0, "tokens"), column_of(pairs, 1, "tokens")
    at_a, at_b = law.reducible(column_of(pairs, 0, "params"), D_a), law.reducible(column_of(pairs, 1, "params"), D_b)
    middle = (at_a + at_b) / 2
    return -(differences(pairs) - (at_b - at_a)) / (2 * middle), middle**2


def of_clusters(laws: Law, pairs: Pairs, ids: Ids) -> Effects:
    x, weight = of_pairs(laws, pairs)
    member = np.eye(int(ids.max()) + 1)[ids]
    total = weight @ member
    return Effects((weight * x) @ member / total, total, laws.gamma)


def _slopes(laws: Law, pairs: Pairs, ids: Ids, z: Array) -> Effects:
    """Slope of sinh h along z [n] inside every cluster where z varies, weighted by how far it does."""
    x, weight = of_pairs(laws, pairs)
    member = np.eye(int(ids.max()) + 1)[ids]
    z = z - ((weight * z) @ member / (weight @ member))[:, ids]
    spread = (weight * z**2) @ member
    varies = np.array([np.ptp(z[0, ids == i]) > 0.05 for i in range(member.shape[1])])
    return Effects(((weight * z * x) @ member)[:, varies] / spread[:, varies], spread[:, varies], laws.gamma)


# -- intervals --------------------------------------------------------------------------------------------------------


def mixture(gamma: Array, mean: Array, error: Array, freedom: Array | int) -> Callable[[float], float]:
    """Distribution function of ln m: under each law t around its mean, laws equally likely."""
    error = np.maximum(error, 1e-12)

    @np.errstate(over="ignore")
    def below(log_m: float) -> float:
        return float(special.stdtr(freedom, (np.sinh(gamma * log_m / 2) - mean) / error).mean())

    return below


def p_of_none(mean: Array, error: Array, freedom: Array | int) -> float:
    """p of the test that the mean is 0, two-sided; both tails are summed, since 1 - a tail knows no p below 1e-16."""
    t = mean / np.maximum(error, 1e-12)
    return min(1.0, 2 * min(float(special.stdtr(freedom, side * t).mean()) for side in (-1, 1)))


def estimate(value: float, distribution: Callable[[float], float], level: float) -> Estimate:
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


# -- one number for all? ----------------------------------------------------------------------------------------------


def by_group(law: Law, laws: Law, pairs: Pairs, ids: Ids, names: Sequence[str], level: float) -> dict[str, Estimate]:
    """m of the pairs of each name, in the order of the names' first pairs.

    A cluster may be spread over groups; what it has in one is a unit. Three units or more tell their own scatter: noise
    is often larger at small sizes and few tokens. Two cannot, and get that of all groups, with no more degrees of
    freedom than the clusters leave. (In simulations with noise a constant share of L - E, intervals of 95 % by the
    common scatter held 82 to 100 %, by their own 89 to 99 %.)
    """
    units = number(list(zip(ids, names, strict=True)))
    name_of = dict(zip(units, names, strict=True))
    groups = {name: np.array([u for u in name_of if name_of[u] == name]) for name in dict.fromkeys(names)}
    main, effects = of_clusters(law[None], pairs, units), of_clusters(laws, pairs, units)
    scatter = sum(effects.of(group).scatter() for group in groups.values())
    common = min(len(name_of) - len(groups), int(ids.max()))  # degrees of freedom
    found = {}
    for name, group in groups.items():
        value = float(2 * np.arcsinh(main.of(group).center()[0]) / law.gamma)
        here = effects.of(group)
        if len(group) > 2:
            interval = estimate(value, mixture(laws.gamma, *here.mean()), level)
        elif common > 0:
            error = np.sqrt(scatter / common / here.weight.sum(1))
            interval = estimate(value, mixture(laws.gamma, here.center(), error, common), level)
        else:
            interval = Estimate(value, np.nan, np.nan)
        found[name] = interval.exp()
    return found


def shares(law: Law, pairs: Pairs) -> dict[str, float]:
    """Of the weight in the multiplier, by size."""
    _, weight = of_pairs(law, pairs)
    sizes = [a.size for a, _ in pairs]
    return {s: float(weight[[t == s for t in sizes]].sum() / weight.sum()) for s in dict.fromkeys(sizes)}


def trends(law: Law, laws: Law, pairs: Pairs, ids: Ids, level: float) -> dict[str, Trend | str]:
    """Along SIZE by regression over clusters, along TOKENS by the slopes inside ladders (one size and seed): clusters
    are often whole ladders, whose means tell nothing about tokens. Or why one could not be tested.
    """
    log_N, log_D = np.log(column_of(pairs, 0, "params")), np.log(column_of(pairs, 0, "tokens"))
    main, effects = of_clusters(law[None], pairs, ids), of_clusters(laws, pairs, ids)
    found: dict[str, Trend | str] = {}
    z = np.bincount(ids, log_N) / np.bincount(ids)
    if len(z) < 3 or np.ptp(z) < 0.05:
        found[SIZE] = "it needs pairs of two sizes and three independent ones"
    else:
        found[SIZE] = _trend(main.slope(z)[0], *effects.slope(z), law, laws, len(z) - 2, level)
    ladders = number([(a.size, a.seed) for a, _ in pairs])
    main, slopes = (_slopes(of, pairs, ladders, log_D - log_N) for of in (law[None], laws))
    if slopes.x.shape[1] < 2:
        found[TOKENS] = "it needs two sizes or seeds with pairs at two token budgets each"
    else:
        mean, error, freedom = slopes.mean()
        found[TOKENS] = _trend(main.mean()[0], mean, error, law, laws, freedom, level)
    return found


def _trend(main: Array, slope: Array, error: Array, law: Law, laws: Law, freedom: Array | int, level: float) -> Trend:
    """main: the slope under the fitted law [1]; slope and error: under all [B]."""
    value = float(2 * main[0] / law.gamma)
    distribution = mixture(laws.gamma, slope, error, freedom)
    return Trend(estimate(value, distribution, level), p_of_none(slope, error, freedom))
