"""Which form of the law: what runs can determine, how well each form predicts the largest sizes, which is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_xact.studies import solver, uncertainty
from megatron_xact.studies.diagnostics import SIGNIFICANT, lack_of_fit
from megatron_xact.studies.law import FORMS, PARAMETERS, Array, Law, Problem, identifiable
from megatron_xact.studies.table import Table, budgets, plural


@dataclass(frozen=True)
class Trial:
    """One form of the law, fitted without the largest sizes and asked for their losses."""

    form: str
    held_out: tuple[str, ...]  # names of sizes
    errors: Array  # predicted / measured - 1, of their runs
    law: Law  # of the other sizes
    margins: Array | None = None  # [runs, 2] of the 95 % prediction interval / measured - 1; nan: noise not known

    @property
    def named(self) -> str:
        """The held-out sizes, in words."""
        if len(self.held_out) > 3:
            return f"the {len(self.held_out)} sizes from {self.held_out[0]}"
        return " and ".join(self.held_out)

    @property
    def rms(self) -> float:
        return float(np.sqrt((self.errors**2).mean()))

    @property
    def inside(self) -> int | None:
        """How many runs lie in their prediction intervals; None where there are none."""
        if self.margins is None or np.isnan(self.margins).any():
            return None
        return int(((self.margins[:, 0] <= 0) & (self.margins[:, 1] >= 0)).sum())


def require(table: Table, what: str, form: str = "tied") -> None:
    """ValueError, one line, unless the runs can determine the law in this form."""
    N, D = table.array("params"), table.array("tokens")
    least = PARAMETERS[form] + 1
    if len(table) < least:
        count = f"{plural(len(table), 'run')} {'is' if len(table) == 1 else 'are'}"
        raise ValueError(f"{what}: {count} too few for a law with {PARAMETERS[form]} parameters; {least} are "
                         "the least, and 3 sizes x 3 token budgets a start")  # fmt: skip
    if len(table.sizes) < 3:
        raise ValueError(f"{what}: {_names(table.sizes, 'size')}; a law in N needs at least 3")
    per_size = [len({b for r, b in zip(table.runs, budgets(table.runs), strict=True) if r.size == s})
                for s in table.sizes]  # fmt: skip
    if max(per_size) == 1 and not identifiable(N, D, form):  # an IsoFLOP study may train every size once
        ratios = D / N
        told = f" ({' to '.join(dict.fromkeys(f'{r:.3g}' for r in (ratios.min(), ratios.max())))} tokens per parameter)"
        raise ValueError(f"{what}: one token budget per size{told}; N and D cannot be told apart. "
                         "Train some sizes for other numbers of tokens too")  # fmt: skip
    if not identifiable(N, D, form):
        raise ValueError(f"{what}: its {len(table)} runs do not vary N and D independently enough for the {form} law; "
                         "add token budgets, best 3 or more for each of 3 sizes")  # fmt: skip


def require_slope(law: Law, table: Table, what: str) -> None:
    """ValueError unless losses fall along the law: by it nothing else would be worth a number."""
    predicted = law.loss(table.array("params"), table.array("tokens"))
    if np.ptp(predicted) < 1e-6 * predicted.mean():
        raise ValueError(f"{what}: the loss falls neither with parameters nor with tokens (by the best law it is "
                         f"{predicted.mean():.4g} everywhere); is its column the right one?")  # fmt: skip


def _names(names: list[str], word: str) -> str:
    return f"one {word} only ({names[0]})" if len(names) == 1 else f"{len(names)} {word}s ({', '.join(names)})"


def problem_of(table: Table, form: str) -> Problem:
    return Problem.of(table.array("params"), table.array("tokens"), table.array("loss"), form)


def solve(table: Table, form: str) -> Law:
    """The optimum alone."""
    problem = problem_of(table, form)
    found = solver.solve(problem)
    return problem.law(found.phi[found.best])


def relative_errors(law: Law, table: Table) -> Array:
    return law.loss(table.array("params"), table.array("tokens")) / table.array("loss") - 1


# -- hold-out ---------------------------------------------------------------------------------------------------------


def predict_largest(
    table: Table, sizes: int | None = None, *, bootstraps: int = 0, seed: int = 0, workers: int | None = None
) -> list[Trial]:
    """Both forms, fitted without the largest sizes (default: a third of them). Those that the rest can determine.

    bootstraps: of the prediction intervals; 0: none.
    """
    names = table.sizes
    count = sizes or max(1, round(len(names) / 3))
    held = tuple(names[-count:])
    rest, largest = table.where(lambda r: r.size not in held), table.where(lambda r: r.size in held)
    trials = []
    for form in FORMS:
        try:
            require(rest, "the rest", form)
        except ValueError:
            continue
        problem = problem_of(rest, form)
        found = solver.solve(problem)
        phi = found.phi[found.best]
        law, margins = problem.law(phi), None
        if bootstraps:
            rng = np.random.default_rng(seed)
            draws = uncertainty.draw(problem, phi, rest.runs, bootstraps, rng, workers)
            ends = draws.prediction(largest.array("params"), largest.array("tokens"), rng)
            margins = np.stack(ends, axis=1) / largest.array("loss")[:, None] - 1
        trials.append(Trial(form, held, relative_errors(law, largest), law, margins))
    return trials


def choose(form: str, trials: tuple[Trial, ...], table: Table) -> tuple[str, str]:
    """The form, and why: the one that was asked for; of auto the one that predicts the largest sizes better."""
    if form != "auto":
        return form, "as asked"
    by_form = {t.form: t for t in trials}
    if "free" not in by_form:
        return _choose_by_noise(table, f"{len(table.sizes)} sizes are too few to hold one out" if not by_form else
                                "without the largest sizes the runs do not determine two exponents")  # fmt: skip
    best = min(trials, key=lambda t: (t.rms, t.form != "tied"))
    told = ", ".join(f"{t.form} {t.rms:.2%}" for t in trials)
    return best.form, f"predicts {best.named} better from the smaller sizes (rms error: {told})"


def _choose_by_noise(table: Table, why: str) -> tuple[str, str]:
    """Tied, unless seeds show that it misses what the free form does not."""
    p = {form: lack_of_fit(relative_errors(solve(table, form), table), table, form) for form in FORMS
         if identifiable(table.array("params"), table.array("tokens"), form)}  # fmt: skip
    tied, free = p["tied"], p.get("free")
    if tied is None:
        return "tied", f"{why}, and no seeds repeat to choose by; the tied form extrapolates better"
    if tied >= SIGNIFICANT:
        return "tied", f"{why}; seeds do not contradict it (p = {tied:.2g}), and it extrapolates better"
    if free is None or (free < SIGNIFICANT and tied > SIGNIFICANT * free):
        both = "" if free is None else f", and the free one too (p = {free:.2g})"
        return "tied", f"{why}; but it misses these runs by more than their noise (p = {tied:.2g}){both}"
    does = "does not" if free >= SIGNIFICANT else "by far less"
    return "free", (f"{why}; the tied form misses these runs by more than their noise (p = {tied:.2g}), the free one "
                    f"{does} (p = {free:.2g})")  # fmt: skip
