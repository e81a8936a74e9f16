"""Pictures of laws: the runs and their law, hold-out, residuals, how well E is determined, IsoFLOP parabolas.

Every function draws one file; the caller decides what there is to draw.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_xact.studies import figures, isoflop
from megatron_xact.studies.diagnostics import seed_noise
from megatron_xact.studies.fit import Fit
from megatron_xact.studies.law import Array, Law
from megatron_xact.studies.table import Table


def losses(table: Table, fits: dict[str, Fit], path: Path) -> None:
    """Loss against tokens and against compute: a row per activation, with its law."""
    shade, label = figures.shades(table.sizes), figures.labels(table.sizes)
    low, high = table.array("loss").min(), table.array("loss").max()
    with figures.figure(path, len(table.activations), 2) as axes:
        for (left, right), activation in zip(axes, table.activations, strict=True):
            runs = table.only(activation)
            for size in table.sizes:
                those = runs.where(lambda r, s=size: r.size == s)
                if not those.runs:
                    continue
                D, flops_per_token = those.array("tokens"), 6 * those.array("params")[0]
                for ax, scale in ((left, 1.0), (right, flops_per_token)):
                    ax.plot(D * scale, those.array("loss"), "o", ms=4.5, color=shade[size], label=label[size])
                    if activation in fits:
                        line, predicted = _curve(fits[activation].law, those)
                        ax.plot(line * scale, predicted, color=shade[size], lw=1)
            for ax, what in ((left, "training tokens"), (right, "training FLOPs (6 N D)")):
                ax.set(xlabel=what, ylabel="loss (nats per token)", title=activation)
                figures.counts(ax)
                ax.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
            figures.legend(left, "parameters", ncols=1 + sum(map(bool, label.values())) // 6)


def _curve(law: Law, those: Table) -> tuple[Array, Array]:
    """Tokens, somewhat further than those of these runs of one size, and the loss there by the law."""
    N, D = those.array("params"), those.array("tokens")
    line = np.geomspace(D.min() * 0.8, D.max() * 1.25, 60)
    return line, law.loss(np.full(60, N[0]), line)


def held_out(fit: Fit, path: Path) -> None:
    """Both forms fitted without the largest sizes, extended to them; those runs are hollow, bars their prediction
    intervals. Errors: the title.
    """
    table, shade, label = fit.table, figures.shades(fit.table.sizes), figures.labels(fit.table.sizes)
    with figures.figure(path, 1, len(fit.trials)) as axes:
        for ax, trial in zip(axes[0], fit.trials, strict=True):
            for size in table.sizes:
                those = table.where(lambda r, s=size: r.size == s)
                out = size in trial.held_out
                ax.plot(those.array("tokens"), those.array("loss"), "o", ms=5, color=shade[size],
                        mfc="white" if out else shade[size],
                        label=f"{size}, held out" if out and label[size] else label[size])  # fmt: skip
                ax.plot(*_curve(trial.law, those), "--" if out else "-", color=shade[size], lw=1.1)
            held = table.where(lambda r, t=trial: r.size in t.held_out)
            if trial.inside is not None:
                D, ends = held.array("tokens"), (trial.margins + 1) * held.array("loss")[:, None]
                ax.vlines(D, *ends.T, color=[shade[r.size] for r in held.runs], lw=3, alpha=0.3, zorder=0)
            least, greatest = trial.errors.min(), trial.errors.max()
            ax.set(xlabel="training tokens", ylabel="loss (nats per token)",
                   title=f"{fit.activation}, {trial.form} form: {least:+.2%} .. {greatest:+.2%} off")  # fmt: skip
            figures.counts(ax)
            ax.legend(fontsize=8)


def residuals(fits: dict[str, Fit], path: Path) -> None:
    """Predicted / measured - 1 against params and against tokens per parameter; the band is the noise of seeds."""
    with figures.figure(path, len(fits), 2, size=(5.6, 3.2)) as axes:
        for row, (activation, f) in zip(axes, fits.items(), strict=True):
            N, D = f.table.array("params"), f.table.array("tokens")
            shade, label = figures.shades(f.table.sizes), figures.labels(f.table.sizes)
            noise = seed_noise(f.table)
            for ax, x, what in ((row[0], N, "parameters"), (row[1], D / N, "tokens per parameter")):
                for size in f.table.sizes:
                    those = [r.size == size for r in f.table.runs]
                    ax.plot(x[those], 100 * f.residuals[those], "o", ms=4.5, color=shade[size], label=label[size])
                ax.axhline(0, color="0.4", lw=0.8)
                if noise:
                    band = 200 * noise[0] / f.table.array("loss").mean()
                    ax.axhspan(-band, band, color="0.85", zorder=0, label="2 sd between seeds")
                ax.set(xscale="log", xlabel=what, ylabel="law - measured (%)", title=f"{activation}, {f.form} form")
            figures.plain_ticks(row[0], N)
            figures.plain_ticks(row[1], D / N)
            figures.legend(row[1], "parameters")


def profiles(fits: dict[str, Fit], path: Path) -> None:
    colour = figures.colours(list(fits))
    with figures.figure(path, size=(7.2, 4.1)) as axes:
        ax = axes[0, 0]
        for i, (activation, f) in enumerate(fits.items()):
            p, (low, high) = f.profile, f.interval("E")
            if np.isnan(low):
                continue
            ax.plot(p.E, (p.least - p.objective) / p.limit, figures.LINES[i % len(figures.LINES)],
                    color=colour[activation], label=f"{activation}, {p.form}")  # fmt: skip
            y = -0.12 * (1 + i)  # intervals below the curves, one under the other
            ax.plot([low, high], [y, y], color=colour[activation], lw=3, solid_capstyle="butt")
        ax.axhline(1, color="0.4", lw=0.8, ls="--")
        ax.axhline(0, color="0.4", lw=0.8)
        ax.set(ylim=(-0.12 * (len(fits) + 1), 4), xlabel="E, held at (nats)", yticks=range(5),
               ylabel="rise of the objective (1: 95 % by an F test)",
               title="How well is E determined? Bars below: its 95 % interval")  # fmt: skip
        if ax.get_legend_handles_labels()[0]:
            figures.legend(ax, "form of the law")


def isoflops(fits: dict[str, Fit], path: Path) -> None:
    found = {a: p for a, f in fits.items() if (p := isoflop.parabolas(f.table))}
    with figures.figure(path, 1, len(found)) as axes:
        for ax, (activation, parabolas) in zip(axes[0], found.items(), strict=True):
            shade = figures.shades([str(i) for i in range(len(parabolas))])  # not by flops, which may look alike
            for p, colour in zip(parabolas, shade.values(), strict=True):
                line = np.geomspace(p.params.min() / 1.2, p.params.max() * 1.2, 80)
                ax.plot(p.params, p.losses, "o", ms=4.5, color=colour)
                ax.plot(line, np.polyval(p.coefficients, np.log(line)), lw=1, color=colour,
                        label=f"{p.flops:.2g}" + (", exact" if len(p.params) == 3 else ""))  # fmt: skip
                if p.optimum:
                    ax.plot(p.optimum, np.polyval(p.coefficients, np.log(p.optimum)), "*", ms=10, color=colour)
            how = "loss (nats per token)" if parabolas[0].measured else "loss, interpolated (nats per token)"
            ax.set(xlabel="parameters", ylabel=how, title=activation)
            figures.plain_ticks(ax, np.concatenate([p.params for p in parabolas]))
            exact = any(len(p.params) == 3 for p in parabolas)
            ax.legend(title="FLOPs (exact: through three points,\nany three lie on a parabola)" if exact else "FLOPs",
                      fontsize=8, title_fontsize=8)  # fmt: skip
