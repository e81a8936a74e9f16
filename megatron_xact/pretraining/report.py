"""What a run came to: a loss plot, an alpha plot, and the validation perplexity beside a unigram model's.

Reads only what the run wrote (Megatron's TensorBoard events, our JSONL files, the data's manifest), so it can be made
again at any time, of a run that is finished, running or broken off.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Report:
    """Losses in nats per token; None where the run has not measured it."""

    loss: Curve
    validation: Curve
    speeds: list[float]  # tokens per second, each since the record before
    alphas: list[tuple[int, dict[int, dict[str, float]]]]  # (step, layer -> parameter -> effective value)
    unigram_loss: float | None

    @property
    def validation_perplexity(self) -> float | None:
        return math.exp(self.validation[-1][1]) if self.validation else None

    @property
    def unigram_perplexity(self) -> float | None:
        return math.exp(self.unigram_loss) if self.unigram_loss is not None else None


def read(run: Path, unigram_loss: float | None = None) -> Report:
    """The report of the run in folder `run`. Where a resumed run repeats a step, its later record counts."""
    alphas = {record["step"]: record["alphas"] for record in _records(run / "alphas.jsonl")}
    progress = _records(run / "progress.jsonl")
    return Report(
        loss=sorted({record["step"]: record["loss"] for record in progress}.items()),
        speeds=[record["tokens_per_second"] for record in progress if record["tokens_per_second"]],
        validation=_tensorboard_scalar(run / "tensorboard", "lm loss validation"),
        alphas=[(step, {int(layer): v for layer, v in layers.items()}) for step, layers in sorted(alphas.items())],
        unigram_loss=unigram_loss,
    )


def figures(report: Report) -> dict[str, object]:
    """The run in numbers, for report.json: losses in nats per token, effective alphas by layer."""
    return {
        "step": report.loss[-1][0],
        "training_loss": report.loss[-1][1],
        "validation_loss": report.validation[-1][1] if report.validation else None,
        "validation_perplexity": report.validation_perplexity,
        "unigram_perplexity": report.unigram_perplexity,
        "tokens_per_second": statistics.median(report.speeds) if report.speeds else None,
        "alphas": report.alphas[-1][1] if report.alphas else {},
    }


def summary(report: Report) -> str:
    """The result in two or three lines of text."""
    lines = []
    if report.loss:
        (first, at_first), (last, at_last) = report.loss[0], report.loss[-1]
        lines.append(f"training     loss {at_first:.3f} at step {first}, {at_last:.3f} at step {last}")
    if report.validation_perplexity is not None:
        beside = f" (a unigram model: {report.unigram_perplexity:,.1f})" if report.unigram_perplexity else ""
        lines.append(f"validation   perplexity {report.validation_perplexity:,.1f}{beside}")
    return "\n".join(lines) or "nothing measured yet"


def _records(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path) as file:  # a killed run may leave half a last line
        return [json.loads(line) for line in file if line.endswith("\n")]


def _tensorboard_scalar(folder: Path, tag: str) -> Curve:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return []
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return sorted({event.step: event.value for event in events.Scalars(tag)}.items())


def plot(report: Report, folder: Path) -> list[Path]:
    """Write loss.png and alphas.png (where there are alphas) into `folder`; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "loss.png"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(*zip(*report.loss, strict=True), lw=1, color="tab:blue", label="training")
    if report.validation:
        axes.plot(*zip(*report.validation, strict=True), "o-", color="tab:orange", label="validation")
    if report.unigram_loss is not None:
        axes.axhline(report.unigram_loss, ls="--", color="gray", label="unigram model, validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Language-model loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(written[0], dpi=130)
    plt.close(figure)

    if report.alphas:
        written.append(folder / "alphas.png")
        steps = [step for step, _ in report.alphas]
        layers = list(report.alphas[0][1])
        names = list(report.alphas[0][1][layers[0]])
        figure, panels = plt.subplots(
            1, len(names), figsize=(5.5 * len(names), 4.5), layout="constrained", squeeze=False
        )
        colours = plt.get_cmap("viridis")
        for axes, name in zip(panels[0], names, strict=True):
            for i, layer in enumerate(layers):
                values = [alphas[layer][name] for _, alphas in report.alphas]
                colour = colours(i / max(1, len(layers) - 1))
                axes.plot(steps, values, lw=1.5, color=colour, label=f"layer {layer}")
            axes.set(xlabel="step", ylabel=f"{name} (effective)", title=name)
            axes.grid(alpha=0.3)
        panels[0][-1].legend(fontsize="small", ncols=1 + len(layers) // 12)
        figure.savefig(written[1], dpi=130)
        plt.close(figure)
    return written
