"""What all pictures of a report share: style, one colour per activation, one shade per size, axes of counts.

Nothing in a file depends on when or where it was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure

from megatron_xact.studies.law import Array
from megatron_xact.studies.table import format_count
from megatron_xact.whole import whole_file

STYLE = {
    "font.size": 9.5, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "axes.titlesize": 10.5,
}  # fmt: skip

# Of Okabe and Ito, which the colour-blind tell apart; without yellow, which is too light.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":")  # beside colours, for black and white


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (5.6, 4.1)):
    """Axes [rows, columns]; saved to `path` at the end, whole or not at all."""
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")  # no pyplot, no backend
        yield fig.subplots(rows, columns, squeeze=False)
        with whole_file(path) as growing:
            fig.savefig(growing, dpi=130, format="png", metadata={"Software": None})


def shades(names: Sequence[str]) -> dict[str, tuple]:
    """Darker and lighter in order, and none too light for white paper."""
    colours = matplotlib.colormaps["viridis"]
    return {name: colours(0.85 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}


def colours(names: Sequence[str]) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def labels(names: Sequence[str]) -> dict[str, str]:
    """For a legend: every name; of more than 12, six names along the order and "" for the others."""
    named = names if len(names) <= 12 else [names[round(i * (len(names) - 1) / 5)] for i in range(6)]
    return {name: name if name in named else "" for name in names}


def legend(ax, title: str, **where) -> None:
    """where: of `Axes.legend`; by default to the right of the axes."""
    ax.legend(title=title, fontsize=8, title_fontsize=8, **where or {"loc": "upper left", "bbox_to_anchor": (1, 1)})


def plain_ticks(ax, x: Array) -> None:
    """A logarithmic axis over few distinct values: a tick for each, or one for several that nearly agree."""
    values: list[float] = []
    for value in sorted({float(f"{v:.2g}") for v in x}):
        if not values or value > 1.05 * values[-1]:
            values.append(value)
    ax.set_xscale("log")
    if len(values) <= 10:
        ax.set_xticks(values, [format_count(v) for v in values])
        ax.set_xticks([], minor=True)
    else:
        counts(ax)


def _count(value: float, _: int) -> str:
    return format_count(value) if value < 1e15 else f"{value:.0e}".replace("e+", "e")


def counts(ax) -> None:
    """A logarithmic axis of tokens or FLOPs, once all is drawn: 500k, 1M, 2M, however narrow; if wide, 1M, 10M."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    # LogLocator heeds numticks only where it has a single tick per decade.
    subs = (1, 2, 5) if high < 10**2.5 * low else (1,)
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(_count))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
