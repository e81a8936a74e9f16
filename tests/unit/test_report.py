"""The report of a run: what it reads from the run's files. The pictures of it: the numbers that go into them."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from torch.utils.tensorboard import SummaryWriter

from megatron_xact import activations, cli
from megatron_xact.pretraining import config, drawing, plot, report
from megatron_xact.pretraining import run as run_module
from megatron_xact.pretraining.data.preprocess import prepare
from megatron_xact.pretraining.statistics import NEAR_ZERO, STATISTICS

ROOT = Path(__file__).parents[2]
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
            writer.add_scalar("lm loss validation ppl", math.exp(loss), step)
    return tmp_path


def made_up(folder: Path, name: str, layers: int = 3) -> Path:
    """A folder as a run of this activation leaves it, at steps 0, 10 and 20."""
    folder.mkdir()
    record = activations.get(name)
    (folder / "config.toml").write_text(f'[activation]\nname = "{name}"\n')
    steps = (0, 10, 20)
    write(folder / "progress.jsonl", [progress(step, 5.0 - step / 10) for step in steps[1:]])
    if record.trainable:
        values = {step: {n: {q.name: q.init + step * n / 100 for q in record.trainable} for n in numbers(layers)}
                  for step in steps}  # fmt: skip
        write(folder / "alphas.jsonl", [{"step": step, "alphas": values[step]} for step in steps])
    found = {step: {n: {key: 0.01 * n * (step + 1) + i for i, key in enumerate(STATISTICS)} for n in numbers(layers)}
             for step in steps}  # fmt: skip
    found[10][2]["postact_kurtosis"] = None
    write(folder / "statistics.jsonl", [{"step": step, "statistics": found[step]} for step in steps])
    return folder


def numbers(layers: int) -> range:
    return range(1, layers + 1)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_later_records_count_and_half_a_line_does_not(run):
    results = report.read(run)
    assert results.loss == [(10, 5.0), (20, 4.0), (30, 3.25), (40, 3.0)]
    assert [step for step, _ in results.alphas] == [0, 20]
    assert list(results.alphas[1][1]) == [1, 2, 10]  # layers are numbers, in the model's order
    assert results.alphas[1][1][2]["alpha_p"] == pytest.approx(1.0)
    assert results.validation == [(20, 4.5), (40, 3.25)]


def test_a_resumed_run_writes_on_behind_half_a_line(run):
    with open(run / "progress.jsonl", "a") as file:
        file.write(json.dumps(progress(45, 2.9)) + "\nnonsense\n" + json.dumps(progress(50, 2.8)) + "\n")
    assert report.read(run).loss[-3:] == [(40, 3.0), (45, 2.9), (50, 2.8)]


def test_a_record_that_cannot_be_written_is_told_and_training_goes_on(tmp_path):
    from megatron_xact.pretraining.monitor import Monitor

    terminal = io.StringIO()
    Monitor(tmp_path / "gone", terminal, 0, 0)._append("progress.jsonl", progress(1, 2.0))
    assert terminal.getvalue().startswith(f"xact: cannot write {tmp_path / 'gone' / 'progress.jsonl'}: there is no ")


def test_what_a_resumed_run_has_left_behind_does_not_count(tmp_path):
    """From step 20 on, recorded at other steps than before: 30 and 40 are of a past that was undone."""
    steps = [10, 20, 30, 40, 25, 35]
    write(tmp_path / "progress.jsonl", [progress(step, 5.0 - i) for i, step in enumerate(steps)])
    assert report.read(tmp_path).loss == [(10, 5.0), (20, 4.0), (25, 1.0), (35, 0.0)]


def test_tensorboards_scalars_are_those_that_its_own_reader_finds(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with SummaryWriter(str(run / "tensorboard"), filename_suffix=".later") as writer:
        for step in range(30, 60, 10):
            writer.add_scalar("lm loss validation", 1.0 / step, step)
            writer.add_scalar("learning-rate", 1e-3 / step, step)
            writer.add_scalar("grad-norm", 0.5, step)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    results = report.read(run)
    assert results.progress["learning_rate"] == [(e.step, e.value) for e in events.Scalars("learning-rate")]
    assert results.progress["grad_norm"] == [(30, 0.5), (40, 0.5), (50, 0.5)]
    assert results.validation == [(20, 4.5), *((e.step, e.value) for e in events.Scalars("lm loss validation")[-3:])]


def test_half_an_event_at_the_end_is_left_out(run):
    (path,) = (run / "tensorboard").iterdir()
    for cut in (1, 20, 100):
        path.write_bytes(path.read_bytes()[:-cut])
        assert report.read(run).validation[0] == (20, 4.5)
    assert report.read(run).validation == [(20, 4.5), (40, 3.5)]


def test_what_progress_records_goes_before_tensorboard(run):
    write(run / "progress.jsonl", [progress(10, 5.0) | {"grad_norm": 7.0, "memory_bytes": None}])
    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_scalar("grad-norm", 1.0, 10)
    found = report.read(run).progress
    assert found["grad_norm"] == [(10, 7.0)] and "memory_bytes" not in found and "time" not in found


def test_the_activation_is_that_of_the_config_and_its_bases(tmp_path):
    (tmp_path / "base.toml").write_text('[activation]\nname = "xielu"\nalpha_p = 1.5\n[model]\nanything = 1\n')
    (tmp_path / "config.toml").write_text('base = "base.toml"\n[activation]\nalpha_n = 2.0\n')
    record = config.load_activation(tmp_path / "config.toml").record()
    assert record == report.read(tmp_path).activation == activations.get("xielu", alpha_p=1.5, alpha_n=2.0)


def test_perplexities_are_those_of_the_losses(run):
    results = report.read(run, unigram_loss=math.log(50))
    assert results.validation_perplexity == pytest.approx(math.exp(3.25))
    assert results.unigram_perplexity == pytest.approx(50)
    told = report.summary(results)
    assert "loss 5.000 at step 10, 3.000 at step 40" in told
    write(run / "progress.jsonl", [progress(20, 5.334)])
    assert "loss 5.334 at step 20\n" in report.summary(report.read(run))
    write(run / "progress.jsonl", [progress(10, 5.0), progress(40, 3.0)])
    assert "perplexity 25.8 (a unigram model: 50.0)" in told
    assert "unigram" not in report.summary(report.read(run))
    (run / "report.json").write_text(json.dumps(report.figures(results)))
    assert report.read(run).unigram_perplexity == pytest.approx(50)  # as the finished run has measured it
    (run / "report.json").write_text("")
    assert report.read(run).unigram_perplexity is None
    diverged = replace(results, validation=[(40, 812.25)])
    assert report.figures(diverged)["validation_perplexity"] is None
    assert "validation   loss 812.2" in report.summary(diverged)


def test_the_unigram_model_is_that_of_the_only_validation_set(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for number in range(3):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} is a number. " * 20)
    made = prepare(tmp_path / "data", str(tmp_path / "text"), vocab_size=260)
    monkeypatch.chdir(tmp_path / "data")  # where the weight of a blend, taken for a path, would lie
    for paths, loss in (([str(made.validation_prefix)], made.unigram_nats), (["0.7", "a", "0.3", "b"], None)):
        assert run_module._unigram_loss(Namespace(valid_data_path=paths)) == loss


def test_the_figures_are_the_last_ones_and_are_json(run):
    layers = {n: {"postact_zero": n / 10, "postact_kurtosis": None if n == 2 else 3.0} for n in numbers(3)}
    write(run / "statistics.jsonl", [{"step": 0, "statistics": {}}, {"step": 20, "statistics": layers}])
    figures = json.loads(json.dumps(report.figures(report.read(run, math.log(50))), allow_nan=False))
    assert (figures["step"], figures["training_loss"], figures["validation_loss"]) == (40, 3.0, 3.25)
    assert figures["tokens_per_second"] == 100.0
    assert figures["alphas"]["10"] == pytest.approx({"alpha_p": 1.1, "alpha_n": 0.1})
    assert figures["statistics"] == {
        "step": 20,
        "postact_zero": {"min": 0.1, "median": 0.2, "max": 0.3},
        "postact_kurtosis": {"min": 3.0, "median": 3.0, "max": 3.0},
    }


def test_a_run_that_has_not_measured_anything(tmp_path):
    for present in (False, True):
        if present:
            write(tmp_path / "progress.jsonl", [], half='{"step"')
            (tmp_path / "tensorboard").mkdir()
        results = report.read(tmp_path)
        assert (results.loss, results.validation, results.alphas, results.statistics) == ([], [], [], [])
        assert results.validation_perplexity is None and results.unigram_perplexity is None
        assert report.summary(results) == "nothing measured yet"
        assert plot.draw(results, tmp_path) == []


# -- drawing ----------------------------------------------------------------------------------------------------------


def lines(axes, label: str | None = None) -> list[np.ndarray]:
    """[point, (x, y)] of each curve, with this label."""
    return [np.asarray(line.get_xydata()) for line in axes.lines if label in (None, line.get_label())]


@pytest.mark.parametrize("name", activations.names())
def test_the_learned_activation_is_the_records_formula_at_the_recorded_values(tmp_path, name):
    run = report.read(made_up(tmp_path / name, name))
    record = activations.get(name)
    value, slope, *_ = drawing.function(run).axes
    x = torch.linspace(-4.0, 2.0, 1201, dtype=torch.float64)
    layers = [1, 2, 3] if record.trainable else []
    assert [len(lines(axes)) for axes in (value, slope)] == [len(layers) + 3] * 2  # the initial one, and both axes
    for i, layer in enumerate([*layers, 0]):  # 0: at the initial values
        p = {q.symbol: q.init + layer / 5 * q.trainable for q in record.parameters}
        for axes, wanted in ((value, record.value(x, p)), (slope, record.slopes(x, p)[0])):
            assert lines(axes)[i] == pytest.approx(np.stack([x.numpy(), wanted.numpy()], 1), abs=1e-12)
    assert ("gate" in value.get_ylabel()) == record.gated


def test_xielu_is_drawn_as_the_paper_writes_it(tmp_path):
    value, slope, *_ = drawing.function(report.read(made_up(tmp_path / "run", "xielu"))).axes
    x = np.linspace(-4.0, 2.0, 1201)
    for layer in numbers(3):
        a = 0.8 + 0.2 * layer
        f = np.where(x > 0, a * x**2 + 0.5 * x, a * (np.expm1(x) - x) + 0.5 * x)
        df = np.where(x > 0, 2 * a * x + 0.5, a * np.expm1(x) + 0.5)
        assert lines(value)[layer - 1][:, 1] == pytest.approx(f, abs=1e-12)
        assert lines(slope)[layer - 1][:, 1] == pytest.approx(df, abs=1e-12)


def test_early_layers_are_dark_and_late_ones_light(tmp_path):
    run = report.read(made_up(tmp_path / "run", "xielu", layers=36))
    for figure in (drawing.function(run), drawing.alphas(run)):
        brightness = [np.dot(to_rgb(line.get_color()), (0.2126, 0.7152, 0.0722)) for line in figure.axes[0].lines[:36]]
        assert sorted(brightness) == brightness and brightness[0] < 0.1 and 0.6 < brightness[-1] < 0.9
        assert any(axes.get_ylabel() == "layer" for axes in figure.axes)  # the colour bar


def test_alphas_over_time_and_over_depth(tmp_path):
    run = report.read(made_up(tmp_path / "run", "xiprelu"))
    for time, depth in zip(drawing.alphas(run).axes[:2], drawing.alphas_over_depth(run).axes[:2], strict=True):
        for layer in numbers(3):
            wanted = [(step, 0.8 + step * layer / 100) for step in (0, 10, 20)]
            assert lines(time)[layer - 1] == pytest.approx(np.array(wanted))
        for i, step in enumerate((0, 10, 20)):
            wanted = [(layer, 0.8 + step * layer / 100) for layer in numbers(3)]
            assert lines(depth)[i] == pytest.approx(np.array(wanted))
        assert lines(time, "initial")[0][:, 1].tolist() == lines(depth, "initial")[0][:, 1].tolist() == [0.8, 0.8]


def test_statistics_by_layer_and_step(tmp_path):
    run = report.read(made_up(tmp_path / "run", "relu2"))
    maps, depth = drawing.statistics(run).axes, drawing.statistics_over_depth([run]).axes
    for i, (name, statistic) in enumerate(STATISTICS.items()):
        wanted = np.array([[0.01 * layer * (step + 1) + i for step in (0, 10, 20)] for layer in numbers(3)])
        if name == "postact_kurtosis":
            wanted[1, 1] = np.nan
        (mesh,) = maps[i].collections
        assert maps[i].get_title() == depth[i].get_title() == statistic.label
        assert np.ma.filled(mesh.get_array(), np.nan) == pytest.approx(wanted, nan_ok=True)
        assert mesh.get_coordinates()[0, :, 0].tolist() == [-5, 5, 15, 25]
        assert mesh.get_coordinates()[:, 0, 1].tolist() == [0.5, 1.5, 2.5, 3.5]
        assert np.stack([line[:, 1] for line in lines(depth[i])], 1) == pytest.approx(wanted, nan_ok=True)
    assert f"{1 / NEAR_ZERO:.0f}" in STATISTICS["postact_near_zero"].label


def test_loss_is_drawn_raw_and_smoothed(tmp_path):
    losses = np.random.default_rng(0).uniform(2, 4, 200)
    losses[50] = np.nan
    write(tmp_path / "progress.jsonl", [progress(step + 1, float(loss)) for step, loss in enumerate(losses)])
    whole, late = drawing.loss([report.read(tmp_path, unigram_loss=6.0)]).axes
    raw, smooth = lines(whole)[:2]
    assert raw[:, 1] == pytest.approx(losses, nan_ok=True) and raw[:, 0].tolist() == list(range(1, 201))
    wanted = [losses[max(0, i - 3) : i + 1].mean() for i in range(200)]
    assert smooth[:, 1] == pytest.approx(np.array(wanted), nan_ok=True)
    assert whole.lines[1].get_label() == "training, mean of 4 records"
    assert lines(whole, "unigram model, validation")[0][:, 1].tolist() == [6.0, 6.0]
    assert late.get_xlim() == (100, 200) and 1.8 < late.get_ylim()[0] < 2.1 and 3.9 < late.get_ylim()[1] < 4.2


def test_runs_of_unequal_batches_are_compared_over_tokens(tmp_path):
    one, other = (report.read(made_up(tmp_path / name, name)) for name in ("xielu", "relu2"))
    assert drawing.loss([one, other]).axes[0].get_xlabel() == "step"
    records = [progress(step, 3.0) | {"tokens": step * 5e8, "memory_bytes": 2**31, "mfu": 0.5} for step in (10, 20)]
    write(tmp_path / "relu2" / "progress.jsonl", records)
    other = report.read(tmp_path / "relu2")
    axes = drawing.loss([one, other]).axes[0]
    assert axes.get_xlabel() == "tokens (billions)"
    assert lines(axes, "relu2: training")[0].tolist() == [[5, 3], [10, 3]]
    assert lines(axes, "xielu: training")[0] == pytest.approx(np.array([[8e-8, 4], [1.6e-7, 3]]))
    panels = {axes.get_ylabel(): axes for axes in drawing.progress([one, other]).axes}
    assert set(panels) == {"speed (tokens/s)", "most memory of the last rank (GiB)", "model FLOPs utilisation (%)"}
    assert lines(panels["most memory of the last rank (GiB)"])[0][:, 1].tolist() == [2, 2]
    assert lines(panels["model FLOPs utilisation (%)"])[0][:, 1].tolist() == [50, 50]


def test_runs_that_lack_different_things(tmp_path):
    """One broken off before its first loss, whose first record lacks a layer; one without alphas and statistics."""
    early, late = (made_up(tmp_path / name, name) for name in ("xielu", "relu"))
    (early / "progress.jsonl").unlink()
    (late / "statistics.jsonl").unlink()
    records = [{"step": 0, "alphas": {"1": {}}}, {"step": 1, "alphas": {"1": {"alpha_p": 0.8}, "2": {"alpha_n": 0.9}}}]
    write(early / "alphas.jsonl", records)
    reports = [report.read(run) for run in (early, late)]
    assert [line.tolist() for line in lines(drawing.loss(reports).axes[0])] == [[[10, 4], [20, 3]]]
    assert len(drawing.statistics_over_depth(reports).axes[0].lines) == 1
    for figure in (drawing.alphas(reports[0]), drawing.alphas_over_depth(reports[0]), drawing.alphas_of_runs(reports)):
        drawn = [[line.tolist() for line in lines(axes) if len(line) == 1] for axes in figure.axes[:2]]
        assert [len(points) for points in drawn] == [1, 1]


def test_alphas_without_a_config_or_in_the_middle_of_a_record(run):
    """The activation is then unknown, and layer 10 has no earlier value."""
    layers = {"1": LAYERS["1"]}
    write(run / "alphas.jsonl", [{"step": 0, "alphas": layers}, {"step": 5, "alphas": LAYERS}])
    results = report.read(run)
    names = [path.name for path in plot.draw(results, run / "plots")]
    assert names == ["loss.png", "progress.png", "alphas.png", "alphas_over_depth.png"]
    assert [len(line) for line in lines(drawing.alphas(results).axes[0])] == [2, 1, 1]


# -- the command ------------------------------------------------------------------------------------------------------

COMMON = ["loss.png", "progress.png", "activation.png", "statistics.png", "statistics_over_depth.png"]


@pytest.mark.parametrize("name", ["xielu", "swiglu"])
def test_plots_of_a_run_are_made_again_and_their_paths_printed(tmp_path, capsys, name):
    folder = made_up(tmp_path / "run", name)
    assert cli.main(["plot", str(folder)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    wanted = COMMON + (["alphas.png", "alphas_over_depth.png"] if name != "swiglu" else [])
    assert sorted(written) == sorted(folder / "plots" / one for one in wanted) == sorted((folder / "plots").iterdir())
    for path in written:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 400 and len({tuple(p) for p in image.reshape(-1, image.shape[2])[::7]}) > 20


def test_several_runs_side_by_side_without_megatron(tmp_path):
    """In a process of its own: it must not need Megatron."""
    runs = [made_up(tmp_path / name, name) for name in ("xielu", "relu2")]
    (runs[0] / "statistics.jsonl").unlink()
    (runs[1] / "config.toml").unlink()
    words = ["plot", *map(str, runs), "--out", str(tmp_path / "out")]
    code = f"import sys\nfrom megatron_xact import cli\nassert cli.main({words}) == 0\nprint('megatron' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[-1] == "False"
    for picture in ("loss.png", "progress.png", "alphas_over_depth.png", "statistics_over_depth.png"):
        assert str(tmp_path / "out" / picture) in told and (tmp_path / "out" / picture).is_file()
    assert (tmp_path / "out" / "xielu" / "activation.png").is_file()
    assert f"{runs[1]}: no config.toml, so no plot of the activation function" in told
    assert any(line.startswith(f"{runs[1]}: no alphas.jsonl") for line in told)
    assert any(line.startswith(f"{runs[0]}: no statistics.jsonl") for line in told)


def test_runs_of_one_name_are_told_apart_by_the_folder_above(tmp_path):
    assert plot._labels([Path("a/run"), Path("b/run"), Path("b/other")]) == ["a-run", "b-run", "b-other"]
    assert plot._labels([Path("a/x"), Path("b/y")]) == ["x", "y"]


@pytest.mark.parametrize(
    "files, said",
    [
        (None, "no such folder"),
        ({}, "has none of progress.jsonl, alphas.jsonl, statistics.jsonl"),
        ({"progress.jsonl": '{"step": 1'}, "has progress.jsonl without a whole record"),
    ],
)
def test_a_folder_without_records_is_refused_in_one_line(tmp_path, capsys, files, said):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    assert cli.main(["plot", str(folder)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told and str(folder) in told


def test_the_same_run_twice_is_refused(tmp_path, capsys):
    folder = made_up(tmp_path / "run", "relu")
    assert cli.main(["plot", str(folder), str(folder)]) == 2
    assert "the same run twice" in capsys.readouterr().err
