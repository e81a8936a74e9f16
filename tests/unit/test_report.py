"""The report of a run: what it reads from the run's files, and what it draws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.image
import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_xact.pretraining import report

LAYERS = {
    "1": {"alpha_p": 0.8, "alpha_n": 0.7},
    "2": {"alpha_p": 0.9, "alpha_n": 0.6},
    "10": {"alpha_p": 1, "alpha_n": 0},
}


def write(path: Path, records: list[dict], half: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + half)


def progress(step: int, loss: float, speed: float = 100.0) -> dict:
    return {"step": step, "loss": loss, "tokens_per_second": speed, "tokens": step * 8, "time": 0.0}


@pytest.fixture
def run(tmp_path) -> Path:
    """Broken off after step 30 while writing, resumed from step 20."""
    losses = [progress(10, 5.0), progress(20, 4.0), progress(30, 3.5), progress(30, 3.25), progress(40, 3.0)]
    write(tmp_path / "progress.jsonl", losses, half='{"step": 50, "lo')
    alphas = [{"step": step, "alphas": LAYERS} for step in (0, 20)]
    later = {layer: {name: value + 0.1 for name, value in values.items()} for layer, values in LAYERS.items()}
    write(tmp_path / "alphas.jsonl", [*alphas, {"step": 20, "alphas": later}], half="{")
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step, loss in ((20, 4.5), (40, 3.5), (40, 3.25)):
            writer.add_scalar("lm loss validation", loss, step)
    return tmp_path


def test_later_records_count_and_half_a_line_does_not(run):
    results = report.read(run)
    assert results.loss == [(10, 5.0), (20, 4.0), (30, 3.25), (40, 3.0)]
    assert [step for step, _ in results.alphas] == [0, 20]
    assert list(results.alphas[1][1]) == [1, 2, 10]  # layers are numbers, in the model's order
    assert results.alphas[1][1][2]["alpha_p"] == pytest.approx(1.0)
    assert results.validation == [(20, 4.5), (40, 3.25)]


def test_perplexities_are_those_of_the_losses(run):
    results = report.read(run, unigram_loss=math.log(50))
    assert results.validation_perplexity == pytest.approx(math.exp(3.25))
    assert results.unigram_perplexity == pytest.approx(50)
    told = report.summary(results)
    assert "loss 5.000 at step 10, 3.000 at step 40" in told
    assert "perplexity 25.8 (a unigram model: 50.0)" in told
    assert "unigram" not in report.summary(report.read(run))


def test_the_figures_are_the_last_ones_and_are_json(run):
    figures = json.loads(json.dumps(report.figures(report.read(run, math.log(50)))))
    assert (figures["step"], figures["training_loss"], figures["validation_loss"]) == (40, 3.0, 3.25)
    assert figures["tokens_per_second"] == 100.0
    assert figures["alphas"]["10"] == pytest.approx({"alpha_p": 1.1, "alpha_n": 0.1})


def test_a_run_that_has_not_measured_anything(tmp_path):
    for present in (False, True):
        if present:
            write(tmp_path / "progress.jsonl", [], half='{"step"')
            (tmp_path / "tensorboard").mkdir()
        results = report.read(tmp_path)
        assert (results.loss, results.validation, results.alphas) == ([], [], [])
        assert results.validation_perplexity is None and results.unigram_perplexity is None
        assert report.summary(results) == "nothing measured yet"


def test_plots_show_the_data(run, tmp_path):
    written = report.plot(report.read(run, math.log(50)), tmp_path / "plots")
    assert [path.name for path in written] == ["loss.png", "alphas.png"]
    whole = [matplotlib.image.imread(path) for path in written]
    write(tmp_path / "progress.jsonl", [progress(10, 5.0), progress(40, 4.9)])
    other = matplotlib.image.imread(report.plot(report.read(tmp_path, math.log(50)), tmp_path / "other")[0])
    assert (whole[0] != other).any()
    for image in whole:
        assert min(image.shape[:2]) > 400 and len({tuple(p) for p in image.reshape(-1, image.shape[2])[::7]}) > 20


def test_a_run_without_alphas_has_no_plot_of_them(run, tmp_path):
    (run / "alphas.jsonl").unlink()
    assert [path.name for path in report.plot(report.read(run), tmp_path / "plots")] == ["loss.png"]
