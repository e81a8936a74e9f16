"""Curves over the steps of one or several runs: losses, learning rate, speed, memory."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from megatron_xact.pretraining.drawing.parts import RUNS, figure_of, grid, label_axes, style, zoom
from megatron_xact.pretraining.report import Curve, Report

SMOOTHED = 0.02  # share of the records that a smoothed curve averages over, at each point the latest

# progress.jsonl's name -> (axis label, divisor)
PROGRESS = {
    "learning_rate": ("learning rate", 1.0),
    "grad_norm": ("gradient norm", 1.0),
    "tokens_per_second": ("speed (tokens/s)", 1.0),
    "mfu": ("model FLOPs utilisation (%)", 0.01),
    "memory_bytes": ("most memory of the last rank (GiB)", 2.0**30),
}


def loss(reports: list[Report]) -> Figure:
    """Training and validation loss of one or several runs: whole on the left, the second half larger on the right."""
    figure = figure_of(11, 4.5)
    whole, late = figure.subplots(1, 2)
    unit, factors = _horizontal(reports)
    for i, report in enumerate(reports):
        if not report.loss:
            continue
        colour = RUNS[i % len(RUNS)]
        label = "" if len(reports) == 1 else f"{report.name}: "
        x, y = _arrays(report.loss, factors[i])
        window = max(1, round(SMOOTHED * len(y)))
        mean = smoothed(y, window)
        of = f", mean of {window} records" if window > 1 else ""
        for axes in (whole, late):
            if window > 1:
                axes.plot(x, y, lw=0.7, color=colour, alpha=0.3)
            axes.plot(x, mean, style(x), lw=1.5, color=colour, label=f"{label}training{of}")
            if report.validation:
                axes.plot(
                    *_arrays(report.validation, factors[i]), "o--", ms=5, lw=1, color=colour, mec="white",
                    label=f"{label}validation",
                )  # fmt: skip
    if len(reports) == 1 and reports[0].unigram_loss is not None:
        whole.axhline(reports[0].unigram_loss, ls=":", color="0.4", label="unigram model, validation")
    for axes in (whole, late):
        label_axes(axes, unit, "loss (nats per token)")
    whole.set_title("Language-model loss")
    late.set_title("Second half")
    end = max((r.loss[-1][0] * f for r, f in zip(reports, factors, strict=True) if r.loss), default=1.0)
    zoom(late, end / 2, end)
    whole.legend(fontsize="small")
    return figure


def progress(reports: list[Report]) -> Figure | None:
    """Learning rate, speed, memory and the like, as far as recorded; None where nothing was."""
    names = [name for name in PROGRESS if any(name in report.progress for report in reports)]
    if not names:
        return None
    unit, factors = _horizontal(reports)
    figure, panels = grid(len(names), 3)
    for axes, name in zip(panels, names, strict=True):
        label, divisor = PROGRESS[name]
        for i, report in enumerate(reports):
            if name in report.progress:
                x, y = _arrays(report.progress[name], factors[i])
                axes.plot(x, y / divisor, style(x), lw=1.2, color=RUNS[i % len(RUNS)], label=report.name)
        label_axes(axes, unit, label)
        top = axes.dataLim.ymax
        axes.set_ylim(0.0, 1.08 * top if 0.0 < top < np.inf else 1.0)
        axes.ticklabel_format(axis="y", scilimits=(-2, 5))
    if len(reports) > 1:
        panels[0].legend(fontsize="small")
    return figure


def smoothed(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the latest `window` values at each point, of fewer at the start; a nan stays within its windows."""
    padded = np.concatenate([np.full(window - 1, np.nan), y])
    views = np.lib.stride_tricks.sliding_window_view(padded, window)
    counts = np.minimum(np.arange(1, len(y) + 1), window)
    return np.array([view[window - n :].mean() for view, n in zip(views, counts, strict=True)])


def _horizontal(reports: list[Report]) -> tuple[str, list[float]]:
    """The axis that runs share, and what a step is on it: steps, or tokens where their batches differ."""
    per_step = [_tokens_per_step(report) for report in reports]
    if None in per_step or len(set(per_step)) == 1:
        return "step", [1.0] * len(reports)
    return "tokens (billions)", [tokens / 1e9 for tokens in per_step]


def _tokens_per_step(report: Report) -> float | None:
    tokens = report.progress.get("tokens")
    return tokens[-1][1] / tokens[-1][0] if tokens and tokens[-1][0] else None


def _arrays(curve: Curve, factor: float) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array(curve, dtype=float).reshape(-1, 2)
    return pairs[:, 0] * factor, pairs[:, 1]
