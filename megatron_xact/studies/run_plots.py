"""Pictures from run folders: training curves, and what activations learned. Every function draws one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_xact.studies import figures
from megatron_xact.studies.curves import Curves
from megatron_xact.studies.law import Array
from megatron_xact.studies.outside import Values
from megatron_xact.studies.table import Run


def training_curves(found: Sequence[tuple[Run, Curves]], path: Path) -> None:
    activations = sorted({r.activation for r, _ in found})
    sizes = list(dict.fromkeys(r.size for r, _ in sorted(found, key=lambda f: f[0].params)))
    colour = figures.colours(activations)
    with figures.figure(path, 1, len(sizes), size=(5.0, 3.8)) as axes:
        for ax, size in zip(axes[0], sizes, strict=True):
            for activation in activations:
                those = [c for r, c in found if (r.size, r.activation) == (size, activation) and len(c.tokens)]
                for i, c in enumerate(those):
                    label = activation if i == 0 else None
                    ax.plot(c.tokens, c.loss, lw=0.8, alpha=0.8, color=colour[activation], label=label)
            ax.set(xlabel="tokens", ylabel="training loss (nats per token)", title=size)
            figures.counts(ax)
            ax.legend(fontsize=8)


def alphas_over_depth(found: Sequence[tuple[Run, dict[str, Array]]], path: Path) -> None:
    """Learned values by relative depth: a row per activation, a column per parameter, a shade per size."""
    activations = sorted({r.activation for r, _ in found})
    most = max(len(values) for _, values in found)
    sizes = list(dict.fromkeys(r.size for r, _ in sorted(found, key=lambda f: f[0].params)))
    shade = figures.shades(sizes)
    with figures.figure(path, len(activations), most, size=(4.8, 3.5)) as axes:
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
            for ax in row[len(names) :]:
                ax.set_axis_off()


def alphas_over_time(run: Run, found: Curves, path: Path) -> None:
    with figures.figure(path, 1, len(found.alphas), size=(4.8, 3.5)) as axes:
        for ax, (name, (steps, values)) in zip(axes[0], found.alphas.items(), strict=True):
            layers = [str(i + 1) for i in range(values.shape[1])]
            for layer, colour in figures.shades(layers).items():
                ax.plot(steps, values[:, int(layer) - 1], lw=1.2, color=colour, label=layer)
            ax.set(xlabel="step", ylabel=f"{name} (effective)", title=f"{run.activation} {run.size}: {name}")
            ax.legend(title="layer", fontsize=7, title_fontsize=8, ncols=1 + len(layers) // 9)


def shapes(found: Sequence[tuple[Run, dict[str, Array]]], values_of: Values, path: Path) -> None:
    """Learned functions by layer of one run per activation, beside the function it started as."""
    x = np.linspace(-4, 4, 321)
    with figures.figure(path, 1, len(found), size=(4.6, 3.8)) as axes:
        for ax, (run, learned) in zip(axes[0], found, strict=True):
            count = len(next(iter(learned.values())))
            for layer, colour in figures.shades([str(i + 1) for i in range(count)]).items():
                at = {name: float(v[int(layer) - 1]) for name, v in learned.items()}
                try:
                    values = values_of(run.activation, at, x)
                except ValueError as error:
                    raise ValueError(f"{run.line or run.run}: {error}") from None
                ax.plot(x, values, lw=1.1, color=colour, label=layer)
            ax.plot(x, values_of(run.activation, {}, x), "k--", lw=1, label="start")
            ax.set(xlabel="x", ylabel="f(x)", title=f"{run.activation} {run.size}")
            ax.legend(title="layer", fontsize=7, title_fontsize=8, ncols=1 + count // 9)
