"""Fits and comparisons in sentences, for the terminal and the report: what was found, and what was not."""

from __future__ import annotations

import math

import numpy as np

from megatron_xact.studies import diagnostics
from megatron_xact.studies.compare import Comparison
from megatron_xact.studies.effects import SIZE, TOKENS, Estimate
from megatron_xact.studies.fit import QUANTITIES, UNDETERMINED, Fit, quantity_of
from megatron_xact.studies.forms import Trial
from megatron_xact.studies.pairs import column_of
from megatron_xact.studies.table import describe, format_count, plural

NO_SCATTER = "no group has two independent clusters, so nothing tells effect from noise within one"


def lines(title: str, told: list[tuple[str, str]]) -> str:
    """(subject, sentence) pairs in two columns under a title."""
    width = max(len(subject) for subject, _ in told)
    return "\n".join([title, *(f"  {subject:{width}}  {sentence}" for subject, sentence in told)])


def law_of(fit: Fit) -> str:
    """L = 1.69 + 406 N^-0.34 + 411 D^-0.28"""
    E, A, B, alpha, beta = (_short(quantity_of(fit.law, q)) for q in ("E", "A", "B", "alpha", "beta"))
    return f"L = {E} + {A} N^-{alpha} + {B} D^-{beta}"


def of_fit(fit: Fit, flops: list[float]) -> list[tuple[str, str]]:
    """(subject, sentence) pairs."""
    told = [("runs", describe(fit.table)), ("law", law_of(fit)), ("form", f"{fit.form}: {fit.why}")]
    told += [(q, quantity(fit, q)) for q in QUANTITIES]
    told.append(("intervals", intervals(fit)))
    told.append(("optimum", f"objective {fit.objective:.6g}, reached from {fit.starts[0]} of {fit.starts[1]} starts, "
                            f"largest gradient {fit.gradient:.0e}"))  # fmt: skip
    told += [(f"without {t.named}", trial(t)) for t in (*fit.trials, *_only_new(fit))]
    for key in ("size", "tokens per parameter"):
        groups = diagnostics.residuals_by(fit.residuals, fit.table.runs, key)
        told.append((f"residuals by {key}", ", ".join(f"{name} {mean:+.2%}" for name, _, mean, _ in groups)))
    told.append(("misfit", misfit(fit)))
    if failing := diagnostics.fails_at(fit.residuals, fit.table, fit.form):
        off = ", ".join(f"{mean:+.1%} at {name} (mean of {plural(runs, 'run')})" for name, runs, mean in failing)
        told.append(("the law fails", f"by tokens per parameter it is off by more than noise explains: {off}"))
    told.append(("outliers", outliers(fit)))
    told += [(f"{c:.3g} FLOPs", optimum(fit, c)) for c in flops]
    return told


def _only_new(fit: Fit) -> list[Trial]:
    known = {t.held_out for t in fit.trials}
    return [t for t in fit.largest if t.held_out not in known]


def quantity(fit: Fit, q: str) -> str:
    if len(fit.draws) == 1 and fit.form == "tied" and q == "a_opt":
        return "0.5 by the tied form, not by measurement"
    if len(fit.draws) == 1 and fit.form == "tied" and q == "beta":
        return "= alpha"
    value, (low, high) = float(quantity_of(fit.law, q)), fit.interval(q)
    below, above = fit.determined(q)
    if below and above:
        return interval(Estimate(value, low, high))
    fitted = f"(the fit has {_short(value)})"
    if below:
        return f"at least {_short(low)}, not determined from above {fitted}"
    return f"at most {_short(high)}, not determined from below {fitted}" if above else f"not determined {fitted}"


def intervals(fit: Fit) -> str:
    """Where they come from."""
    noise = fit.draws[-1].noise
    if noise.why_unknown:
        return f"none: {noise.why_unknown}"
    runs, trunks = noise.sd
    told = (f"95 % of {len(fit.draws[0].run_sd)} bootstraps, seed {fit.seed}, with the scatter about the law (sd "
            f"{runs:.2g} nat, {plural(noise.freedom, 'degree')} of freedom")  # fmt: skip
    if noise.trunks is None:
        told += "), and as many over runs: the wider ends"
    else:
        told += f"; between trunks {trunks:.2g} nat, {noise.trunk_freedom})"
    if len(fit.draws) > 1:
        return f"{told}; each holds those of both forms, as equal exponents are assumed, not measured"
    if fit.form == "tied":
        return f"{told}, given the tied form: were the exponents unequal, they would be wider and elsewhere"
    return told


