"""Fits and comparisons in sentences, for the terminal and the report: what was found, and what was not."""

from __future__ import annotations

import math

import numpy as np

from megatron_xact.studies import fit as fitting
from megatron_xact.studies.compare import Comparison, Estimate
from megatron_xact.studies.fit import QUANTITIES, Fit
from megatron_xact.studies.pairs import column_of
from megatron_xact.studies.table import format_count

UNRESOLVED = 0.05  # of p: what is called a trend
UNDETERMINED = 1000  # high / low of an interval: what is not worth a number


def lines(title: str, told: list[tuple[str, str]]) -> str:
    """(subject, sentence) pairs in two columns under a title."""
    width = max(len(subject) for subject, _ in told)
    return "\n".join([title, *(f"  {subject:{width}}  {sentence}" for subject, sentence in told)])


def law_of(fit: Fit) -> str:
    """L = 1.69 + 406 N^-0.34 + 411 D^-0.28"""
    E, A, B, alpha, beta = (float(fitting.quantity_of(fit.law, q)) for q in ("E", "A", "B", "alpha", "beta"))
    return f"L = {E:.4g} + {A:.4g} N^-{alpha:.3g} + {B:.4g} D^-{beta:.3g}"


def of_fit(fit: Fit, flops: list[float]) -> list[tuple[str, str]]:
    """(subject, sentence) pairs."""
    told = [("runs", fitting.describe(fit.table)), ("law", law_of(fit)), ("form", f"{fit.form}: {fit.why}")]
    told += [(q, quantity(fit, q)) for q in QUANTITIES]
    low, high = (f"{end:.4g}" if math.isfinite(end) else "unbounded" for end in fit.profile_interval_of_E())
    told.append(("E by profile", f"{low} .. {high} (95 % by an F test on the profiled objective)"))
    redrawn = f"; {fit.redrawn} resamples that could not determine a law were drawn again" if fit.redrawn else ""
    told.append(("intervals", f"95 % of {len(fit.draws.alpha)} bootstraps over runs, seed {fit.seed}{redrawn}"))
    told.append(("optimum", f"objective {fit.objective:.6g}, reached from {fit.starts[0]} of {fit.starts[1]} starts, "
                            f"largest gradient {fit.gradient:.0e}"))  # fmt: skip
    told += [(f"without {' and '.join(t.held_out)}", trial(t)) for t in (*fit.trials, *_only_new(fit))]
    for key in ("size", "tokens per parameter"):
        groups = ", ".join(f"{name} {mean:+.2%}" for name, _, mean, _ in fitting.residuals_by(fit, key))
        told.append((f"residuals by {key}", groups))
    told.append(("misfit", misfit(fit)))
    told.append(("outliers", outliers(fit)))
    told += [(f"{c:.3g} FLOPs", optimum(fit, c)) for c in flops]
    return told


def _only_new(fit: Fit) -> list[fitting.Trial]:
    known = {t.held_out for t in fit.trials}
    return [t for t in fit.largest if t.held_out not in known]


def quantity(fit: Fit, q: str) -> str:
    if fit.form == "tied" and q == "a_opt":
        return "0.5 by the tied form, not by measurement"
    if fit.form == "tied" and q == "beta":
        return "= alpha"
    low, high = fit.interval(q)
    return f"{float(fitting.quantity_of(fit.law, q)):.4g} [{low:.4g}, {high:.4g}]"


def trial(t: fitting.Trial) -> str:
    return f"the {t.form} law predicts {t.errors.min():+.2%}..{t.errors.max():+.2%} off (rms {t.rms:.2%})"


def misfit(fit: Fit) -> str:
    rms = float(np.sqrt((fit.residuals**2).mean()))
    noise = fitting.seed_noise(fit.table)
    if noise is None:
        return f"residuals of {rms:.2%} rms; no cell has two seeds, so noise and misfit cannot be told apart"
    relative = noise[0] / fit.table.array("loss").mean()
    times = f", {rms / relative:.0f} times that" if relative > 0 and rms > 1.5 * relative else ""
    return f"residuals of {rms:.2%} rms; seeds differ by {noise[0]:.2g} nat sd ({relative:.2%}){times}"


def outliers(fit: Fit) -> str:
    if not fit.outliers.any():
        return "none beyond 5 robust standard deviations"
    names = [f"{r.size} at {r.tokens:.3g} tokens" for r, out in zip(fit.table.runs, fit.outliers, strict=True) if out]
    told = f"{len(names)} beyond 5 robust standard deviations, kept: {', '.join(names[:4])}"
    if fit.robust is not None:
        told += f"; without them E {float(fit.robust.E):.4g}, alpha {float(fit.robust.alpha):.3g}, "
        told += f"beta {float(fit.robust.beta):.3g}"
    return told


