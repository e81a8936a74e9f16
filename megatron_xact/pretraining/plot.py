"""`xact plot`: the pictures of a run, or of several beside one another, from what lies in their folders.

Needs neither Megatron nor a GPU, and the run may be finished, still running or broken off.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from megatron_xact.pretraining import drawing, report
from megatron_xact.pretraining.report import Report
from megatron_xact.whole import whole_file

_DPI = 130


def main(args: argparse.Namespace) -> int:
    """The subcommand. ValueError or OSError: a folder that is not a run's."""
    labels = _labels(args.runs)
    reports = [replace(_read(run), name=label) for run, label in zip(args.runs, labels, strict=True)]
    if len(reports) == 1:
        written = draw(reports[0], args.out or args.runs[0] / "plots")
    else:
        folder = args.out or Path("plots")
        written = compare(reports, folder)
        written += [path for one in reports for path in draw(one, folder / one.name)]
    for run, one in zip(args.runs, reports, strict=True):
        for note in _missing(run, one):
            print(note)
    for path in written:
        print(path)
    return 0


def draw(one: Report, folder: Path) -> list[Path]:
    """Every picture that the report has something for; returns their paths."""
    return [_save(figure, folder / f"{name}.png") for name, figure in _figures(one)]


def compare(reports: list[Report], folder: Path) -> list[Path]:
    """Several runs in the same axes; returns the pictures' paths."""
    return [_save(figure, folder / f"{name}.png") for name, figure in _comparisons(reports)]


def _figures(one: Report) -> Iterator[tuple[str, Figure]]:
    if one.loss:
        yield "loss", drawing.loss([one])
    if figure := drawing.progress([one]):
        yield "progress", figure
    if one.alphas:
        yield "alphas", drawing.alphas(one)
        yield "alphas_over_depth", drawing.alphas_over_depth(one)
    if one.activation:
        yield "activation", drawing.function(one)
    if one.statistics:
        yield "statistics", drawing.statistics(one)
        yield "statistics_over_depth", drawing.statistics_over_depth([one])


def _comparisons(reports: list[Report]) -> Iterator[tuple[str, Figure]]:
    if any(one.loss for one in reports):
        yield "loss", drawing.loss(reports)
    if figure := drawing.progress(reports):
        yield "progress", figure
    if any(one.alphas for one in reports):
        yield "alphas_over_depth", drawing.alphas_of_runs(reports)
    if any(one.statistics for one in reports):
        yield "statistics_over_depth", drawing.statistics_over_depth(reports)


def _read(run: Path) -> Report:
    found = report.read(run)
    if not (found.loss or found.alphas or found.statistics):
        present = [name for name in report.FILES if (run / name).exists()]
        what = f"{' and '.join(present)} without a whole record" if present else f"none of {', '.join(report.FILES)}"
        raise ValueError(f"{run} has {what}; expected the folder of a run of `xact pretrain`: its save in [checkpoint]")
    return found


def _missing(run: Path, one: Report) -> Iterator[str]:
    """What cannot be drawn of a run that has something, and why."""
    without_parameters = one.activation is not None and not one.activation.trainable
    for name, what in report.FILES.items():
        if not (run / name).exists() and not (name == "alphas.jsonl" and without_parameters):
            yield f"{run}: no {name}, so no plot of {what}"
    if one.activation is None:
        yield f"{run}: no config.toml, so no plot of the activation function"


def _labels(runs: list[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    parts = [run.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts))):
        labels = ["-".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"the same run twice: {', '.join(map(str, runs))}")


def _save(figure: Figure, path: Path) -> Path:
    """Whole or not at all: someone may be looking at the run's last picture."""
    with whole_file(path) as growing:
        figure.savefig(growing, dpi=_DPI, format="png")
    return path
