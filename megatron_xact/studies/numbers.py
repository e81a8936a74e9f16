"""Fits and comparisons as plain numbers, for JSON and CSV.

Rounded to six significant digits: what follows is not known, and would differ between machines.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_xact.studies import diagnostics, isoflop
from megatron_xact.studies.compare import Comparison
from megatron_xact.studies.effects import Estimate
from megatron_xact.studies.fit import QUANTITIES, Fit, quantity_of
from megatron_xact.studies.forms import Trial
from megatron_xact.studies.pairs import column_of, differences
from megatron_xact.studies.uncertainty import Noise


def rounded(value: object) -> object:
    """Any nesting of dicts, lists and numbers, ready for JSON; nan and infinities become None."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, np.ndarray):
        return [rounded(v) for v in value.tolist()]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def of_fit(fit: Fit, flops: list[float]) -> dict:
    """Everything a fit says; intervals are of 95 %."""
    found = isoflop.parabolas(fit.table)
    noise = diagnostics.seed_noise(fit.table)
    return rounded({
        "runs": len(fit.table),
        "form": fit.form,
        "why": fit.why,
        "parameters": {
            q: {"value": float(quantity_of(fit.law, q)), "interval": fit.interval(q), "determined": fit.determined(q)}
            for q in QUANTITIES
        },
        "bootstraps": len(fit.draws[0].run_sd),
        "intervals_of_forms": [d.form for d in fit.draws],
        "noise": _of_noise(fit.draws[-1].noise),
        "seed": fit.seed,
        "objective": fit.objective,
        "gradient": float(f"{fit.gradient:.0e}"),
        "starts_at_optimum": fit.starts,
        "held_out": [_of_trial(t) for t in fit.trials],
        "largest_left_out": [_of_trial(t) for t in fit.largest],
        "residual_rms": float(np.sqrt((fit.residuals**2).mean())),
        "residuals_by_size": _groups(fit, "size"),
        "residuals_by_tokens_per_parameter": _groups(fit, "tokens per parameter"),
        "seed_noise": noise and {"sd": noise[0], "degrees_of_freedom": noise[1]},
        "misfit_p": diagnostics.lack_of_fit(fit.residuals, fit.table, fit.form),
        "fails_at_tokens_per_parameter": [
            name for name, *_ in diagnostics.fails_at(fit.residuals, fit.table, fit.form)
        ],
        "outliers": int(fit.outliers.sum()),
        "without_outliers": fit.robust
        and {q: float(quantity_of(fit.robust, q)) for q in QUANTITIES},
        "optimal": [{"flops": c, **fit.optimal(c)} for c in flops],
        "isoflop": {
            "exponent": isoflop.exponent(found),
            "optima": [{"flops": p.flops, "params": p.optimum} for p in found],
        },
    })  # fmt: skip


def _of_noise(noise: Noise) -> dict:
    """sd in nats."""
    runs, trunks = noise.sd
    found = {"sd_between_runs": runs, "degrees_of_freedom": noise.freedom}
    if noise.trunks is not None:
        found |= {"sd_between_trunks": trunks, "degrees_of_freedom_of_trunks": noise.trunk_freedom}
    return found


def _of_trial(trial: Trial) -> dict:
    return {"form": trial.form, "sizes": trial.held_out, "rms": trial.rms, "least": trial.errors.min(),
            "greatest": trial.errors.max(), "inside_prediction_intervals": trial.inside,
            "prediction_intervals": trial.margins}  # fmt: skip


def _groups(fit: Fit, key: str) -> list[dict]:
    names = ("group", "runs", "mean", "rms")
    return [dict(zip(names, row, strict=True)) for row in diagnostics.residuals_by(fit.residuals, fit.table.runs, key)]