def trial(t: Trial) -> str:
    if len(t.errors) == 1:
        told = f"the {t.form} law predicts {t.errors[0]:+.2%} off"
    else:
        told = f"the {t.form} law predicts {t.errors.min():+.2%}..{t.errors.max():+.2%} off (rms {t.rms:.2%})"
    if t.inside is None:
        return f"{told}; no prediction intervals: noise between trunks is not known without them"
    half = float(np.diff(t.margins, axis=1).mean() / 2)
    return f"{told}; {t.inside} of {len(t.errors)} inside 95 % prediction intervals (+-{half:.2%})"


def misfit(fit: Fit) -> str:
    rms = float(np.sqrt((fit.residuals**2).mean()))
    noise = diagnostics.seed_noise(fit.table)
    if noise is None:
        return f"residuals of {rms:.2%} rms; no cell has two seeds, so noise and misfit cannot be told apart"
    relative = noise[0] / fit.table.array("loss").mean()
    times = f", {rms / relative:.0f} times that" if relative > 0 and rms > 1.5 * relative else ""
    told = f"residuals of {rms:.2%} rms; seeds differ by {noise[0]:.2g} nat sd ({relative:.2%}){times}"
    p = diagnostics.lack_of_fit(fit.residuals, fit.table, fit.form)
    if p is None:
        return told
    return f"{told}; {'beyond' if p < diagnostics.SIGNIFICANT else 'explained by'} that noise (F test, p = {p:.2g})"


def outliers(fit: Fit) -> str:
    if not fit.outliers.any():
        return "none beyond 5 robust standard deviations"
    names = [f"{r.size} at {r.tokens:.3g} tokens" for r, out in zip(fit.table.runs, fit.outliers, strict=True) if out]
    told = f"{len(names)} beyond 5 robust standard deviations, kept: {', '.join(names[:4])}"
    if fit.robust is not None:
        E, alpha, beta = (_short(getattr(fit.robust, q)) for q in ("E", "alpha", "beta"))
        told += f"; without {'it' if len(names) == 1 else 'them'} E {E}, alpha {alpha}, beta {beta}"
    return told


def optimum(fit: Fit, flops: float) -> str:
    found = fit.optimal(flops)
    (N, *N_range), (D, *D_range), (L, *L_range) = (found[name] for name in ("params", "tokens", "loss"))
    if math.isnan(N_range[0]):
        return f"N = {format_count(N)}, D = {format_count(D)}, loss {L:.4g}; no intervals"
    if N_range[1] > UNDETERMINED * N_range[0]:
        return (
            f"not determined: the 95 % interval of N spans more than a factor of {UNDETERMINED:,}. These runs do not "
            "tell what size is worth beside tokens; they need a wider range of tokens per parameter"
        )
    measured = 6 * fit.table.array("params") * fit.table.array("tokens")
    beyond = ""
    for run, outside, which in ((measured.max(), flops > measured.max(), "largest"),
                                (measured.min(), flops < measured.min(), "smallest")):  # fmt: skip
        if outside:
            beyond = f" ({flops / run:.3g} x the {which} run: extrapolated)"
    given = fit.form == "tied" and len(fit.draws) == 1
    assumed = "; this split assumes equal exponents, it is not measured" if given else ""
    return (
        f"N = {format_count(N)} [{format_count(N_range[0])}, {format_count(N_range[1])}], "
        f"D = {format_count(D)} [{format_count(D_range[0])}, {format_count(D_range[1])}], "
        f"loss {L:.4g} [{L_range[0]:.4g}, {L_range[1]:.4g}]{beyond}{assumed}"
    )


# -- comparisons ------------------------------------------------------------------------------------------------------


def of_comparison(c: Comparison, tied: float) -> list[tuple[str, str]]:
    told = [("answer", answer(c)), ("pairs", paired(c)), ("loss", f"{interval(c.difference)} nat")]
    weight = ", ".join(f"{percent(share)} of {size}" for size, share in c.shares.items())
    told.append(("multiplier", f"{interval(c.multiplier)}, p = {c.p:.2g} for no difference; weight: {weight}"))
    told += [(f"along {name}", trend(c, name)) for name in c.trends]
    told += [("by size", _groups(c.by_size)), (f"by {TOKENS}", _groups(c.by_tokens))]
    told.append(("wall clock", wall_clock(c)))
    E, alpha, beta = (_short(getattr(c.law, q)) for q in ("E", "alpha", "beta"))
    law = f"from the common law with E {E}, alpha {alpha}, beta {beta}"
    if c.form == "tied":
        told.append(("price of a nat", f"{law}; one exponent for both, since these runs cannot tell them apart"))
    else:
        told.append(("price of a nat", f"{law}; with one exponent for both the multiplier would be "
                                       f"{tied:{_digits(c.multiplier)}}"))  # fmt: skip
    told.append(("parameters", ratio(c.params_ratio)))
    if c.flops_ratio:
        told.append(("FLOPs", ratio(c.flops_ratio)))
    return told


def answer(c: Comparison) -> str:
    return one_answer(c) + _outlying(c)


