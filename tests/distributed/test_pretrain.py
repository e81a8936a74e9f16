"""`xact pretrain` with real Megatron: however a run is split, its curves are the single process's; what it leaves."""

from __future__ import annotations

import math
import shlex
from argparse import Namespace

import matplotlib.image
import pytest
from training import DISTRIBUTED, MARKS, SAVED, STEPS, TP2, VIRTUAL, Trainings, deviations, trainings

from megatron_xact import cli
from megatron_xact.pretraining import arguments, gpt, platform, report
from megatron_xact.pretraining import config as config_file
from megatron_xact.pretraining.checkpointing.folder import check_checkpoint

pytestmark = MARKS

# fp32, losses near 6, where one ulp is 4.8e-7: four ulps. Measured at most 9.6e-7 (losses), 6e-8 (alphas).
FP32 = (2e-6, 1e-6)
# Partial sums are rounded to bf16 where the single process rounds the whole. Measured 4.7e-4 and 6.6e-5; bf16 itself
# moves the single process's curves by 4.9e-3 and 1.3e-4.
BF16 = (2e-3, 3e-4)

CURVES = [
    ("tp2", "one", FP32),
    ("tp2 sp", "one", FP32),
    ("tp2 dropout", "one dropout", FP32),  # the guard looks, too: one mask on all tensor-parallel ranks
    ("dp2", "one", FP32),
    ("one@4 to pp2", "one", FP32),
    ("one@4 to tp2 pp2", "one", FP32),
    ("gated tp2", "gated", FP32),
    ("biases recomputed tp2", "biases", FP32),  # a bias that comes out of a recomputed MLP
    ("bf16 tp2 dp2", "bf16", BF16),
]
NAMES = {name for curve in CURVES for name in curve[:2]} | {"one's config.toml", "bf16 vp"}
SPEC = ("--spec", "megatron_xact.layers.specs", "xielu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Trainings:
    return trainings(tmp_path_factory.getbasetemp()).start(*sorted(NAMES))


@pytest.mark.parametrize("name, reference, tolerance", CURVES, ids=[name for name, _, _ in CURVES])
def test_a_split_run_has_the_curves_of_the_single_process(runs, name, reference, tolerance):
    loss, alpha = deviations(runs[name], runs[reference])
    print(f"{name}: losses {loss:.2e}, alphas {alpha:.2e}")
    first = SAVED[0] if "@4" in name else 0
    assert list(runs[name].losses) == list(range(first + 1, STEPS + 1))
    assert list(runs[name].alphas) == list(range(first, STEPS + 1))
    assert loss <= tolerance[0] and alpha <= tolerance[1]


def test_the_tolerances_are_small_beside_what_is_compared(runs):
    """Training moves losses and alphas, and dtype and activation change them, by far more than is tolerated."""
    one = runs["one"]
    assert one.losses[1] - one.losses[STEPS] > 100 * BF16[0]
    for name in ("one", "gated", "bf16"):
        start, end = (runs[name].alphas[step] for step in (0, STEPS))
        assert all(abs(end[layer][key] - start[layer][key]) > 3 * BF16[1] for layer in start for key in start[layer])
    loss, alpha = deviations(runs["bf16"], one)
    assert loss > 10 * FP32[0] and alpha > 10 * FP32[1]


def test_alphas_of_all_layers_are_recorded_from_their_initial_values_to_the_last_step(runs):
    for name in ("one", "tp2", "dp2", "bf16 tp2 dp2"):
        alphas = runs[name].alphas
        assert list(alphas) == list(range(STEPS + 1))
        assert alphas[0] == {layer: pytest.approx({"alpha_p": 0.8, "alpha_n": 0.8}, abs=1e-7) for layer in ("1", "2")}
        assert alphas[STEPS]["1"] != alphas[STEPS]["2"]
    assert runs["gated"].alphas[0] == {layer: {"alpha": 0.0} for layer in ("1", "2")}
    assert set(runs["one@4 to pp2"].alphas[STEPS]) == {"1", "2"}  # one layer on each pipeline stage


@pytest.mark.parametrize("name", ["one", "tp2", "one@4 to pp2"])
def test_tensorboard_has_the_losses_and_the_alphas(runs, name):
    run = runs[name]
    assert run.scalars("lm loss") == pytest.approx(run.losses, abs=2e-6)
    assert set(run.scalars("lm loss validation")) == {6, STEPS}
    for layer in (1, 2):
        for key in ("alpha_p", "alpha_n"):
            recorded = {step: layers[str(layer)][key] for step, layers in run.alphas.items()}
            assert run.scalars(f"alpha/{key}/layer_{layer:03d}") == pytest.approx(recorded, abs=1e-7)


def test_the_saved_config_trains_to_the_same_losses(runs):
    again = runs["one's config.toml"]
    assert again.losses == runs["one"].losses and again.alphas == runs["one"].alphas


@pytest.mark.parametrize("name", ["one", "one@4 to tp2 pp2"])
def test_a_run_leaves_plots_and_a_whole_checkpoint(runs, name):
    folder = runs[name].folder
    for plot in ("loss.png", "alphas.png"):
        image = matplotlib.image.imread(folder / "plots" / plot)  # [height, width, colours]
        assert min(image.shape[:2]) > 400
        colours = {tuple(pixel) for pixel in image.reshape(-1, image.shape[2])[::7]}
        assert len(colours) > 20  # curves, labels and their smoothed edges, not a blank sheet
    assert check_checkpoint(folder).name == f"iter_{STEPS:07d}"
    for words in (
        "training     loss",
        "validation   perplexity",
        "(a unigram model:",
        str(folder / "config.toml"),
    ):
        assert words in runs[name].output


def test_the_report_has_the_runs_own_numbers(runs):
    results = report.read(runs["one"].folder, runs.data.unigram_nats)
    assert results.loss == sorted(runs["one"].losses.items())
    assert [step for step, _ in results.validation] == [6, STEPS]
    assert results.unigram_perplexity == pytest.approx(runs.data.unigram_perplexity)


def test_what_is_asked_of_the_samples_reaches_megatrons_datasets(runs, monkeypatch):
    class Asked(Exception):
        pass

    def asked(**settings):
        raise Asked(settings)

    words = "--eod-mask-loss --reset-position-ids --reset-attention-mask --seed 7 --data-cache-path cache"
    args = arguments.parse(config_file.load(runs.config).with_overrides(words.split()).arguments())
    args.iteration, args.eval_global_batch_size, args.data_parallel_size = 0, 4, 1
    monkeypatch.setattr(gpt, "get_args", lambda: args)
    monkeypatch.setattr(gpt, "build_tokenizer", lambda args: Namespace(eod=0))
    monkeypatch.setattr(gpt, "GPTDatasetConfig", asked)
    with pytest.raises(Asked) as error:
        gpt.datasets_provider((8, 4, 4))
    settings = error.value.args[0]
    assert settings["eod_mask_loss"] and settings["reset_position_ids"] and settings["reset_attention_mask"]
    assert (settings["random_seed"], settings["sequence_length"], settings["path_to_cache"]) == (7, 32, "cache")


def test_the_activation_announces_itself(runs):
    assert "> megatron-xact: xielu in every MLP" in runs["tp2"].output
    assert "gradient summed over 2 tensor-parallel ranks" in runs["tp2"].output
    assert "> megatron-xact: xsilu_glu1 in every MLP" in runs["gated"].output


@pytest.mark.parametrize("words, ranks, twin", [((), 1, "one"), (TP2, 2, "tp2")], ids=["one", "tp2"])
def test_megatrons_own_program_trains_the_same_by_its_spec_argument(runs, capsys, words, ranks, twin):
    """--spec from upstream's pretrain_gpt.py: no config or monitor of ours, and the same losses bit for bit."""
    run = runs.upstream(f"upstream-{twin}", *SPEC, *upstream_arguments(runs, capsys, *words), ranks=ranks)
    assert run.code == 0, run.output[-6000:]
    assert "> megatron-xact: xielu in every MLP" in run.output
    assert run.scalars("lm loss") == runs[twin].scalars("lm loss")
    assert len(run.scalars("lm loss")) == STEPS


def test_in_bf16_with_virtual_stages_it_goes_on_by_its_spec_argument(runs, capsys):
    """What a 16-bit run needs to be saved comes with the spec; here xact pretrain saves and --spec alone goes on."""
    before = runs["bf16 vp"]
    assert min(before.losses.values()) < math.log(512) - 0.1  # it does learn
    words = ("--load", str(before.folder), "--ckpt-step", "8", "--bf16", *DISTRIBUTED, *VIRTUAL)
    run = runs.upstream("upstream-bf16-vp", *SPEC, *upstream_arguments(runs, capsys, *words), ranks=2)
    assert run.code == 0, run.output[-6000:]
    losses = run.scalars("lm loss")
    del losses[10]  # where Megatron averages the first two steps after a start
    assert losses == {step: before.scalars("lm loss")[step] for step in (9, 11, 12)}
    assert check_checkpoint(run.folder).name == f"iter_{STEPS:07d}"


def upstream_arguments(runs, capsys, *words: str) -> list[str]:
    """The config's, and these, as Megatron's own program takes them."""
    assert cli.main(["pretrain", str(runs.config), "--print-args", *words]) == 0
    arguments = shlex.split(capsys.readouterr().out)
    for key, value in platform.missing_arguments(has_gpu=False, has_te=False).items():
        arguments += [f"--{key}"] + ([] if value is True else [value])
    return arguments
