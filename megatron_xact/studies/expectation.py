"""Before anything is spent: how long a study will take, and how narrow the interval of its answer will be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_xact.pretraining.planning.counts import flops_per_token
from megatron_xact.studies.compare import compare
from megatron_xact.studies.ladder import Cell, Trunk, cells
from megatron_xact.studies.planning import Plan
from megatron_xact.studies.table import Run, Table

# E, A, alpha, B, beta of Hoffmann et al. (arXiv:2203.15556). Below its range it promises losses beyond that of a
# uniform guess, so its two terms are scaled down to be at most TERM at the smallest cell.
LAW = (1.69, 406.4, 0.34, 410.7, 0.28)
TERM = 1.5


@dataclass(frozen=True)
class Speed:
    """tokens_per_second of every (size, activation); `source`: where it is from; start: seconds before a first step."""

    source: str
    tokens_per_second: dict[tuple[str, str], float]
    start: float = 0.0

    def hours(self, trunk: Trunk) -> float:
        """Of a trunk and its cooldowns, on what the speed is of."""
        # A forward pass costs a third of a step.
        steps = trunk.steps + len(trunk.budgets) * trunk.evaluations / 3
        seconds = steps * trunk.batch / self.tokens_per_second[trunk.size, trunk.activation]
        return (seconds + len(trunk.budgets) * self.start) / 3600


def by_flops(plan: Plan, tokens_per_second: float) -> Speed:
    """From the speed of the largest size, at the same FLOP/s for all."""
    largest = max(plan.trunks, key=lambda t: t.params)
    rate = tokens_per_second * flops_per_token(largest.shape)
    speeds = {(t.size, t.activation): rate / flops_per_token(t.shape) for t in plan.trunks}
    told = f"--tokens-per-second {tokens_per_second:g} for {largest.size}, others by FLOPs, without starts"
    return Speed(told, speeds)


def hours_text(plan: Plan, speed: Speed) -> str:
    by_size: dict[str, float] = {}
    for t in plan.trunks:
        by_size[t.size] = by_size.get(t.size, 0.0) + speed.hours(t)
    told = ", ".join(f"{size} {hours:.3g}" for size, hours in by_size.items())
    return f"expected     {sum(by_size.values()):.3g} h one after the other ({told}); {speed.source}"


# -- the interval -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """Of simulated studies: the intervals of the multiplier, low and high [n]; `why_not`: there are none."""

    low: np.ndarray
    high: np.ndarray
    why_not: str = ""


def precision(plan: Plan, noise: float, multiplier: float, studies: int = 12) -> Precision:
    """A baseline and another activation worth `multiplier`, on this ladder, with runs that scatter by `noise` nat.

    Half of the variance is shared by the budgets of a trunk, which they continue.
    """
    rng, ends = np.random.default_rng(0), []
    first = plan.trunks[0]
    ladder = [c for c in cells(plan.trunks) if (c.trunk.activation, c.trunk.factor) == (first.activation, first.factor)]
    for _ in range(studies):
        try:
            found = compare(_simulated(ladder, noise, multiplier, rng), "baseline", "other", draws=200, seed=0)
        except ValueError as error:
            return Precision(np.array([]), np.array([]), str(error))
        ends.append((found.multiplier.low, found.multiplier.high))
    low, high = np.array(ends).T
    return Precision(low, high)


def _simulated(ladder: list[Cell], noise: float, multiplier: float, rng: np.random.Generator) -> Table:
    E, A, alpha, B, beta = LAW
    A = min(A, TERM * min(c.trunk.params for c in ladder) ** alpha)
    B = min(B, TERM * min(c.tokens for c in ladder) ** beta)
    share, runs, trunk_noise = beta / (alpha + beta), [], {}
    for name, m in (("baseline", 1.0), ("other", multiplier)):
        for c in ladder:
            trunk = f"{name} {c.trunk.name}"
            common = trunk_noise.setdefault(trunk, rng.normal(0, noise * 0.5**0.5))
            N, D = c.trunk.params * m**share, c.tokens * m ** (1 - share)
            loss = E + A * N**-alpha + B * D**-beta + common + rng.normal(0, noise * 0.5**0.5)
            runs.append(Run(activation=name, size=c.trunk.size, params=c.trunk.params, tokens=c.tokens,
                            seed=c.trunk.seed, loss=loss, trunk=trunk))  # fmt: skip
    return Table(runs, "simulated study")


def precision_text(plan: Plan, noise: float, multiplier: float) -> str:
    found = precision(plan, noise, multiplier)
    if found.why_not:
        return f"answer       no interval can be expected: {found.why_not}"
    none = precision(plan, noise, 1.0)
    width = float(np.median(np.maximum(none.high - 1, 1 - none.low)))
    seen = float(np.mean((found.low > 1) | (found.high < 1)))
    # A median of infinities: the runs say nothing.
    bounded = f"{width:.2%}".replace("%", " %") if np.isfinite(width) else "unbounded"
    return (
        f"answer       with {noise:g} nat of noise per run: a multiplier of {multiplier:g} would be given as "
        f"[{np.median(found.low):.3f}, {np.median(found.high):.3f}] (95 %) and told from 1 in "
        f"{seen * len(found.low):.0f} of {len(found.low)} simulated studies; no difference as 1 +- {bounded}. "
        f"Under a law with the exponents of Hoffmann et al. 2022; a flatter one widens it"
    )