def one_answer(c: Comparison) -> str:
    m = c.multiplier
    if not math.isfinite(c.excluded):
        return "no detectable difference, and none is excluded: these runs say nothing about it"
    if c.changes_with:
        return _changes(c)
    if not c.detected:
        return (f"no detectable difference between {c.other} and {c.baseline}; differences larger than "
                f"{percent(c.excluded)} in compute are excluded at {percent(c.level)}")  # fmt: skip
    needs, than = (c.baseline, c.other) if m.value > 1 else (c.other, c.baseline)
    times = m if m.value > 1 else Estimate(1 / m.value, 1 / m.high, 1 / m.low)
    return f"{needs} needs {interval(times)} times the compute of {than} for the same loss"


def _changes(c: Comparison) -> str:
    """Two ends of every variable that matters, and no single number."""
    ends = []
    for name in c.changes_with:
        groups = c.by_size if name == SIZE else c.by_tokens
        (first, at_first), *_, (last, at_last) = groups.items()
        ends.append(f"with {name}: m = {interval(at_first)} at {first}, {interval(at_last)} at {last}")
    size, share = max(c.shares.items(), key=lambda item: item[1])
    return (f"what {c.other} is worth against {c.baseline} changes {'; and '.join(ends)}. No one number holds: of the "
            f"weight in the mean, m = {interval(c.multiplier)}, {percent(share)} is of {size}")  # fmt: skip


def _outlying(c: Comparison) -> str:
    if not c.outliers:
        return ""
    named = [f"{a.size} at {format_count(a.tokens)} tokens, seed {a.seed}: {b.loss:.4g} against {a.loss:.4g}"
             for a, b in c.outliers]  # fmt: skip
    told = f". But {plural(len(named), 'pair')} beyond 5 robust standard deviations ({'; '.join(named[:4])})"
    if c.without is None:
        return f"{told}; the rest is too little to compare"
    left_out = f"without {'it' if len(named) == 1 else 'them'}, m = {interval(c.without.multiplier)}"
    return f"{told}; {left_out}: {one_answer(c.without)}"


def _groups(groups: dict[str, Estimate]) -> str:
    told = ", ".join(f"{name} {interval(e)}" for name, e in groups.items())
    if any(math.isnan(e.low) for e in groups.values()):
        told += "; no intervals: " + NO_SCATTER
    return told


def paired(c: Comparison) -> str:
    params, ratios = column_of(c.pairs, 0, "params"), column_of(c.pairs, 0, "tokens") / column_of(c.pairs, 0, "params")
    seeds = len({a.seed for a, _ in c.pairs})
    count = f"{len(c.pairs)} ({plural(len(set(params)), 'size')}, {plural(seeds, 'seed')}"
    informs = "informs" if c.unpaired == 1 else "inform"
    left = f"; {plural(c.unpaired, 'run')} without a partner {informs} only the law" if c.unpaired else ""
    return (
        f"{count}), {format_count(params.min())}..{format_count(params.max())} parameters, "
        f"{ratios.min():.3g}..{ratios.max():.3g} tokens per parameter: valid there only; "
        f"{c.clusters} independent {c.clustered_by}{left}"
    )


def trend(c: Comparison, name: str) -> str:
    t = c.trends[name]
    if isinstance(t, str):
        return f"not tested: {t}"
    doubled = Estimate(*(math.log(2) * v for v in (t.slope.value, t.slope.low, t.slope.high))).exp()
    change = f"times {interval(doubled)} per doubling"
    if name in c.changes_with:
        return f"the multiplier depends on it (p = {t.p:.2g}): {change}"
    if max(t.slope.high, -t.slope.low) > 1:
        return f"no dependence detected (p = {t.p:.2g}), but these runs would hide a factor of 2 per doubling"
    return f"no dependence detected (p = {t.p:.2g}): {change}"


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


# -- digits -----------------------------------------------------------------------------------------------------------


def interval(e: Estimate, digits: str = "") -> str:
    """Two digits of half the interval's width, so that a number looks the same wherever it is told."""
    digits = digits or _digits(e)
    if math.isnan(e.low):
        return f"{e.value:{digits}}"
    return f"{_zero(e.value):{digits}} [{_zero(e.low):{digits}}, {_zero(e.high):{digits}}]"


def _digits(e: Estimate) -> str:
    half = (e.high - e.low) / 2
    if not 1e-6 < half < math.inf or 0 < 30 * e.low < e.high:
        return ".3g"
    return f".{max(0, 1 - math.floor(math.log10(half)))}f"


def _zero(value: float) -> float:
    """What lies at its lower bound is told as 0."""
    return 0.0 if abs(value) < 1e-6 else value


def _short(value: object) -> str:
    return f"{_zero(float(value)):.3g}"


def percent(share: float) -> str:
    return f"{float(f'{100 * share:.2g}'):g} %"
