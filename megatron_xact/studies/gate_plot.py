"""The picture of an FP8 gate: losses and their difference on the left, the layers on the right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import ticker

from megatron_xact.studies.figures import figure
from megatron_xact.studies.gate import Gate

COLOURS = {"bf16": "C0", "fp8": "C1"}
NAMES = {"bf16": "BF16", "fp8": "FP8"}


def draw(gate: Gate, path: Path) -> None:
    with figure(path, 2, 2, size=(5.8, 3.5)) as axes:
        _losses(gate, axes[0, 0])
        _differences(gate, axes[1, 0])
        _layers(gate, axes[0, 1], "error")
        _layers(gate, axes[1, 1], "growth")
        axes[0, 0].set_title(f"FP8 gate: {'PASS' if gate.passed else 'FAIL'}")
        axes[0, 1].set_title(f"Post-activations{f', step {gate.measured[1]:,}' if gate.measured else ''}")
        axes[0, 1].set_ylabel("relative RMS error in e4m3")
        axes[0, 1].yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=None))
        axes[1, 1].set(xlabel="layer", ylabel="growth of the largest magnitude", yscale="log")
        axes[1, 1].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
        axes[1, 1].yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes[1, 1].yaxis.set_minor_formatter(ticker.NullFormatter())
        axes[1, 1].axhline(1, color="0.4", lw=0.8)


def _losses(gate: Gate, ax) -> None:
    for name in ("bf16", "fp8"):
        steps, losses = gate.losses[name]
        if len(steps):
            ax.plot(steps, losses, lw=0.6, alpha=0.35, color=COLOURS[name])
            ax.plot(*_smoothed(steps, losses), lw=1.2, color=COLOURS[name], label=NAMES[name])
    if gate.diverged is not None:
        ax.axvline(gate.diverged, color="0.3", lw=1, ls=":", label="FP8 diverges")
    ax.set_ylabel("training loss (nats per token)")
    ax.legend()


def _differences(gate: Gate, ax) -> None:
    ax.set(xlabel="step", ylabel="FP8 - BF16 (nat)")
    ax.axhline(0, color="0.4", lw=0.8)
    ax.axhline(gate.threshold, color="C3", lw=1, ls="--", label=f"threshold {gate.threshold:g}")
    if not len(gate.steps):
        ax.set_ylim(-2 * gate.threshold, 2 * gate.threshold)
        ax.text(0.5, 0.25, "no step that both runs have", transform=ax.transAxes, ha="center")
    else:
        ax.plot(gate.steps, gate.differences, lw=0.6, color="0.7")
        ax.plot(*_smoothed(gate.steps, gate.differences), lw=1.2, color="C2", label="smoothed")
        # The first steps, where losses fall fast, would flatten all that follows.
        late = gate.differences[len(gate.steps) // 4 :]
        low, high = np.nanquantile(late, [0.005, 0.995]) if np.isfinite(late).any() else (0.0, 0.0)
        low, high = min(low, 0.0), max(high, gate.threshold)
        ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    if gate.gap is not None:
        first, last = gate.window[[0, -1]]
        ax.axvspan(first, last, color="C2", alpha=0.08, lw=0)
        ax.plot([first, last], [gate.gap.value] * 2, color="k", lw=2, label=f"gap {gate.gap.value:+.4f}")
        if np.isfinite([gate.gap.low, gate.gap.high]).all():
            ax.fill_between([first, last], gate.gap.low, gate.gap.high, color="k", alpha=0.2, lw=0)
    ax.legend(fontsize=8)


def _smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of a fiftieth of the records, each where it ends."""
    width = max(1, len(steps) // 50)
    return steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid")


def _layers(gate: Gate, ax, what: str) -> None:
    numbers = [layer.number for layer in gate.layers]
    for name, of in (("bf16", f"{what}_bf16"), ("fp8", what)):
        values = [getattr(layer, of) for layer in gate.layers]
        ax.plot(numbers, values, "o-", ms=3.5, lw=1.1, color=COLOURS[name], label=NAMES[name])
    for layer in (worst := gate.worst(what)):
        ax.annotate(str(layer.number), (layer.number, getattr(layer, what)), xytext=(0, 5),
                    textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    if not worst:
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(10, integer=True, min_n_ticks=1))
    ax.margins(y=0.15)
    ax.legend()
