"""What layers have learned and do, over depth and time: alphas, activation functions, sparsity and outliers."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_xact.activations import Activation
from megatron_xact.pretraining.drawing.parts import (
    RUNS,
    THOUSANDS,
    TIME,
    depth_bar,
    depth_colour,
    figure_of,
    grid,
    label_axes,
    style,
    ticks,
    time_bar,
    with_margin,
    zoom,
)
from megatron_xact.pretraining.report import ByLayer, Report
from megatron_xact.pretraining.statistics import STATISTICS

X = np.linspace(-4.0, 2.0, 1201)  # where activations are drawn: there, the xIELU paper's differ by eye
TIMES = 6  # curves in a plot over depth
_LABELS = ("pre-activation x", "f(x)", "slope f'(x)")
_GATE_LABELS = ("pre-activation of the gate x", "gate function g(x)", "its slope g'(x)")


def alphas(report: Report) -> Figure:
    """Every layer's effective parameters over the steps."""
    names = _names(report.alphas)
    figure, panels = grid(len(names), 2, size=(6.0, 4.5))
    layers = list(report.alphas[-1][1])
    for axes, name in zip(panels, names, strict=True):
        for layer in layers:
            points = [(step, values[layer][name]) for step, values in report.alphas if name in values.get(layer, {})]
            if points:
                axes.plot(*zip(*points, strict=True), style(points), lw=1.3, color=depth_colour(layer, layers))
        _initial_line(axes, report.activation, name)
        label_axes(axes, "step", f"{name} (effective)")
    depth_bar(figure, panels, layers)
    return figure


def alphas_over_depth(report: Report) -> Figure:
    """Effective parameters by layer, at the start, at the end and in between (the xIELU paper's figure 3b)."""
    names = _names(report.alphas)
    figure, panels = grid(len(names), 2, size=(6.0, 4.5))
    for axes, name in zip(panels, names, strict=True):
        _over_depth(axes, report.alphas, name)
        _initial_line(axes, report.activation, name)
        label_axes(axes, "layer", f"{name} (effective)")
    time_bar(figure, panels, report.alphas)
    return figure


def function(report: Report) -> Figure:
    """The learned activation of every layer and its derivative, beside the initial one (the paper's figures 4 to 7).

    Of a gated activation, the function of the gate. The lower row shows the negative side larger.
    """
    activation = report.activation
    step, by_layer = report.alphas[-1] if report.alphas and activation.trainable else (0, {})
    layers = list(by_layer)
    figure = figure_of(11, 8)
    panels = figure.subplots(2, 2)
    for layer in layers:
        colour = depth_colour(layer, layers)
        for column, y in enumerate(curves(activation, by_layer[layer])):
            for axes in panels[:, column]:
                axes.plot(X, y, lw=1.2, color=colour)
    what = "initial" if activation.trainable else activation.name
    for column, y in enumerate(curves(activation, {})):
        for axes in panels[:, column]:
            axes.plot(X, y, "--" if layers else "-", lw=1.5, color="black", label=what)
    x, *labels = _GATE_LABELS if activation.gated else _LABELS
    for row in panels:
        for axes, label in zip(row, labels, strict=True):
            label_axes(axes, x, label)
    for axes in panels[1]:
        zoom(axes, X[0], 0.25)
    for axes in panels.flat:
        axes.axhline(0.0, lw=0.6, color="0.4")
        axes.axvline(0.0, lw=0.6, color="0.4")
    panels[0, 0].legend()
    when = f", step {step:,}" if layers else ""
    figure.suptitle(f"{activation.name}{when}:  {activation.formula}")
    if layers:
        depth_bar(figure, panels, layers)
    return figure


