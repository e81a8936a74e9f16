"""Cooldowns that leave a run's constant phase: the same numbers as the run itself has where the two do the same."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training import MARKS, Run, Trainings, trainings

from megatron_xact import cli
from megatron_xact.pretraining.branch import branch_of
from megatron_xact.pretraining.config import load

pytestmark = MARKS

STEPS, WARMUP, DECAY = 12, 2, 4  # of CONFIG in training.py; its learning rate goes from 0.01 to 0
# So few documents that 12 steps of 4 sequences are several epochs, and 7 steps are fewer: another shuffle.
EPOCHS = ("--split", "100,0,0", "--eval-iters", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Trainings:
    return trainings(tmp_path_factory.getbasetemp())


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a run's folder but its branches: name -> when it was changed, its size."""
    paths = (path for path in folder.rglob("*") if "branches" not in path.parts and path != folder)
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@pytest.fixture(scope="module")
def few(data, tmp_path_factory) -> list[str]:
    """The words that make a run read a few documents over and over."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("few")
    source = IndexedDataset(str(data.folder / "data" / "train_text_document"))
    prefix = str(folder / "few_text_document")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=source.index.dtype)
    tokens = 0
    for number in range(len(source)):
        if tokens > 20 * 32:  # 20 sequences: 48 are 2.4 epochs, 28 are 1.4
            break
        document = source[number][:200]
        builder.add_document(torch.from_numpy(document.astype("int64")), [len(document)])
        tokens += len(document)
    builder.finalize(prefix + ".idx")
    return ["--train-data-path", prefix, "--data-cache-path", str(folder / "cache")]


@pytest.fixture(scope="module")
def trunk(data, server, few, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("trunk") / "run"
    words = [str(data.config), "--save", str(folder), "--load", str(folder), *few, "--save-interval", "1"]
    return Run(folder, 0, server.run(*words, "--exit-interval", str(STEPS)))


@pytest.fixture(scope="module")
def branch(server, trunk) -> Callable[..., Run]:
    def train(step: int, steps: int, *words: str, folder: Path | None = None) -> Run:
        where = folder or trunk.folder / "branches" / f"step-{step}+{steps}"
        saving = ["--save", str(folder)] if folder else []
        asked = ["--branch-from", str(step), "--cooldown-steps", str(steps), *saving]
        output = server.run(str(trunk.folder / "config.toml"), *asked, *words)
        return Run(where, 0, output)

    return train


def test_a_branch_with_the_runs_own_decay_is_the_run_itself_bit_for_bit(trunk, branch):
    before = files(trunk.folder)
    own = branch(STEPS - DECAY, DECAY, "--exit-interval", str(STEPS))
    assert set(own.losses) == set(range(STEPS - DECAY + 1, STEPS + 1))
    assert own.losses == {step: loss for step, loss in trunk.losses.items() if step > STEPS - DECAY}
    assert own.alphas == {step: trunk.alphas[step] for step in range(STEPS - DECAY, STEPS)}
    assert files(trunk.folder) == before


def test_a_shorter_branch_reads_on_where_the_run_did_and_decays_as_the_formula_says(trunk, branch):
    """Its first update is at the constant rate still, so the run's next two losses are its own."""
    step, steps = 4, 3
    early = branch(step, steps, "--exit-interval", str(step + steps))
    assert [early.losses[s] for s in (step + 1, step + 2)] == [trunk.losses[s] for s in (step + 1, step + 2)]
    assert early.losses[step + 3] != trunk.losses[step + 3]
    told = early.scalars("learning-rate")  # after a step: that of the next one
    expected = {step + i: 0.01 * (1 - math.sqrt(i / steps)) for i in range(1, steps + 1)}
    assert told == pytest.approx(expected, abs=1e-9) and told[step + steps] == 0