def of_comparison(c: Comparison, tied: float) -> dict:
    return rounded({
        "baseline": c.baseline,
        "other": c.other,
        "pairs": len(c.pairs),
        "runs_without_partner": c.unpaired,
        "independent": {"what": c.clustered_by, "number": c.clusters},
        "level": c.level,
        "multiplier": _estimate(c.multiplier),
        "p_no_difference": c.p,
        "detected": c.detected,
        "excluded_beyond": None if c.changes_with else c.excluded,
        "loss_difference": _estimate(c.difference),
        "by_size": {size: _estimate(e) for size, e in c.by_size.items()},
        "by_tokens_per_parameter": {name: _estimate(e) for name, e in c.by_tokens.items()},
        "share_of_weight": c.shares,
        "trends": {name: {"not_tested": t} if isinstance(t, str) else
                   {"change_per_factor_e": _estimate(t.slope), "p": t.p} for name, t in c.trends.items()},
        "outliers": [{"size": a.size, "tokens": a.tokens, "seed": a.seed, "loss_baseline": a.loss,
                      "loss_other": b.loss} for a, b in c.outliers],
        "multiplier_without_outliers": c.without and _estimate(c.without.multiplier),
        "step_time": c.step_time and _estimate(c.step_time),
        "wall_clock_multiplier": c.wall_clock and _estimate(c.wall_clock),
        "params_ratio": c.params_ratio,
        "flops_ratio": c.flops_ratio,
        "form": c.form,
        "law": {q: float(quantity_of(c.law, q)) for q in QUANTITIES},
        "multiplier_under_tied_law": tied,
    })  # fmt: skip


def _estimate(e: Estimate) -> dict:
    return {"value": e.value, "low": e.low, "high": e.high}


# -- rows of CSV files ------------------------------------------------------------------------------------------------


def parameter_rows(fits: dict[str, Fit]) -> list[list]:
    rows = [["activation", "form", "quantity", "value", "low", "high"]]
    for activation, f in fits.items():
        for q in QUANTITIES:
            rows.append([activation, f.form, q, *rounded([float(quantity_of(f.law, q)), *f.interval(q)])])
    return rows


def residual_rows(fits: dict[str, Fit]) -> list[list]:
    rows = [["activation", "size", "params", "tokens", "seed", "loss", "predicted", "relative_error", "outlier"]]
    for activation, f in fits.items():
        for r, error, out in zip(f.table.runs, f.residuals, f.outliers, strict=True):
            values = rounded([r.params, r.tokens, r.seed, r.loss, r.loss * (1 + error), error])
            rows.append([activation, r.size, *values, int(out)])
    return rows


def multiplier_rows(comparisons: list[Comparison]) -> list[list]:
    rows = [["baseline", "other", "what", "value", "low", "high"]]
    for c in comparisons:
        found = {"compute": c.multiplier, **{f"compute at {size}": e for size, e in c.by_size.items()}}
        found |= {f"compute at {ratio} tokens per parameter": e for ratio, e in c.by_tokens.items()}
        found |= {"step time": c.step_time} if c.step_time else {}
        found |= {"wall clock": c.wall_clock} if c.wall_clock else {}
        for what, e in found.items():
            rows.append([c.baseline, c.other, what, *rounded([e.value, e.low, e.high])])
    return rows


def pair_rows(comparisons: list[Comparison]) -> list[list]:
    rows = [["baseline", "other", "size", "tokens", "seed", "loss_baseline", "loss_other", "difference"]]
    for c in comparisons:
        both = column_of(c.pairs, 0, "loss"), column_of(c.pairs, 1, "loss"), differences(c.pairs)
        for (a, _), *losses in zip(c.pairs, *both, strict=True):
            rows.append([c.baseline, c.other, a.size, rounded(a.tokens), a.seed, *rounded(losses)])
    return rows


def profile_rows(fits: dict[str, Fit]) -> list[list]:
    rows = [["activation", "form", "E", "least_objective"]]
    for activation, f in fits.items():
        p = f.profile
        rows += [[activation, p.form, *rounded([E, least])] for E, least in zip(p.E, p.least, strict=True)]
    return rows


def isoflop_rows(fits: dict[str, Fit]) -> list[list]:
    rows = [["activation", "flops", "params", "interpolated_loss", "params_at_minimum"]]
    for activation, f in fits.items():
        for p in isoflop.parabolas(f.table):
            rows += [[activation, *rounded([p.flops, N, loss]), rounded(p.optimum)]
                     for N, loss in zip(p.params, p.losses, strict=True)]  # fmt: skip
    return rows
