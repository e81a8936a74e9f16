"""What run folders tell beyond the table: training curves and learned activation parameters, as pretraining wrote them.

`progress.jsonl` has one record per interval with step, loss and tokens; `alphas.jsonl` and `statistics.jsonl` one with
step and values by layer. Where a resumed run repeats steps, what it left behind does not count.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_xact.studies.law import Array
from megatron_xact.studies.table import Run


@dataclass(frozen=True)
class Curves:
    """tokens and loss: [records]; alphas: parameter -> (steps [records], values [records, layers])."""

    tokens: Array
    loss: Array
    alphas: dict[str, tuple[Array, Array]]


def read(run: Run, root: Path) -> Curves | None:
    """None where the table names no folder for this run or it is not there. ValueError: its records are other ones."""
    folder = root / run.run
    if not run.run or not folder.is_dir():
        return None
    try:
        return _read(folder)
    except (LookupError, TypeError, ValueError, StopIteration, AttributeError) as error:
        raise ValueError(
            f"{folder}: progress.jsonl or alphas.jsonl is not what pretraining writes: {error!r}"
        ) from None


def _read(folder: Path) -> Curves:
    progress = records(folder / "progress.jsonl")
    alphas = {r["step"]: r["alphas"] for r in records(folder / "alphas.jsonl")}
    steps = list(alphas)
    names = list(next(iter(alphas[steps[0]].values()))) if steps else []
    over_time = {
        name: (
            np.array(steps, float),
            np.array([[alphas[s][layer][name] for layer in sorted(alphas[s], key=int)] for s in steps]),
        )
        for name in names
    }
    return Curves(np.array([r["tokens"] for r in progress], float), np.array([r["loss"] for r in progress]), over_time)


def final_alphas(run: Run, root: Path) -> dict[str, Array]:
    """Parameter -> effective value by layer at the end, from the table or else from the run folder."""
    if run.alphas:
        try:
            found = {name: np.array(values, float) for name, values in json.loads(run.alphas).items()}
            layers = {values.shape for values in found.values()}
            if len(layers) > 1 or any(len(shape) != 1 or not shape[0] for shape in layers):
                raise ValueError
            return found
        except (ValueError, AttributeError, TypeError):
            raise ValueError(f"{run.line or run.activation}: alphas = {run.alphas[:60]!r} is not JSON of the form "
                             '{"alpha_p": [0.8, 0.9], ...}, a value per layer') from None  # fmt: skip
    curves = read(run, root)
    return {name: values[-1] for name, (_, values) in curves.alphas.items()} if curves else {}


def records(path: Path) -> list[dict]:
    """By ascending step; [] where there is no such file.

    A killed run may leave half a line, and a resumed one goes on right behind it.
    """
    if not path.exists():
        return []
    kept: list[dict] = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line[max(0, line.rfind('{"step":')) :])
            except ValueError:
                continue
            while kept and kept[-1]["step"] >= record["step"]:
                kept.pop()
            kept.append(record)
    return kept
