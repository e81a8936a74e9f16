"""Runs that stop and go on: bit-exact resumes, other splits of the same checkpoint, kill -9, and the replica guard."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from torch.distributed.checkpoint import FileSystemReader
from training import MARKS, SAVED, STEPS, Run, Trainings, deviations, trainings

from megatron_xact.pretraining.checkpointing.folder import check_checkpoint
from megatron_xact.pretraining.config import load

pytestmark = MARKS

RESUMED = [("one@8", "one"), ("dp2@8", "dp2"), ("bf16 tp2 dp2@8", "bf16 tp2 dp2")]
RESHARDED = [("tp2@8 to pp2", "tp2"), ("tp2 distributed@8 to pp2", "tp2 distributed")]
BROKEN_OFF = ["killed", "perturbed"]
NAMES = {name for pair in RESUMED + RESHARDED for name in pair}
NAMES |= {"tp2"} | {f"{name}, again" for name in BROKEN_OFF}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Trainings:
    return trainings(tmp_path_factory.getbasetemp()).start(*sorted(NAMES))


@pytest.mark.parametrize("name, whole", RESUMED, ids=[name for name, _ in RESUMED])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(runs, name, whole):
    """Plain optimizer; distributed optimizer over two data-parallel ranks; that in bf16 with tensor parallelism."""
    resumed, whole = runs[name], runs[whole]
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 8}
    assert resumed.alphas == {step: alphas for step, alphas in whole.alphas.items() if step >= 8}
    assert set(resumed.losses) == set(range(9, STEPS + 1))
    assert resumed.alphas[8] != resumed.alphas[STEPS]


@pytest.mark.parametrize("name, whole", RESHARDED, ids=[name for name, _ in RESHARDED])
def test_saved_at_tp2_and_loaded_at_pp2_it_goes_on_as_the_uninterrupted_run(runs, name, whole):
    """fp32: losses within four ulps (measured: one); the alphas arrive bit for bit."""
    loss, alpha = deviations(runs[name], runs[whole])
    print(f"{name}: losses {loss:.2e}, alphas {alpha:.2e}")
    assert list(runs[name].losses) == list(range(9, STEPS + 1))
    assert loss <= 2e-6 and alpha <= 1e-6
    assert runs[name].alphas[8] == runs[whole].alphas[8]


@pytest.mark.parametrize("name", ["tp2", "tp2@8 to pp2", "bf16 tp2 dp2"])
def test_alphas_lie_in_the_checkpoint_as_layers_by_one_in_fp32(runs, name):
    checkpoint = FileSystemReader(check_checkpoint(runs[name].folder))
    saved = checkpoint.read_metadata().state_dict_metadata
    for key in ("alpha_p", "alpha_n"):
        tensor = saved[f"decoder.layers.mlp.activation_func.{key}"]
        assert tuple(tensor.size) == (2, 1) and str(tensor.properties.dtype) == "torch.float32"


def test_tokens_are_those_consumed_where_batches_vary(runs, server, tmp_path):
    """Of 32-token sequences: 2 a step for 192 tokens, 4 until 448, then 8; ended and resumed on the way."""
    one = load(runs.config)
    fixed = ("global-batch-size", "train-iters", "lr-warmup-iters", "lr-wsd-decay-iters", "lr-decay-iters")
    varying = {"step-batch-size-schedule": "0:2 192:4 448:8", "train-samples": 22, "lr-wsd-decay-samples": 8}
    config, folder = tmp_path / "varying.toml", tmp_path / "run"
    kept = {key: value for key, value in one.megatron.items() if key not in fixed}
    config.write_text(replace(one, megatron=kept | varying).dump())
    words = [str(config), "--save", str(folder), "--load", str(folder), "--data-cache-path", str(tmp_path / "cache")]
    told = [server.run(*words, *ending) for ending in (["--exit-interval", "4"], [])]
    records = Run(folder, 0, told[-1]).records("progress.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in records] == [32 * sequences for sequences in (2, 4, 6, 10, 14, 22)]


def test_a_run_with_a_killed_rank_ends_in_failure_and_keeps_its_last_whole_checkpoint(runs):
    killed = runs["killed"]
    assert killed.code != 0
    # The second run goes on in the same folder, maybe already: what the kill left is the beginning of the file.
    assert [record["step"] for record in killed.records("progress.jsonl")][:10] == list(range(1, 11))
    assert {path.name for path in killed.folder.glob("iter_*")} >= {f"iter_{step:07d}" for step in SAVED[:2]}
    assert re.search(r"successfully loaded checkpoint .* at iteration 8\b", runs["killed, again"].output)


def test_the_guard_stops_a_run_whose_replicas_came_apart_and_names_rank_layer_and_values(runs):
    perturbed = runs["perturbed"]
    assert perturbed.code != 0
    told = re.search(
        r"xact: error: rank \d on \S+, after step 10: after 10 steps, "
        r"decoder\.layers\.0\.mlp\.activation_func\.alpha_p\[0\] differs between "
        r"tensor-parallel ranks: rank 0 = ([\d.e-]+), rank 1 = ([\d.e-]+)\.",
        perturbed.output,
    )
    assert told, perturbed.output[-3000:]
    assert float(told[2]) - float(told[1]) == pytest.approx(1e-3, rel=0.1)  # what rank 1 added, one update ago


@pytest.mark.parametrize("name", BROKEN_OFF)
def test_the_same_command_again_ends_at_the_losses_of_an_undisturbed_run(runs, name):
    again, tp2 = runs[f"{name}, again"], runs["tp2"]
    assert again.losses == tp2.losses
    assert [record["step"] for record in again.records("progress.jsonl")] == [
        *range(1, 11),
        *range(9, STEPS + 1),
    ]
    assert {step: again.alphas[step] for step in range(8, STEPS + 1)} == {
        step: tp2.alphas[step] for step in range(8, STEPS + 1)
    }
