"""`xact data inspect` against plain counting, Megatron's own writer, and the blend that Megatron builds."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import AutoTokenizer

from megatron_xact.pretraining.data import blend, indexed, inspection, manifest
from megatron_xact.pretraining.data.inspection import inspect
from megatron_xact.pretraining.data.preprocess import prepare

ROOT = Path(__file__).parents[2]
STEPS, BATCH, LENGTH = 30, 4, 16
CONFIG = f"""
base = "{ROOT}/configs/llama.toml"
[model]
num-layers = 1
hidden-size = 32
num-attention-heads = 2
seq-length = {LENGTH}
max-position-embeddings = {LENGTH}
[data]
{{data}}
tokenizer-type = "HuggingFaceTokenizer"
tokenizer-model = "{{tokenizer}}"
[optimizer]
lr = 1e-3
[schedule]
train-iters = {STEPS}
global-batch-size = {BATCH}
micro-batch-size = 2
eval-interval = 10
eval-iters = 2
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> manifest.DataManifest:
    # Documents enough for several in either split, whichever Python's library it is.
    folder = tmp_path_factory.mktemp("data") / "data"
    return prepare(folder, vocab_size=500, max_bytes=1_000_000, validation_fraction=0.2)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A dataset that Megatron's own builder wrote: documents of several sequences, some empty, without EOD."""
    prefix = tmp_path_factory.mktemp("foreign") / "corpus.v2_text"
    rng = np.random.default_rng(0)
    builder, documents = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32), []
    for lengths in ([3, 4], [5], [0], [7, 1, 2], [300], [2]):
        documents.append(rng.integers(1, 400, size=sum(lengths)).tolist())
        builder.add_document(np.array(documents[-1]), lengths)
    builder.finalize(f"{prefix}.idx")
    return prefix, documents


def test_prepared_data(prepared: manifest.DataManifest) -> None:
    index = indexed.read_index(prepared.train_prefix)
    told = inspect(str(prepared.folder), document=1, num_tokens=40)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
    for info, prefix in ((prepared.train, prepared.train_prefix), (prepared.validation, prepared.validation_prefix)):
        assert f"{prefix}\n  documents  {info.documents:,}, {info.tokens:,} tokens" in told
    assert "EOD ends all" in told and f"tokenizer  {prepared.vocab_size:,} tokens, EOD {prepared.eod}" in told
    text = tokenizer.decode(index.document(1)[:40])
    assert "".join(f"    {line}\n" for line in text.splitlines()).rstrip("\n") in told
    lengths = sorted(index.document_lengths().tolist())
    assert f"shortest {lengths[0]:,}  " in told and f"longest {lengths[-1]:,}\n" in told
    assert f"50 % {int(np.median(lengths)):,}" in told
    with pytest.raises(ValueError, match=r"--document 10000: .* has the documents 0 to \d+"):
        inspect(str(prepared.folder), document=10_000)


def test_data_of_others(foreign: tuple[Path, list[list[int]]], prepared: manifest.DataManifest) -> None:
    prefix, documents = foreign
    for target in (str(prefix), f"{prefix}.idx", f"{prefix}.bin", str(prefix.parent)):
        told = inspect(target, document=3)
        assert f"documents  6, {sum(map(len, documents))} tokens, 0.00 MB (int32)" in told
        assert "    " + " ".join(map(str, documents[3])) in told and "--tokenizer decodes" in told
        assert f"highest id {max(map(max, filter(None, documents)))}" in told
    told = inspect(str(prefix), tokenizer=str(prepared.tokenizer))
    assert "EOD ends 0" in told and "NOT made with" not in told
    index = indexed.read_index(prefix)
    assert index.document_lengths().tolist() == [len(ids) for ids in documents]
    assert inspection.describe(index, None).quantiles[-1] == 300


def test_data_of_another_tokenizer(prepared: manifest.DataManifest, tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "other.bin"), dtype=np.int32)
    builder.add_document(np.array([1, 500, 0]), [3])
    builder.finalize(str(tmp_path / "other.idx"))
    told = inspect(str(tmp_path / "other"), tokenizer=str(prepared.tokenizer))
    assert "highest id 500, EOD ends all: NOT made with this tokenizer" in told and "    1 500 0" in told


