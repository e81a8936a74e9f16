"""The pictures of a report. Every function draws one file; the caller decides what there is to draw.

One colour per activation and one shade per size throughout. Nothing in a file depends on when or where it was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from megatron_xact.studies import isoflop
from megatron_xact.studies.compare import Comparison
from megatron_xact.studies.curves import Curves
from megatron_xact.studies.effects import TOKENS, Estimate
from megatron_xact.studies.fit import Fit, seed_noise
from megatron_xact.studies.law import Array
from megatron_xact.studies.pairs import differences
from megatron_xact.studies.table import Run, Table, format_count

STYLE = {
    "font.size": 9.5, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "axes.titlesize": 10.5,
}  # fmt: skip


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (5.6, 4.1)):
    """Axes [rows, columns]; saved to `path` at the end."""
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")  # no pyplot, no backend
        yield fig.subplots(rows, columns, squeeze=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=130, metadata={"Software": None})


def shades(names: Sequence[str]) -> dict[str, tuple]:
    colours = matplotlib.colormaps["viridis"]
    return {name: colours(0.9 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}


def colours(names: Sequence[str]) -> dict[str, str]:
    return {name: f"C{i % 10}" for i, name in enumerate(names)}


def _plain_ticks(ax, x: Array) -> None:
    """A logarithmic axis over few distinct values: a tick for each, or one for several that nearly agree."""
    values: list[float] = []
    for value in sorted({float(f"{v:.2g}") for v in x}):
        if not values or value > 1.05 * values[-1]:
            values.append(value)
    ax.set_xscale("log")
    if len(values) <= 10:
        ax.set_xticks(values, [format_count(v) for v in values])
        ax.set_xticks([], minor=True)


def _count(value: float, _: int) -> str:
    return format_count(value) if value < 1e15 else f"{value:.0e}".replace("e+", "e")


def _counts(ax) -> None:
    """A logarithmic axis of tokens or FLOPs, once all is drawn: 500k, 1M, 2M, however narrow; if wide, 1M, 10M."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    # LogLocator heeds numticks only where it has a single tick per decade.
    subs = (1, 2, 5) if high < 10**2.5 * low else (1,)
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(_count))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())