def curves(activation: Activation, effective: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """(value, slope) at X in fp64, from effective values by parameter name; what is not named has its initial value."""
    p = {q.symbol: effective.get(q.name, q.init) for q in activation.parameters}
    x = torch.from_numpy(X)
    return activation.value(x, p).numpy(), activation.slopes(x, p)[0].numpy()


def statistics(report: Report) -> Figure:
    """Every statistic as a map, layers upwards and steps to the right."""
    names = [name for name in STATISTICS if name in _names(report.statistics)]
    steps = np.array([step for step, _ in report.statistics])
    layers = np.array(sorted({layer for _, values in report.statistics for layer in values}))
    figure, panels = grid(len(names), 3)
    for axes, name in zip(panels, names, strict=True):
        values = table(report.statistics, list(layers), name)
        fraction = STATISTICS[name].fraction
        mesh = axes.pcolormesh(_edges(steps), _edges(layers), values, cmap="viridis", norm=_norm(values, fraction))
        axes.set(xlabel="step", ylabel="layer", title=STATISTICS[name].label)
        axes.set_facecolor("0.85")  # where nothing was measured, or nothing is defined
        axes.yaxis.set_major_locator(ticks(8))
        axes.xaxis.set_major_locator(ticks(5))
        axes.xaxis.set_major_formatter(THOUSANDS)
        figure.colorbar(mesh, ax=axes, format=PercentFormatter(1.0, decimals=None) if fraction else None)
    return figure


def statistics_over_depth(reports: list[Report]) -> Figure:
    """Every statistic by layer: of one run at several times, of several runs at each one's last record."""
    names = [name for name in STATISTICS if any(name in _names(report.statistics) for report in reports)]
    figure, panels = grid(len(names), 3)
    for axes, name in zip(panels, names, strict=True):
        if len(reports) == 1:
            _over_depth(axes, reports[0].statistics, name)
        else:
            _runs_over_depth(axes, [(report, report.statistics) for report in reports], name)
        label_axes(axes, "layer", "")
        axes.set_title(STATISTICS[name].label)
        if STATISTICS[name].fraction:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        norm = _norm(np.concatenate([line.get_ydata() for line in axes.lines]), STATISTICS[name].fraction)
        if isinstance(norm, LogNorm):
            axes.set_yscale("log")
        else:
            axes.set_ylim(with_margin(norm.vmin, norm.vmax))
    if len(reports) == 1:
        time_bar(figure, panels, reports[0].statistics)
    else:
        panels[0].legend(fontsize="small")
    return figure


def alphas_of_runs(reports: list[Report]) -> Figure:
    """Effective parameters by layer at each run's last record; runs of other activations leave a panel without them."""
    names = list(dict.fromkeys(name for report in reports for name in _names(report.alphas)))
    figure, panels = grid(len(names), 2, size=(6.0, 4.5))
    for axes, name in zip(panels, names, strict=True):
        _runs_over_depth(axes, [(report, report.alphas) for report in reports], name)
        label_axes(axes, "layer", f"{name} (effective)")
        axes.legend(fontsize="small")
    return figure


def table(records: ByLayer, layers: list[int], name: str) -> np.ndarray:
    """[layer, step]; nan where a layer has no such value at that step."""
    return np.array([[values.get(layer, {}).get(name, math.nan) for _, values in records] for layer in layers])


def _over_depth(axes: Axes, records: ByLayer, name: str) -> None:
    chosen = sorted({round(i) for i in np.linspace(0, len(records) - 1, TIMES)})
    last = records[-1][0]
    for step, values in (records[i] for i in chosen):
        points = [(layer, v[name]) for layer, v in sorted(values.items()) if name in v]
        if points:
            colour = TIME(0.0 if last == 0 else step / last)
            axes.plot(*zip(*points, strict=True), "o-", ms=3.5, lw=1.3, color=colour)


def _runs_over_depth(axes: Axes, runs: list[tuple[Report, ByLayer]], name: str) -> None:
    for i, (report, records) in enumerate(runs):
        points = [(layer, v[name]) for layer, v in sorted(records[-1][1].items()) if name in v] if records else []
        if points:
            label = f"{report.name}, step {records[-1][0]:,}"
            axes.plot(*zip(*points, strict=True), "o-", ms=3.5, lw=1.3, color=RUNS[i % len(RUNS)], label=label)


def _initial_line(axes: Axes, activation: Activation | None, name: str) -> None:
    for q in activation.parameters if activation else ():
        if q.name == name:
            axes.axhline(q.init, ls="--", lw=1, color="black", label="initial")
            axes.legend(fontsize="small")


def _names(records: ByLayer) -> list[str]:
    return list(dict.fromkeys(name for _, layers in records[-1:] for values in layers.values() for name in values))


def _edges(centres: np.ndarray) -> np.ndarray:
    """Of the cells around these centres; a single one gets a width of 1."""
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[1.5 * centres[0] - 0.5 * centres[1]], middles, [1.5 * centres[-1] - 0.5 * centres[-2]]])


def _norm(values: np.ndarray, fraction: bool) -> Normalize:
    """The range to show, nan apart: all of it, and something where it is one value; far apart by the logarithm."""
    seen = values[np.isfinite(values)]
    if not len(seen):
        return Normalize(0.0, 1.0)
    low, high = float(seen.min()), float(seen.max())
    if low > 0 and high / low > 30 and not fraction:
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + (0.01 if fraction else 1.0))
