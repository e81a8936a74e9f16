"""The DALI loader against torch's DataLoader with Megatron's sampler, which is what Megatron's own loader is."""

from __future__ import annotations

import pickle
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_xact.pretraining import config
from megatron_xact.pretraining.checks import validate
from megatron_xact.pretraining.data import dali
from megatron_xact.pretraining.data.preprocess import prepare

ROOT = Path(__file__).parents[2]
SAMPLES, BATCH = 100, 3


class Tokenizer:
    eod, pad, vocab_size = 0, 1, 500
    unique_identifiers = {"class": "test"}  # noqa: RUF012


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> BlendedDataset:
    """A blend of two parts, with an attention mask and masked losses, its orders in memory-mapped files."""
    folder = tmp_path_factory.mktemp("data")
    made = prepare(folder / "data", vocab_size=500, max_bytes=200_000)
    blend = ([str(made.train_prefix), str(made.validation_prefix)], [0.7, 0.3])
    settings = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend_per_split=[blend, None, None],
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=True,
        path_to_cache=str(folder / "cache"),
    )
    for _ in range(2):  # the second finds the orders that the first has saved, and maps them
        built = BlendedMegatronDatasetBuilder(GPTDataset, [SAMPLES, 0, 0], lambda: True, settings).build()[0]
    assert isinstance(built, BlendedDataset) and isinstance(built.dataset_index, np.memmap)
    return built


def expected(dataset: BlendedDataset, consumed: int, rank: int, size: int) -> list[dict]:
    sampler = MegatronPretrainingSampler(len(dataset), consumed, BATCH, rank, size)
    return list(torch.utils.data.DataLoader(dataset, batch_sampler=sampler))


def assert_equal(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() >= {"tokens", "labels", "loss_mask", "position_ids", "attention_mask"}
        for name in one:
            assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


@pytest.fixture
def installed() -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra `dali`)")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("consumed", [0, 36, 99])
def test_batches_of_two_ranks_from_any_sample_on(installed, dataset: BlendedDataset, rank: int, consumed: int) -> None:
    ours = list(dali.DaliLoader(dataset, consumed, BATCH, rank, 2))
    if consumed == 99:  # what is left is no whole batch
        assert ours == [] == expected(dataset, consumed, rank, 2)
    else:
        assert_equal(ours, expected(dataset, consumed, rank, 2))


def test_batches_from_processes_of_its_own(installed, dataset: BlendedDataset) -> None:
    assert_equal(list(dali.DaliLoader(dataset, 12, BATCH, 1, 2, num_workers=2)), expected(dataset, 12, 1, 2))


def test_a_process_gets_the_names_of_mapped_files_not_their_contents(dataset: BlendedDataset) -> None:
    batches = dali._Batches(dataset, 0, BATCH, 0, 1)
    sent = pickle.loads(pickle.dumps(batches)).dataset
    for ours, theirs in (
        (sent.dataset_index, dataset.dataset_index),
        (sent.datasets[0].sample_index, dataset.datasets[0].sample_index),
    ):
        assert isinstance(ours, np.memmap) and ours.filename == theirs.filename and np.array_equal(ours, theirs)
    part = dataset.dataset_sample_index[5:9]
    again = pickle.loads(pickle.dumps(dali._Batches([part], 0, 1, 0, 1))).dataset[0]
    assert np.array_equal(again, part)


def test_ranks_without_data_get_none(installed, dataset: BlendedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali.mpu, "get_data_parallel_rank", lambda: 1)
    monkeypatch.setattr(dali.mpu, "get_data_parallel_world_size", lambda: 2)
    args = Namespace(
        micro_batch_size=BATCH, eval_micro_batch_size=BATCH, num_workers=0, consumed_train_samples=24,
        consumed_valid_samples=6, skip_train=False,
    )  # fmt: skip
    train, validation, test = dali.loaders([dataset, dataset, None], args)
    assert test is None
    assert_equal(list(train), expected(dataset, 24, 1, 2))
    assert_equal(list(validation), expected(dataset, 6, 1, 2))


def test_without_the_package_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # how Python marks a module that cannot be imported
    with pytest.raises(ImportError, match=r"needs NVIDIA DALI: pip install -e \"\.\[dali\]\"") as caught:
        dali.loaders([None, None, None], Namespace())
    assert "\n" not in str(caught.value)


def test_the_config_key() -> None:
    plain = config.load(ROOT / "configs" / "quickstart.toml")
    assert "--dataloader-type" not in plain.arguments()
    chosen = plain.with_overrides(sets=["xact.loader=dali"])
    words = chosen.arguments()
    assert words[words.index("--dataloader-type") + 1] == "external"
    with pytest.raises(ValueError, match="loader = 'tensorflow' .*: expected 'megatron' or 'dali'"):
        plain.with_overrides(sets=["xact.loader=tensorflow"])
    with pytest.raises(ValueError, match=r'loader = "dali" in \[xact\] does not go with full-validation = True'):
        validate(chosen.with_overrides(["--full-validation", "--mock-data"]), 2)
