"""Pictures of comparisons: multipliers with their intervals, and the pairs. Every function draws one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import ticker

from megatron_xact.studies import figures
from megatron_xact.studies.compare import Comparison
from megatron_xact.studies.effects import TOKENS, Estimate
from megatron_xact.studies.pairs import differences


def multipliers(comparisons: Sequence[Comparison], path: Path) -> None:
    """A row per comparison, size and, where it matters, tokens per parameter; the line at 1 is no difference."""
    colours = figures.colours([c.other for c in comparisons])
    rows = [(name, e, marker, colours[c.other]) for c in comparisons for name, e, marker in _rows(c)]
    estimates = [e for _, e, *_ in rows]
    low, high = _reach(estimates)
    with figures.figure(path, size=(7.4, 0.9 + 0.3 * len(rows))) as axes:
        ax = axes[0, 0]
        for y, (_, e, marker, colour) in enumerate(rows):
            if not np.isnan(e.low):
                ends = np.clip([e.low, e.high], low, high)
                ax.plot(ends, [y, y], color=colour, lw=2.4 if marker == "D" else 1.2)
            for beyond, end, arrow in zip(_beyond(e, low, high), (low, high), "<>", strict=True):
                if beyond:
                    ax.plot(end, y, arrow, color=colour, ms=7, clip_on=False)
            if low <= e.value <= high:
                ax.plot(e.value, y, marker, color=colour, ms=6 if marker == "D" else 4)
        ax.axvline(1, color="0.3", lw=1, ls="--")
        for row in np.cumsum([len(_rows(c)) for c in comparisons])[:-1]:  # between comparisons
            ax.axhline(row - 0.5, color="0.6", lw=0.8)
        ax.set_ylim(-0.7, len(rows) - 0.3)
        ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
        ax.invert_yaxis()
        notes = [f"{comparisons[0].level:.0%} intervals"]
        if any(any(_beyond(e, low, high)) for e in estimates):
            notes.append("an arrow: beyond this axis")
        if any(np.isnan(e.low) for e in estimates):
            notes.append("no line: one cluster each, interval unknown")
        meaning = f"multiplier against {comparisons[0].baseline}; above 1: worth that much more compute"
        ax.set(xscale="log", xlim=(low, high), title="; ".join(notes), xlabel=meaning)
        narrow = high < 10 * low
        ax.xaxis.set_major_locator(ticker.MaxNLocator(8) if narrow else ticker.LogLocator(subs=(1, 2, 5), numticks=8))
        ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
        ax.xaxis.set_minor_locator(ticker.NullLocator())


def _rows(c: Comparison) -> list[tuple[str, Estimate, str]]:
    """(name, estimate, marker)"""
    rows = [(f"{c.other}: compute", c.multiplier, "D"), *((f"at {size}", e, "o") for size, e in c.by_size.items())]
    if TOKENS in c.changes_with:
        rows += [(f"at {ratio} tokens / parameter", e, "^") for ratio, e in c.by_tokens.items()]
    if c.wall_clock:
        rows.append((f"{c.other}: wall clock", c.wall_clock, "s"))
    return rows


def _beyond(e: Estimate, low: float, high: float) -> tuple[bool, bool]:
    """Whether it reaches further than the axis, to either side."""
    return min(e.low, e.value) < low, max(e.high, e.value) > high


def _reach(shown: Sequence[Estimate]) -> tuple[float, float]:
    """Of an axis of multipliers: usual intervals are inside; one far wider does not shrink the rest."""
    with np.errstate(divide="ignore"):
        value, low, high = (np.log([getattr(e, end) for e in shown]) for end in ("value", "low", "high"))
    width = high - low
    bounded = np.isfinite(width)
    usual = np.median(width[bounded]) if bounded.any() else 0.0
    fits = ~(width > 4 * usual) & np.isfinite(value)
    least, most = np.nanmin(np.fmin(value, low)[fits], initial=0.0), np.nanmax(np.fmax(value, high)[fits], initial=0.0)
    margin = 0.05 * (most - least) + 1e-3
    return float(np.exp(least - margin)), float(np.exp(most + margin))


def pairs(comparisons: Sequence[Comparison], path: Path) -> None:
    with figures.figure(path, 1, len(comparisons), size=(5.4, 3.8)) as axes:
        for ax, c in zip(axes[0], comparisons, strict=True):
            values = 1e3 * differences(c.pairs)
            shade, label = figures.shades(list(c.by_size)), figures.labels(list(c.by_size))
            ratios = np.array([a.tokens / a.params for a, _ in c.pairs])
            for place, size in enumerate(c.by_size):
                those = [i for i, (a, _) in enumerate(c.pairs) if a.size == size]
                beside = 1.04 ** (place - (len(c.by_size) - 1) / 2)  # sizes side by side, not on top of each other
                ax.plot(ratios[those] * beside, values[those], "o", ms=5, color=shade[size], label=label[size])
            ax.axhline(0, color="0.3", lw=1, ls="--")
            ax.set(xlabel="tokens per parameter", ylabel=f"loss of {c.other} - {c.baseline} (mnat)",
                   title=f"{c.other}: paired differences")  # fmt: skip
            figures.plain_ticks(ax, ratios)
            figures.legend(ax, "parameters")