DAMAGES = {
    r"no such file .*/nothing.idx": ("nothing", None),
    r"no .idx files in ": (".", None),
    r"data.idx is no index in Megatron's format": ("data", ("data.idx", b"something else, long enough to hold a head")),
    r"data.idx is damaged: \d+ bytes, where its head promises \d+": ("data", ("data.idx", -8)),
    r"data.bin has \d+ bytes, where its index promises \d+": ("data", ("data.bin", -4)),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_and_missing_files(foreign: tuple[Path, list], tmp_path: Path, message: str) -> None:
    target, damage = DAMAGES[message]
    if damage is not None:
        for kind in (".bin", ".idx"):
            (tmp_path / f"data{kind}").write_bytes(Path(f"{foreign[0]}{kind}").read_bytes())
        file = tmp_path / damage[0]
        file.write_bytes(damage[1] if isinstance(damage[1], bytes) else file.read_bytes()[: damage[1]])
    with pytest.raises((ValueError, OSError), match=message):
        inspect(str(tmp_path / target))


BLENDS = {
    "weights": 'train-data-path = ["3", "{a}", "1", "{b}"]\nvalid-data-path = ["{b}"]',
    "no weights": 'train-data-path = ["{b}", "{b}", "{b}"]\nvalid-data-path = ["{a}"]',
    "one": 'train-data-path = ["{b}"]\nvalid-data-path = ["0.5", "{a}", "0.5", "{b}"]',
    "a split": 'data-path = ["0.9", "{a}", "0.1", "{b}"]\nsplit = "80,20,0"\n',
}


@pytest.mark.parametrize("name", BLENDS)
def test_blends_are_read_as_megatron_reads_them(
    name: str, prepared: manifest.DataManifest, foreign: tuple[Path, list], tmp_path: Path
) -> None:
    """Shares and sequences against the datasets that Megatron builds for the same number of samples."""
    names = {"a": str(prepared.train_prefix), "b": str(foreign[0])}
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(data=BLENDS[name].format(**names), tokenizer=prepared.tokenizer))
    plan = blend.plan(str(config))
    samples = (STEPS * BATCH, (STEPS // 10 + 1) * 2 * BATCH, 2 * BATCH)
    built = megatron_datasets(plan, names, name, samples)
    for split, dataset in zip(plan.splits, [d for d in built if d], strict=True):
        if hasattr(dataset, "dataset_index"):
            read = np.bincount(dataset.dataset_index, minlength=len(split.parts))
        else:
            read = np.array([split.samples])
        assert [part.read / LENGTH for part in split.parts] == pytest.approx(read.tolist(), abs=1.5), split.name
    told = blend.table(plan)
    if name == "no weights":  # each part has 324 tokens, 20 sequences
        assert plan.splits[0].samples == 60 == len(built[0]) and "60 sequences are missing: without weights" in told
    if name == "one":
        part = plan.splits[0].parts[0]
        assert part.epochs == pytest.approx(STEPS * BATCH * LENGTH / sum(map(len, foreign[1])))
        assert re.search(rf"100\.0% +1,920 of +324 tokens +{part.epochs:.2f} epochs", told)
    report = inspect(str(config), num_tokens=5)
    assert report.startswith(told) and f"tokenizer  {prepared.vocab_size:,} tokens" in report


def megatron_datasets(plan: blend.Plan, names: dict, name: str, samples: tuple[int, int, int]) -> list:
    class Tokenizer:
        eod, pad, vocab_size = 0, 1, 500
        unique_identifiers = {"class": "test"}

    a, b = names["a"], names["b"]
    per_split = {
        "weights": [([a, b], [3.0, 1.0]), ([b], None), None],
        "no weights": [([b, b, b], None), ([a], None), None],
        "one": [([b], None), ([a, b], [0.5, 0.5]), None],
    }.get(name)
    both = {"blend_per_split": per_split} if per_split else {"blend": ([a, b], [0.9, 0.1]), "split": "80,20,0"}
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=plan.seq_length,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **both,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, list(samples), lambda: True, config).build()


def test_the_command(prepared: manifest.DataManifest) -> None:
    """Without torch, whose import takes longer than all the rest."""
    code = (
        "import sys; from megatron_xact import cli\n"
        "code = cli.main(['data', 'inspect', *sys.argv[1:]])\n"
        "print(sorted({'torch', 'megatron'} & set(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run([*command, str(prepared.folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr
    done = subprocess.run([*command, "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("xact: error: no such file nowhere.idx")
