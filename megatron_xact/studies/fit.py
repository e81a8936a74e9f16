"""One law for the runs of one activation: its form, its intervals, what it says about a budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xact.studies import solver, uncertainty
from megatron_xact.studies.bars import bar
from megatron_xact.studies.diagnostics import outlying
from megatron_xact.studies.forms import (
    Trial,
    choose,
    predict_largest,
    problem_of,
    relative_errors,
    require,
    require_slope,
    solve,
)
from megatron_xact.studies.law import Array, Law, Problem, identifiable
from megatron_xact.studies.solver import EXPONENTS, Optima
from megatron_xact.studies.table import Table
from megatron_xact.studies.uncertainty import Draws, Profile, percentiles

QUANTITIES = ("E", "A", "B", "alpha", "beta", "a_opt", "gamma")
UNDETERMINED = 1000  # high / low of an interval: what is not worth a number


@dataclass(frozen=True)
class Fit:
    """A fitted law with everything that says how far to trust it. Arrays run over the runs of `table`."""

    table: Table
    form: str
    why: str  # the reason for the form
    law: Law
    objective: float
    gradient: float
    starts: tuple[int, int]  # how many starts reached the optimum, of how many
    residuals: Array  # predicted / measured - 1
    trials: tuple[Trial, ...]  # what the form was chosen by; empty where sizes were too few
    largest: tuple[Trial, ...]  # the same with only the largest size left out
    draws: tuple[Draws, ...]  # of the form; and of the free one too, where `auto` chose the tied one
    seed: int
    profile: Profile  # of the freest form that was drawn
    robust: Law | None  # without outliers, where there are any
    outliers: NDArray[np.bool_]
    activation: str

    def interval(self, quantity: str, level: float = 0.95) -> tuple[float, float]:
        """nan where the noise is not known."""
        return self._both([quantity_of(laws, quantity) for d in self.draws for laws in d.every], level)

    def determined(self, quantity: str) -> tuple[bool, bool]:
        """Does the low end of the interval say something, does the high one? Not where the law itself ends there, nor
        where they are a factor of UNDETERMINED apart. True where there is no interval.
        """
        low, high = self.interval(quantity)
        if quantity in ("A", "B"):
            both = not high > UNDETERMINED * low
            return both, both
        least, greatest = {"E": (1e-3, np.inf), "a_opt": (0.02, 0.98), "gamma": (EXPONENTS[0], np.inf)}.get(
            quantity, (2 * EXPONENTS[0], EXPONENTS[1] / 2))  # fmt: skip
        return not low < least, not high > greatest

    def _both(self, drawn: list[Array], level: float) -> tuple[float, float]:
        """From the least to the greatest end of the intervals of every bootstrap and form: equal exponents are a
        choice that predicts well, not something that was measured.
        """
        ends = np.array([percentiles(values, level) for values in drawn])
        return float(ends[:, 0].min()), float(ends[:, 1].max())

    def optimal(self, flops: float) -> dict[str, tuple[float, float, float]]:
        """Compute-optimal params, tokens and loss for 6 N D = flops, each (value, low, high), at 95 %."""
        value = _optimum(self.law, flops)
        drawn = [_optimum(laws, flops) for d in self.draws for laws in d.every]
        names = ("params", "tokens", "loss")
        return {name: (float(value[i]), *self._both([d[i] for d in drawn], 0.95)) for i, name in enumerate(names)}


def quantity_of(law: Law, quantity: str) -> Array:
    if quantity in ("A", "B"):
        return np.exp(getattr(law, f"log_{quantity}"))
    return np.asarray(getattr(law, quantity))


def _optimum(law: Law, flops: float) -> tuple[Array, Array, Array]:
    """Params, tokens and loss; of many laws each at its own optimum: what the best model of that budget would reach."""
    N, D = law.optimal(flops)
    terms = np.exp(law.log_A - law.alpha * np.log(N)) + np.exp(law.log_B - law.beta * np.log(D))
    return N, D, law.E + terms


def fit(
    table: Table, *, form: str = "auto", hold_out: int | None = None, bootstraps: int = 1000, seed: int = 0,
    workers: int | None = None,
) -> Fit:  # fmt: skip
    """The law of the runs of one activation.

    form: free, tied, or auto: that which predicts the held-out largest sizes better. hold_out: how many sizes those
    are (default: a third of them). Results depend on `seed`, not on `workers`.
    """
    activations = table.activations
    if len(activations) != 1:
        raise ValueError(f"a law is of one activation; the table has {', '.join(activations)}")
    what = f"{table.name}, {activations[0]}"
    least = "tied" if form == "auto" else form
    require(table, what, least)
    require_slope(solve(table, least), table, what)  # before all that takes long
    if hold_out and (left := len(table.sizes) - hold_out) < 3:
        raise ValueError(f"{what}: without its {hold_out} largest sizes there are {max(0, left)} left, and a law in N "
                         "needs at least 3; hold out fewer")  # fmt: skip
    drawn = {"bootstraps": bootstraps, "seed": seed, "workers": workers}
    trials = tuple(predict_largest(table, hold_out, **drawn))
    largest = trials if trials and len(trials[0].held_out) == 1 else tuple(predict_largest(table, 1, **drawn))
    chosen, why = choose(form, trials, table)
    fitted = _draw(table, chosen, **drawn)
    problem, found, draws = fitted
    law = problem.law(found.phi[found.best])
    best = found.objective[found.best]
    residuals = relative_errors(law, table)
    outliers = outlying(residuals)
    assumed = form == "auto" and chosen == "tied"  # equal exponents, which nothing has shown
    free_too = assumed and identifiable(table.array("params"), table.array("tokens"), "free")
    freest = _draw(table, "free", **drawn) if free_too else fitted
    return Fit(
        table=table, form=chosen, why=why, law=law, objective=float(best), gradient=float(found.gradient[found.best]),
        starts=(int((found.objective <= best * (1 + 1e-9) + 1e-9).sum()), len(found.objective)),
        residuals=residuals, trials=trials, largest=largest,
        draws=(draws, freest[2]) if free_too else (draws,), seed=seed,
        profile=uncertainty.profile_of_E(*freest), outliers=outliers, activation=activations[0],
        robust=_without(table, chosen, outliers),
    )  # fmt: skip


def _draw(table: Table, form: str, bootstraps: int, seed: int, workers: int | None) -> tuple[Problem, Optima, Draws]:
    problem = problem_of(table, form)
    found = solver.solve(problem)
    rng = np.random.default_rng(seed)
    return problem, found, uncertainty.draw(problem, found.phi[found.best], table.runs, bootstraps, rng, workers)


def _without(table: Table, form: str, outliers: NDArray[np.bool_]) -> Law | None:
    if not outliers.any():
        return None
    left = Table([r for r, out in zip(table.runs, outliers, strict=True) if not out], table.name)
    try:
        require(left, "the rest", form)
    except ValueError:
        return None
    return solve(left, form)


def classical_check(fit: Fit) -> tuple[float, float, int]:
    """From the classical grid of starts: least objective, share of starts that reach it, number of starts. Slow."""
    problem = problem_of(fit.table, fit.form)
    starts = solver.classical_starts(problem)
    reached = []
    for part in bar(np.array_split(starts, max(1, len(starts) // 250)), "starts"):
        reached.append(solver.minimise(part, problem).objective)
    objective = np.concatenate(reached)
    return float(objective.min()), float((objective < objective.min() + 1e-4).mean()), len(starts)
