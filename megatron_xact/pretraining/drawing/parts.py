"""What the pictures share: colours, grids of panels, labels, colour bars.

Colours say one thing each and are told apart by colour-blind eyes: runs in Okabe and Ito's palette, depth from dark
(early layers) to light (late ones), time in a scale of its own. Many layers get a colour bar, never a legend.
"""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from megatron_xact.pretraining.report import ByLayer

RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
THOUSANDS = StrMethodFormatter("{x:,.0f}")
_BAR = 5.0  # length of a colour bar over its width, per inch of the figure's height


def _scale(name: str) -> Colormap:
    """A perceptually uniform scale without its lightest end, which a white page swallows."""
    colours = matplotlib.colormaps[name](np.linspace(0.0, 0.9, 256))
    return LinearSegmentedColormap.from_list(f"{name} on white", colours)


DEPTH, TIME = _scale("viridis"), _scale("plasma")


def figure_of(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def grid(panels: int, columns: int, size: tuple[float, float] = (4.6, 3.4)) -> tuple[Figure, list[Axes]]:
    """A figure with this many panels of this size in inches, row by row."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = figure_of(size[0] * columns, size[1] * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[panels:]:
        unused.remove()
    return figure, list(axes[:panels])


def ticks(at_most: int, whole: bool = True) -> MaxNLocator:
    return MaxNLocator(at_most, integer=whole, steps=[1, 2, 5, 10], min_n_ticks=1)


def style(points) -> str:
    """A line, and where it would be none, for a single record, a point."""
    return "-" if len(points) > 1 else "o"


def label_axes(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(ticks(6, whole=x in ("step", "layer")))
    if x == "step":
        axes.xaxis.set_major_formatter(THOUSANDS)


def zoom(axes: Axes, low: float, high: float) -> None:
    """To these x, and to the y that the curves have there."""
    points = np.concatenate([line.get_xydata() for line in axes.lines] or [np.empty((0, 2))])
    values = points[(points[:, 0] >= low) & (points[:, 0] <= high) & np.isfinite(points[:, 1]), 1]
    axes.set_xlim(low, high)
    if len(values):
        axes.set_ylim(with_margin(values.min(), values.max()))


def with_margin(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def depth_colour(layer: int, layers: list[int]):
    return DEPTH((layer - 1) / max(1, max(layers) - 1))


def depth_bar(figure: Figure, panels, layers: list[int]) -> None:
    colours = ScalarMappable(Normalize(1, max(2, *layers)), DEPTH)
    aspect = _BAR * figure.get_figheight()
    figure.colorbar(colours, ax=panels, label="layer", ticks=ticks(10), aspect=aspect)


def time_bar(figure: Figure, panels, records: ByLayer) -> None:
    colours = ScalarMappable(Normalize(0, max(1, records[-1][0])), TIME)
    aspect = _BAR * figure.get_figheight()
    figure.colorbar(colours, ax=panels, label="step", ticks=ticks(10), format=THOUSANDS, aspect=aspect)
