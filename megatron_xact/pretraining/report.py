"""What a run came to, read from its folder: losses and other curves, alphas, statistics of the activations.

Reads only what the run wrote (Megatron's TensorBoard events, our JSONL files, the resolved config), so it can be done
again at any time, of a run that is finished, running or broken off.
"""

from __future__ import annotations

import json
import math
import statistics
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_xact.activations import Activation
from megatron_xact.pretraining import config

Curve = list[tuple[int, float]]  # (step, value)
ByLayer = list[tuple[int, dict[int, dict[str, float]]]]  # (step, layer from 1 -> name -> value; nan where undefined)

FILES = {
    "progress.jsonl": "loss and speed",
    "alphas.jsonl": "the activation's parameters by layer (telemetry-interval in [xact])",
    "statistics.jsonl": "sparsity and outliers by layer (statistics-interval in [xact])",
}
# What Megatron logs too: its tag, for runs that have it only there.
_TAGS = {"learning_rate": "learning-rate", "grad_norm": "grad-norm"}


@dataclass(frozen=True)
class Report:
    """Losses in nats per token; None, or empty, where the run has not measured it."""

    name: str
    loss: Curve
    validation: Curve
    progress: dict[str, Curve]  # the other numbers of progress.jsonl by their names there; speeds without zeros
    alphas: ByLayer  # effective values by parameter
    statistics: ByLayer  # by names in pretraining.statistics.STATISTICS
    activation: Activation | None  # with its initial values
    unigram_loss: float | None

    @property
    def speeds(self) -> list[float]:
        """Tokens per second, each since the record before."""
        return [speed for _, speed in self.progress.get("tokens_per_second", [])]

    @property
    def validation_perplexity(self) -> float | None:
        """None too where no float holds it: a loss above 709."""
        loss = self.validation[-1][1] if self.validation else math.inf
        return math.exp(loss) if loss < 709 else None

    @property
    def unigram_perplexity(self) -> float | None:
        return math.exp(self.unigram_loss) if self.unigram_loss is not None else None


def read(run: Path, unigram_loss: float | None = None) -> Report:
    """The report of the run in folder `run`. Where a resumed run repeats steps, what it left behind does not count."""
    progress = _latest(_records(run / "progress.jsonl"))
    names = dict.fromkeys(name for record in progress for name in record)
    curves = {name: [(r["step"], r[name]) for r in progress if r.get(name) is not None] for name in names}
    speeds = curves.pop("tokens_per_second", [])
    others = {"tokens_per_second": [(step, speed) for step, speed in speeds if speed]} | curves
    tensorboard = _tensorboard_scalars(run / "tensorboard", ["lm loss validation", *_TAGS.values()])
    for name, tag in _TAGS.items():
        others.setdefault(name, tensorboard[tag])
    return Report(
        name=run.resolve().name,
        loss=others.pop("loss", []),
        validation=tensorboard["lm loss validation"],
        progress={name: curve for name, curve in others.items() if curve and name not in ("step", "time")},
        alphas=_by_layer(run / "alphas.jsonl", "alphas"),
        statistics=_by_layer(run / "statistics.jsonl", "statistics"),
        activation=_activation(run / "config.toml"),
        unigram_loss=unigram_loss if unigram_loss is not None else _unigram_loss(run / "report.json"),
    )


def figures(report: Report) -> dict[str, object]:
    """The run in numbers, for report.json: losses in nats per token, alphas, the range of statistics over layers."""
    return {
        "step": report.loss[-1][0],
        "training_loss": report.loss[-1][1],
        "validation_loss": report.validation[-1][1] if report.validation else None,
        "validation_perplexity": report.validation_perplexity,
        "unigram_perplexity": report.unigram_perplexity,
        "tokens_per_second": statistics.median(report.speeds) if report.speeds else None,
        "alphas": report.alphas[-1][1] if report.alphas else {},
        "statistics": _over_layers(*report.statistics[-1]) if report.statistics else {},
    }


def summary(report: Report) -> str:
    """The result in two or three lines of text."""
    lines = []
    if report.loss:
        (first, at_first), (last, at_last) = report.loss[0], report.loss[-1]
        end = f", {at_last:.3f} at step {last}" if last > first else ""
        lines.append(f"training     loss {at_first:.3f} at step {first}{end}")
    if report.validation_perplexity is not None:
        beside = f" (a unigram model: {report.unigram_perplexity:,.1f})" if report.unigram_perplexity else ""
        lines.append(f"validation   perplexity {report.validation_perplexity:,.1f}{beside}")
    elif report.validation:
        lines.append(f"validation   loss {report.validation[-1][1]:.1f}")
    return "\n".join(lines) or "nothing measured yet"


def _over_layers(step: int, layers: dict[int, dict[str, float]]) -> dict[str, object]:
    """{"step": its step, statistic: {"min", "median", "max"} over the layers that have it}."""
    told: dict[str, object] = {"step": step}
    for name in dict.fromkeys(name for values in layers.values() for name in values):
        values = [v[name] for v in layers.values() if math.isfinite(v[name])]
        if values:
            told[name] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return told


def _records(path: Path) -> Iterator[dict]:
    """The whole records of a JSONL file. A killed run leaves half a line, and a resumed one goes on right behind it."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            start = line.rfind('{"step":')  # how every record begins, and nothing inside one
            if start >= 0 and line.endswith("\n"):
                try:
                    yield json.loads(line[start:])
                except ValueError:
                    continue


def _latest(records: Iterable[dict]) -> list[dict]:
    """The records by ascending step, without those of steps that were run again: what follows them counts."""
    kept: list[dict] = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def _by_layer(path: Path, key: str) -> ByLayer:
    def numbers(values: dict) -> dict[str, float]:
        return {name: math.nan if value is None else value for name, value in values.items()}

    return [
        (record["step"], {int(layer): numbers(values) for layer, values in record[key].items()})
        for record in _latest(_records(path))
    ]


def _activation(path: Path) -> Activation | None:
    return config.load_activation(path).record() if path.exists() else None


def _unigram_loss(path: Path) -> float | None:
    """As the run itself measured it at its end."""
    try:
        perplexity = json.loads(path.read_text(encoding="utf-8"))["unigram_perplexity"]
    except (FileNotFoundError, KeyError, TypeError, ValueError):  # no end yet, or a file that someone has changed
        return None
    return math.log(perplexity) if perplexity else None


def _tensorboard_scalars(folder: Path, tags: list[str]) -> dict[str, Curve]:
    """Of Megatron's event files, each a sequence of [length u64, its crc u32, event, crc u32].

    TensorBoard's own reader parses every event, which takes half a minute where alphas were logged for 60,000 steps.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    found: dict[str, list[dict]] = {tag: [] for tag in tags}
    for path in sorted(folder.glob("events.out.tfevents.*")):  # the name goes on with the time of the start
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            at += 12 + size + 4
            raw = data[at - 4 - size : at - 4]
            if at > len(data) or not any(tag.encode() in raw for tag in tags):
                continue
            event = Event.FromString(raw)
            for value in event.summary.value:
                if value.tag in found:
                    found[value.tag].append({"step": event.step, "value": value.simple_value})
    return {tag: [(r["step"], r["value"]) for r in _latest(records)] for tag, records in found.items()}