def test_the_same_command_again_resumes_the_branch_and_so_does_its_own_config(server, trunk, branch, tmp_path):
    step, steps = 5, 6
    whole = branch(step, steps, "--exit-interval", str(step + steps), folder=tmp_path / "whole")
    stopped = branch(step, steps, "--exit-interval", "7", folder=tmp_path / "stopped")
    assert set(stopped.losses) == {6, 7}
    again = branch(step, steps, "--exit-interval", "9", folder=tmp_path / "stopped")
    assert f"going on from {again.folder}/iter_0000007" in again.output
    server.run(str(again.folder / "config.toml"), "--exit-interval", str(step + steps))
    assert again.losses == whole.losses and set(again.losses) == set(range(step + 1, step + steps + 1))


def asked(trunk: Run, step: int, steps: int, *words: str):
    return branch_of(load(trunk.folder / "config.toml"), list(words), [], step, steps)


def test_the_config_of_a_branch(trunk, tmp_path):
    config = asked(trunk, 5, 3, "--save", str(tmp_path / "branch"))
    assert config.branch.trunk == str(trunk.folder) and (config.branch.step, config.branch.data_steps) == (5, STEPS)
    expected = {"train-iters": 8, "lr-decay-iters": 8, "lr-wsd-decay-iters": 3, "lr-warmup-iters": WARMUP}
    assert {key: config.megatron[key] for key in expected} == expected
    assert config.megatron["save"] == config.megatron["load"] == str(tmp_path / "branch")
    path = tmp_path / "branch.toml"
    path.write_text(config.dump())
    assert load(path) == config
    sets = [f"checkpoint.save='{tmp_path / 'branch'}'"]
    assert branch_of(load(trunk.folder / "config.toml"), [], sets, 5, 3) == config


@pytest.mark.parametrize(
    "step, steps, words, told",
    [
        (5, 0, [], "cooldown-steps = 0 must be at least 1"),
        (1, 3, [], "branch-from = 1 lies in the run's warm-up; its learning rate is constant from step 2 to step 8"),
        (9, 3, [], "branch-from = 9 lies in the run's decay"),
        (8, 5, [], "would lead past train-iters = 12, for which the order of the data is made: from step 8 at most 4"),
        (5, 3, ["--lr-decay-style", "cosine"], "needs lr-decay-style = 'WSD'"),
        (5, 3, ["--lr", "0.02"], "was trained with lr = 0.01, but this run has 0.02"),
        (5, 3, ["--load", "nowhere"], "no whole checkpoint of step 5 in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_branched(trunk, step, steps, words, told, tmp_path):
    with pytest.raises(ValueError) as error:
        asked(trunk, step, steps, "--save", str(tmp_path / "branch"), *words)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_whole_checkpoints_are_listed_where_one_is_asked_for_that_is_not_whole(trunk, tmp_path):
    folder = tmp_path / "trunk"
    folder.mkdir()
    for step in (3, 4, 6):
        os.symlink(trunk.folder / f"iter_{step:07d}", folder / f"iter_{step:07d}")
    (folder / "iter_0000005").mkdir()
    with pytest.raises(ValueError, match=r"no whole checkpoint of step 5 in \S+; there are: 3, 4, 6$"):
        asked(trunk, 5, 3, "--load", str(folder))


def test_a_folder_that_belongs_to_something_else_is_refused(trunk, branch, tmp_path):
    theirs = branch(5, 6, "--exit-interval", "6", folder=tmp_path / "theirs")
    for step, steps in ((5, 5), (6, 6)):
        with pytest.raises(ValueError, match=r"belongs to the branch from step 5 of \S+ with 6 cooldown steps"):
            asked(trunk, step, steps, "--save", str(theirs.folder))
    with pytest.raises(ValueError, match="belongs to another run"):
        asked(trunk, 5, 3, "--save", str(trunk.folder))
    with pytest.raises(ValueError, match="is itself a branch of"):
        branch_of(load(theirs.folder / "config.toml"), [], [], 6, 1)


def test_the_two_options_belong_together(trunk, capsys):
    assert cli.main(["pretrain", str(trunk.folder / "config.toml"), "--branch-from", "5"]) == 2
    assert "--branch-from STEP and --cooldown-steps N belong together" in capsys.readouterr().err