def optimum(fit: Fit, flops: float) -> str:
    found = fitting.optimal(fit, flops)
    (N, *N_range), (D, *D_range), (L, *L_range) = (found[name] for name in ("params", "tokens", "loss"))
    if N_range[1] > UNDETERMINED * N_range[0]:
        return (
            f"not determined: the 95 % interval of N spans more than a factor of {UNDETERMINED:,}. These runs do not "
            "tell what size is worth beside tokens; they need a wider range of tokens per parameter"
        )
    measured = 6 * fit.table.array("params") * fit.table.array("tokens")
    beyond = "" if flops <= measured.max() else f" ({flops / measured.max():.3g} x the largest run: extrapolated)"
    return (
        f"N = {format_count(N)} [{format_count(N_range[0])}, {format_count(N_range[1])}], "
        f"D = {format_count(D)} [{format_count(D_range[0])}, {format_count(D_range[1])}], "
        f"loss {L:.4g} [{L_range[0]:.4g}, {L_range[1]:.4g}]{beyond}"
    )


# -- comparisons ------------------------------------------------------------------------------------------------------


def of_comparison(c: Comparison, tied: float) -> list[tuple[str, str]]:
    told = [("answer", answer(c)), ("pairs", paired(c)), ("loss", f"{interval(c.difference, '.2g')} nat")]
    told.append(("multiplier", f"{interval(c.multiplier)}, p = {c.p:.2g} for no difference"))
    told += [(f"along {name}", trend(c, name)) for name in c.trends]
    told.append(("by size", ", ".join(f"{size} {interval(e)}" for size, e in c.by_size.items())))
    told.append(("wall clock", wall_clock(c)))
    E, alpha, beta = float(c.law.E), float(c.law.alpha), float(c.law.beta)
    law = f"from the common law with E {E:.3g}, alpha {alpha:.3g}, beta {beta:.3g}"
    if c.form == "tied":
        told.append(("price of a nat", f"{law}; one exponent for both, since these runs cannot tell them apart"))
    else:
        told.append(("price of a nat", f"{law}; with one exponent for both the multiplier would be {tied:.4g}"))
    told.append(("parameters", ratio(c.params_ratio)))
    if c.flops_ratio:
        told.append(("FLOPs", ratio(c.flops_ratio)))
    return told


def answer(c: Comparison) -> str:
    level = f"{c.level:.0%}".replace("%", " %")
    m = c.multiplier
    if not c.detected:
        if not math.isfinite(c.excluded):
            return "no detectable difference, and none is excluded: these runs say nothing about it"
        told = (
            f"no detectable difference between {c.other} and {c.baseline}; differences larger than "
            f"{c.excluded:.2%} in compute are excluded at {level}"
        ).replace("%", " %").replace("  %", " %")
        return told + ("; but the difference depends on size" if _depends_on_size(c) else "")
    needs, than = (c.baseline, c.other) if m.value > 1 else (c.other, c.baseline)
    low, high = (m.low, m.high) if m.value > 1 else (1 / m.high, 1 / m.low)
    told = (f"{needs} needs {max(m.value, 1 / m.value):.3f} [{low:.3f}, {high:.3f}] times the compute of {than} for "
            "the same loss")  # fmt: skip
    if _depends_on_size(c):
        told += "; but it depends on size, so this one number describes only the middle of these sizes"
    return told


def _depends_on_size(c: Comparison) -> bool:
    return "size" in c.trends and c.trends["size"].p < UNRESOLVED


def paired(c: Comparison) -> str:
    params, ratios = column_of(c.pairs, 0, "params"), column_of(c.pairs, 0, "tokens") / column_of(c.pairs, 0, "params")
    seeds = len({a.seed for a, _ in c.pairs})
    count = f"{len(c.pairs)} ({len(set(params))} sizes, {seeds} seed{'s' if seeds > 1 else ''}"
    left = f"; {c.unpaired} runs without a partner inform only the law" if c.unpaired else ""
    return (
        f"{count}), {format_count(params.min())}..{format_count(params.max())} parameters, "
        f"{ratios.min():.3g}..{ratios.max():.3g} tokens per parameter: valid there only; "
        f"{c.clusters} independent {c.clustered_by}{left}"
    )


def trend(c: Comparison, name: str) -> str:
    t = c.trends[name]
    slope = t.slope
    tenfold = [math.exp(v * math.log(10)) - 1 for v in (slope.value, slope.low, slope.high)]
    change = f"the multiplier changes by {tenfold[0]:+.1%} [{tenfold[1]:+.1%}, {tenfold[2]:+.1%}] per tenfold {name}"
    verdict = "no dependence detected" if t.p >= UNRESOLVED else f"depends on {name}"
    return f"{verdict} (p = {t.p:.2g}): {change}"


def wall_clock(c: Comparison) -> str:
    if c.step_time is None or c.wall_clock is None:
        return "not known: no pair has a measured step_time_s"
    return (
        f"{interval(c.wall_clock)}: the multiplier divided by the step time of {c.other}, "
        f"{interval(c.step_time)} x that of {c.baseline}"
    )


def ratio(values: tuple[float, float]) -> str:
    if max(abs(v - 1) for v in values) < 1e-3:
        return "equal"
    return f"other / baseline {values[0]:.4g}..{values[1]:.4g}" + (
        "" if max(abs(v - 1) for v in values) < 0.01 else ", not well matched"
    )


def interval(e: Estimate, digits: str = ".4g") -> str:
    if math.isnan(e.low):
        return f"{e.value:{digits}} [unknown]"
    return f"{e.value:{digits}} [{e.low:{digits}}, {e.high:{digits}}]"