def losses(table: Table, fits: dict[str, Fit], path: Path) -> None:
    """Loss against tokens and against compute: a row per activation, with its law."""
    shade = shades(table.sizes)
    low, high = table.array("loss").min(), table.array("loss").max()
    with figure(path, len(table.activations), 2) as axes:
        for (left, right), activation in zip(axes, table.activations, strict=True):
            runs = table.only(activation)
            for size in table.sizes:
                those = runs.where(lambda r, s=size: r.size == s)
                if not those.runs:
                    continue
                N, D = those.array("params"), those.array("tokens")
                for ax, x, scale in ((left, D, 1.0), (right, 6 * N * D, 6 * N[0])):
                    ax.plot(x, those.array("loss"), "o", ms=4.5, color=shade[size], label=size)
                    if activation in fits:
                        line = np.geomspace(D.min() * 0.8, D.max() * 1.25, 60)
                        law = fits[activation].law.loss(np.full(60, N[0]), line)
                        ax.plot(line * scale, law, color=shade[size], lw=1)
            for ax, what in ((left, "training tokens"), (right, "training FLOPs (6 N D)")):
                ax.set(xlabel=what, ylabel="loss (nats per token)", title=activation)
                _counts(ax)
                ax.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
            left.legend(title="parameters", fontsize=8, title_fontsize=8, ncols=1 + len(table.sizes) // 6)


def held_out(fit: Fit, path: Path) -> None:
    """Both forms fitted without the largest sizes, extended to them; those runs are hollow. Their errors: the title."""
    table, shade = fit.table, shades(fit.table.sizes)
    with figure(path, 1, len(fit.trials)) as axes:
        for ax, trial in zip(axes[0], fit.trials, strict=True):
            for size in table.sizes:
                those = table.where(lambda r, s=size: r.size == s)
                N, D = those.array("params"), those.array("tokens")
                out = size in trial.held_out
                ax.plot(D, those.array("loss"), "o", ms=5, color=shade[size], mfc="white" if out else shade[size],
                        label=size + (", held out" if out else ""))  # fmt: skip
                line = np.geomspace(D.min() * 0.8, D.max() * 1.25, 60)
                ax.plot(line, trial.law.loss(np.full(60, N[0]), line), "--" if out else "-", color=shade[size], lw=1.1)
            least, greatest = trial.errors.min(), trial.errors.max()
            ax.set(xlabel="training tokens", ylabel="loss (nats per token)",
                   title=f"{fit.activation}, {trial.form} form: {least:+.2%} .. {greatest:+.2%} off")  # fmt: skip
            _counts(ax)
            ax.legend(fontsize=8)


def residuals(fits: dict[str, Fit], path: Path) -> None:
    """Predicted / measured - 1 against params and against tokens per parameter; the band is the noise of seeds."""
    with figure(path, len(fits), 2, size=(5.6, 3.2)) as axes:
        for row, (activation, f) in zip(axes, fits.items(), strict=True):
            N, D = f.table.array("params"), f.table.array("tokens")
            shade = shades(f.table.sizes)
            noise = seed_noise(f.table)
            for ax, x, what in ((row[0], N, "parameters"), (row[1], D / N, "tokens per parameter")):
                for size in f.table.sizes:
                    those = [r.size == size for r in f.table.runs]
                    ax.plot(x[those], 100 * f.residuals[those], "o", ms=4.5, color=shade[size], label=size)
                ax.axhline(0, color="0.4", lw=0.8)
                if noise:
                    band = 200 * noise[0] / f.table.array("loss").mean()
                    ax.axhspan(-band, band, color="0.85", zorder=0, label="2 sd between seeds")
                ax.set(xscale="log", xlabel=what, ylabel="law - measured (%)", title=f"{activation}, {f.form} form")
            _plain_ticks(row[0], N)
            _plain_ticks(row[1], D / N)
            row[1].legend(title="parameters", fontsize=8, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def profiles(fits: dict[str, Fit], path: Path) -> None:
    colour = colours(list(fits))
    with figure(path) as axes:
        ax = axes[0, 0]
        for activation, f in fits.items():
            E, least = f.profile
            ax.plot(E, (least - f.objective) / f.profile_limit, color=colour[activation], label=activation)
            ax.axvspan(*f.interval("E"), color=colour[activation], alpha=0.1, lw=0)
        ax.axhline(1, color="0.4", lw=0.8, ls="--")
        ax.set(ylim=(0, 4), xlabel="E, held at (nats)", ylabel="rise of the objective (1 = limit of 95 %)",
               title="How well is E determined? Shaded: 95 % of bootstraps")  # fmt: skip
        ax.legend()


def isoflops(fits: dict[str, Fit], path: Path) -> None:
    found = {a: p for a, f in fits.items() if (p := isoflop.parabolas(f.table))}
    with figure(path, 1, len(found)) as axes:
        for ax, (activation, parabolas) in zip(axes[0], found.items(), strict=True):
            shade = shades([f"{p.flops:.2g}" for p in parabolas])
            for p, colour in zip(parabolas, shade.values(), strict=True):
                line = np.geomspace(p.params.min() / 1.2, p.params.max() * 1.2, 80)
                ax.plot(p.params, p.losses, "o", ms=4.5, color=colour)
                ax.plot(line, np.polyval(p.coefficients, np.log(line)), lw=1, color=colour,
                        label=f"{p.flops:.2g}" + (", exact" if len(p.params) == 3 else ""))  # fmt: skip
                if p.optimum:
                    ax.plot(p.optimum, np.polyval(p.coefficients, np.log(p.optimum)), "*", ms=10, color=colour)
            ax.set(xlabel="parameters", ylabel="loss, interpolated (nats)", title=activation)
            _plain_ticks(ax, np.concatenate([p.params for p in parabolas]))
            exact = any(len(p.params) == 3 for p in parabolas)
            ax.legend(title="FLOPs (exact: through three points,\nany three lie on a parabola)" if exact else "FLOPs",
                      fontsize=8, title_fontsize=8)  # fmt: skip


def multipliers(comparisons: Sequence[Comparison], path: Path) -> None:
    """A row per comparison, size and, where it matters, tokens per parameter; the line at 1 is no difference."""
    rows: list[tuple[str, Estimate, str, str]] = []
    for i, c in enumerate(comparisons):
        rows.append((f"{c.other}: compute", c.multiplier, f"C{i}", "D"))
        rows += [(f"at {size}", e, f"C{i}", "o") for size, e in c.by_size.items()]
        if TOKENS in c.changes_with:
            rows += [(f"at {ratio} tokens / parameter", e, f"C{i}", "^") for ratio, e in c.by_tokens.items()]
        if c.wall_clock:
            rows.append(("wall clock", c.wall_clock, f"C{i}", "s"))
    low, high = _reach([e for _, e, *_ in rows])
    with figure(path, size=(7.4, 0.9 + 0.3 * len(rows))) as axes:
        ax = axes[0, 0]
        for y, (_, e, colour, marker) in enumerate(rows):
            if not np.isnan(e.low):
                ends = np.clip([e.low, e.high], low, high)
                ax.plot(ends, [y, y], color=colour, lw=2.4 if marker == "D" else 1.2)
            for beyond, end, arrow in ((min(e.low, e.value) < low, low, "<"), (max(e.high, e.value) > high, high, ">")):
                if beyond:
                    ax.plot(end, y, arrow, color=colour, ms=7, clip_on=False)
            if low <= e.value <= high:
                ax.plot(e.value, y, marker, color=colour, ms=6 if marker == "D" else 4)
        ax.axvline(1, color="0.3", lw=1, ls="--")
        ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
        ax.invert_yaxis()
        notes = [f"{comparisons[0].level:.0%} intervals"]
        if any(min(e.low, e.value) < low or max(e.high, e.value) > high for _, e, *_ in rows):
            notes.append("an arrow: beyond this axis")
        if any(np.isnan(e.low) for _, e, *_ in rows):
            notes.append("no line: one cluster each, interval unknown")
        above = "above 1: worth that much more compute"
        ax.set(xscale="log", xlim=(low, high), title="; ".join(notes),
               xlabel=f"multiplier against {comparisons[0].baseline}; {above}")  # fmt: skip
        narrow = high < 10 * low
        ax.xaxis.set_major_locator(ticker.MaxNLocator(8) if narrow else ticker.LogLocator(subs=(1, 2, 5), numticks=8))
        ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
        ax.xaxis.set_minor_locator(ticker.NullLocator())


def _reach(shown: Sequence[Estimate]) -> tuple[float, float]:
    """Of an axis of multipliers: usual intervals are inside; one far wider does not shrink the rest."""
    value = np.log([e.value for e in shown])
    with np.errstate(divide="ignore"):
        low, high = np.log([e.low for e in shown]), np.log([e.high for e in shown])
    width = high - low
    usual = np.nanmedian(width) if not np.isnan(width).all() else 0.0
    fits = ~(width > 4 * usual) & np.isfinite(value)
    least, most = np.nanmin(np.fmin(value, low)[fits], initial=0.0), np.nanmax(np.fmax(value, high)[fits], initial=0.0)
    margin = 0.05 * (most - least) + 1e-3
    return float(np.exp(least - margin)), float(np.exp(most + margin))


def pairs(comparisons: Sequence[Comparison], path: Path) -> None:
    with figure(path, 1, len(comparisons), size=(5.4, 3.8)) as axes:
        for ax, c in zip(axes[0], comparisons, strict=True):
            values = 1e3 * differences(c.pairs)
            shade = shades(list(c.by_size))
            ratios = np.array([a.tokens / a.params for a, _ in c.pairs])
            for place, size in enumerate(c.by_size):
                those = [i for i, (a, _) in enumerate(c.pairs) if a.size == size]
                beside = 1.04 ** (place - (len(c.by_size) - 1) / 2)  # sizes side by side, not on top of each other
                ax.plot(ratios[those] * beside, values[those], "o", ms=5, color=shade[size], label=size)
            ax.axhline(0, color="0.3", lw=1, ls="--")
            ax.set(xlabel="tokens per parameter", ylabel=f"loss of {c.other} - {c.baseline} (mnat)",
                   title=f"{c.other}: paired differences")  # fmt: skip
            _plain_ticks(ax, ratios)
            ax.legend(title="parameters", fontsize=8, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


# -- from run folders -------------------------------------------------------------------------------------------------


def training_curves(found: Sequence[tuple[Run, Curves]], path: Path) -> None:
    activations = sorted({r.activation for r, _ in found})
    sizes = list(dict.fromkeys(r.size for r, _ in sorted(found, key=lambda f: f[0].params)))
    colour = colours(activations)
    with figure(path, 1, len(sizes), size=(5.0, 3.8)) as axes:
        for ax, size in zip(axes[0], sizes, strict=True):
            for activation in activations:
                those = [c for r, c in found if (r.size, r.activation) == (size, activation) and len(c.tokens)]
                for i, c in enumerate(those):
                    label = activation if i == 0 else None
                    ax.plot(c.tokens, c.loss, lw=0.8, alpha=0.8, color=colour[activation], label=label)
            ax.set(xlabel="tokens", ylabel="training loss (nats per token)", title=size)
            _counts(ax)
            ax.legend(fontsize=8)


def alphas_over_depth(found: Sequence[tuple[Run, dict[str, Array]]], path: Path) -> None:
    """Learned values by relative depth: a row per activation, a column per parameter, a shade per size."""
    activations = sorted({r.activation for r, _ in found})
    most = max(len(values) for _, values in found)
    sizes = list(dict.fromkeys(r.size for r, _ in sorted(found, key=lambda f: f[0].params)))
    shade = shades(sizes)
    with figure(path, len(activations), most, size=(4.8, 3.5)) as axes:
        for row, activation in zip(axes, activations, strict=True):
            names = list(next(values for r, values in found if r.activation == activation))
            for ax, name in zip(row, names, strict=False):
                labelled = set()
                for r, values in found:
                    if r.activation != activation or name not in values:
                        continue
                    depth = (np.arange(len(values[name])) + 0.5) / len(values[name])
                    label = None if r.size in labelled else r.size
                    labelled.add(r.size)
                    ax.plot(depth, values[name], "o-", ms=3, lw=0.8, alpha=0.8, color=shade[r.size], label=label)
                ax.set(xlabel="relative depth", ylabel=f"{name} (effective)", title=f"{activation}: {name}")
                ax.set_xlim(0, 1)
                ax.legend(fontsize=8)
            for ax in row[len(names):]:
                ax.set_axis_off()


def alphas_over_time(run: Run, found: Curves, path: Path) -> None:
    with figure(path, 1, len(found.alphas), size=(4.8, 3.5)) as axes:
        for ax, (name, (steps, values)) in zip(axes[0], found.alphas.items(), strict=True):
            layers = [str(i + 1) for i in range(values.shape[1])]
            for layer, colour in shades(layers).items():
                ax.plot(steps, values[:, int(layer) - 1], lw=1.2, color=colour, label=layer)
            ax.set(xlabel="step", ylabel=f"{name} (effective)", title=f"{run.activation} {run.size}: {name}")
            ax.legend(title="layer", fontsize=7, title_fontsize=8, ncols=1 + len(layers) // 9)


Shape = Callable[[str, dict[str, float], Array], Array]  # (activation, effective parameters, x) -> f(x)


def shapes(found: Sequence[tuple[Run, dict[str, Array]]], shape: Shape, path: Path) -> None:
    """Learned functions by layer of one run per activation, beside the function it started as."""
    x = np.linspace(-4, 4, 321)
    with figure(path, 1, len(found), size=(4.6, 3.8)) as axes:
        for ax, (run, values) in zip(axes[0], found, strict=True):
            count = len(next(iter(values.values())))
            for layer, colour in shades([str(i + 1) for i in range(count)]).items():
                at = {name: float(v[int(layer) - 1]) for name, v in values.items()}
                ax.plot(x, shape(run.activation, at, x), lw=1.1, color=colour, label=layer)
            ax.plot(x, shape(run.activation, {}, x), "k--", lw=1, label="start")
            ax.set(xlabel="x", ylabel="f(x)", title=f"{run.activation} {run.size}")
            ax.legend(title="layer", fontsize=7, title_fontsize=8, ncols=1 + count // 9)
