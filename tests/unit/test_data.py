"""`xact data prepare` against transformers' tokenizer, Megatron's reader and tokenizer, and plain counting."""

import argparse
import email
import gzip
import json
import logging
import math
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_xact.pretraining.data import cli, corpus, documents, hub, manifest
from megatron_xact.pretraining.data import tokenizer as bpe
from megatron_xact.pretraining.data.preprocess import prepare

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 700
FRACTION = 0.2


def read_text(path: Path) -> str:
    return path.read_bytes().decode()


TEXTS = [
    *(
        read_text(path)
        for package in (json, email, logging)
        for path in sorted(Path(package.__file__).parent.glob("*.py"))
        if path.stat().st_size
    ),
    "naïve Καλημέρα 你好 🙂 \u00a0\u2028 zero\u200bwidth",
    "a document that spells <|endoftext|> in its middle, and <|pad|> too",
    "line ends\r\nof two\rkinds\n\n\n   and \t tabs  \n",
    "x",
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same texts as a folder, .jsonl, .jsonl.gz in another order, and under another key."""
    root = tmp_path_factory.mktemp("sources")
    (root / "folder" / "below").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        place = root / "folder" / ("below" if number % 3 else ".") / f"{number}.txt"
        place.write_bytes(text.encode())
    rows = [json.dumps({"id": number, "text": text}) for number, text in enumerate(TEXTS)]
    (root / "rows.jsonl").write_text("\n".join(rows) + "\n\n")
    with gzip.open(root / "rows.jsonl.gz", "wt") as stream:
        stream.write("\n".join(reversed(rows)))
    (root / "content.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS))
    return {name: root / name for name in ("folder", "rows.jsonl", "rows.jsonl.gz", "content.jsonl")}


@pytest.fixture(scope="module")
def prepared(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> manifest.DataManifest:
    out = tmp_path_factory.mktemp("prepared") / "data"
    return prepare(out, str(sources["folder"]), VOCAB_SIZE, validation_fraction=FRACTION)


def texts_of(source: corpus.Source) -> list[str | None]:
    return [documents.text_of(record, "text") for record, _ in source.read(None)]


def documents_of(prefix: Path) -> list[tuple[int, ...]]:
    """Every document as Megatron's reader sees it, through the document index and not the sequences."""
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    return [
        tuple(np.concatenate(dataset[start:end]).tolist()) for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def expected_documents(tokenizer: Path, texts: list[str]) -> Counter[tuple[int, ...]]:
    reference = PreTrainedTokenizerFast.from_pretrained(tokenizer, split_special_tokens=True)
    return Counter((*reference(text).input_ids, reference.eos_token_id) for text in texts)


def contents(out: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in out.rglob("*")}


def test_tokens_are_those_of_transformers_plus_eod(prepared: manifest.DataManifest) -> None:
    train, validation = documents_of(prepared.train_prefix), documents_of(prepared.validation_prefix)
    assert Counter(train + validation) == expected_documents(prepared.tokenizer, TEXTS)
    for found, info in ((train, prepared.train), (validation, prepared.validation)):
        assert (info.documents, info.tokens) == (len(found), sum(map(len, found)))
    assert prepared.train.bytes + prepared.validation.bytes == sum(len(text.encode()) for text in TEXTS)
    assert IndexedDataset(str(prepared.train_prefix)).index.dtype == np.uint16
    # A text that spells special tokens holds neither: the only EOD is the last id, and nothing is padding.
    reference = PreTrainedTokenizerFast.from_pretrained(prepared.tokenizer)
    for document in train + validation:
        assert document.index(reference.eos_token_id) == len(document) - 1
        assert reference.pad_token_id not in document
    decoded = Counter(reference.decode(document[:-1]) for document in train + validation)
    assert decoded == Counter(TEXTS)


def test_the_tokenizer_is_trained_on_the_train_split_alone(prepared: manifest.DataManifest, tmp_path: Path) -> None:
    own = PreTrainedTokenizerFast.from_pretrained(prepared.tokenizer)
    train, validation = (
        [own.decode(document[:-1]) for document in documents_of(prefix)]
        for prefix in (prepared.train_prefix, prepared.validation_prefix)
    )
    for name, texts in (("train", train), ("all", train + validation)):
        bpe.train(texts, VOCAB_SIZE, tmp_path / name)
    ours, alone, leaked = (
        (folder / "tokenizer.json").read_text() for folder in (prepared.tokenizer, tmp_path / "train", tmp_path / "all")
    )
    assert ours == alone != leaked


def test_megatron_loads_the_tokenizer_and_the_data(prepared: manifest.DataManifest) -> None:
    flags = prepared.megatron_arguments()
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    args = SimpleNamespace(
        tokenizer_type=given["--tokenizer-type"],
        tokenizer_model=given["--tokenizer-model"],
        metadata_path=None,
        chat_template=None,
        vocab_file=None,
        merge_file=None,
        special_tokens=None,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=False,
        trust_remote_code=False,
        pad_vocab_size=True,
        make_vocab_size_divisible_by=128,
        tensor_model_parallel_size=2,
        rank=0,
    )
    tokenizer = build_tokenizer(args)
    assert (tokenizer.eod, tokenizer.vocab_size) == (prepared.eod, prepared.vocab_size)
    assert args.padded_vocab_size == 768  # 700 up to a multiple of 2 * 128
    assert tokenizer.pad not in (None, tokenizer.eod)
    for text in TEXTS:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend_per_split=[([given["--train-data-path"]], None), ([given["--valid-data-path"]], None), None],
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, valid, test = BlendedMegatronDatasetBuilder(GPTDataset, [50, 5, 0], lambda: True, config).build()
    assert test is None and len(train) >= 50 and len(valid) >= 5
    assert train[0]["tokens"].shape == (64,) and bool(train[0]["loss_mask"].all())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "content.jsonl"])
def test_records_give_the_same_tokens_and_split(
    name: str, sources: dict[str, Path], prepared: manifest.DataManifest, tmp_path: Path
) -> None:
    key = "content" if name == "content.jsonl" else "text"
    made = prepare(tmp_path / "out", str(sources[name]), VOCAB_SIZE, validation_fraction=FRACTION, text_key=key)
    assert made.tokenizer_sha256 == prepared.tokenizer_sha256
    for ours, theirs in (
        (made.train_prefix, prepared.train_prefix),
        (made.validation_prefix, prepared.validation_prefix),
    ):
        assert Counter(documents_of(ours)) == Counter(documents_of(theirs))
    assert made.unigram_nats == prepared.unigram_nats


def test_parquet_gives_the_same_tokens(prepared: manifest.DataManifest, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra `data`)")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"id": range(len(TEXTS) + 1), "text": [*TEXTS, None]}), file)
    made = prepare(tmp_path / "out", str(file), VOCAB_SIZE, validation_fraction=FRACTION)
    assert Counter(documents_of(made.train_prefix)) == Counter(documents_of(prepared.train_prefix))
    assert Counter(documents_of(made.validation_prefix)) == Counter(documents_of(prepared.validation_prefix))
    assert made.skipped == {"empty": 1}
    with pytest.raises(ValueError, match=r"rows.parquet: no column 'body', only \['id', 'text'\]"):
        prepare(tmp_path / "other", str(file), VOCAB_SIZE, text_key="body")
    with file.open("r+b") as opened:
        opened.seek(parquet.ParquetFile(file).metadata.row_group(0).column(1).data_page_offset)
        opened.write(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"rows.parquet: not a readable parquet file"):
        prepare(tmp_path / "other", str(file), VOCAB_SIZE)
    file.write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"rows.parquet: not a readable parquet file"):
        prepare(tmp_path / "other", str(file), VOCAB_SIZE)


def test_hugging_face_dataset(sources: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed (the extra `data`)")
    shutil.copy(sources["rows.jsonl"], tmp_path / "train.jsonl")
    rows = list(hub.rows(str(tmp_path), None, "train", "text"))
    assert [record.content for record, _ in rows] == TEXTS
    for number in (0, 3, len(TEXTS) - 2, len(TEXTS) - 1):  # from any position on, which is JSON
        position = json.loads(json.dumps(rows[number][1]))
        rest = hub.rows(str(tmp_path), None, "train", "text", position)
        assert list(rest) == rows[number + 1 :]
    with pytest.raises(ValueError, match=r"@train, row 0: no key 'body', only \['id', 'text'\]"):
        next(hub.rows(str(tmp_path), None, "train", "body"))
    # Offline, an unknown name ends in one sentence. In a process of its own: the setting is read on import.
    code = (
        "from megatron_xact.pretraining.data.corpus import open_source\n"
        "try: next(open_source('no-such-org/no-such-set:en@train').read(None))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout.splitlines()
    assert len(said) == 1 and said[0].startswith("no-such-org/no-such-set is no file or folder here"), said


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # how Python itself marks a module that cannot be imported
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    spec = {"datasets": "some-org/some-set", "pyarrow": str(tmp_path / "rows.parquet")}[package]
    with pytest.raises(
        ValueError, match=rf'needs the package `{package}`: pip install -e "\.\[data\]" in the repository'
    ):
        next(corpus.open_source(spec).read(None))


def test_a_file_name_need_not_be_utf8(tmp_path: Path) -> None:
    for name in (b"a.txt", b"\xff.txt"):
        (tmp_path / os.fsdecode(name)).write_text("some text")
    records = [record for record, _ in corpus.open_source(str(tmp_path)).read(None)]
    assert [record.content for record in records] == ["some text"] * 2


def test_split_is_by_content() -> None:
    texts = [f"document {number}" for number in range(2000)]

    def sides(order: list[str], seed: int) -> dict[str, str]:
        found = split_of(order, 0.1, seed)
        assert Counter(text for text, _ in found) == Counter(order)  # none lost or doubled
        assert len(set(found)) == len(set(order))  # equal documents on one side
        return dict(found)

    first = sides(texts, seed=0)
    assert first == sides(texts[::-1], seed=0) == sides(texts + texts[::3], seed=0)
    assert first != sides(texts, seed=1)
    share = Counter(first.values())["validation"] / 2000
    assert abs(share - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 2000)  # five standard deviations of a fair draw
    # However few documents and small the fraction, one of them is for validation; the same one in any order.
    few = {tuple(sorted(split_of(order, 1e-9, 0))) for order in (texts[:3], texts[2::-1])}
    assert len(few) == 1 and Counter(side for _, side in few.pop()) == {"train": 2, "validation": 1}


def split_of(texts: list[str], fraction: float, seed: int) -> list[tuple[str, str]]:
    splitter = documents.Splitter(fraction)
    found = [pair for text in texts for pair in splitter.add(documents.place_of(text.encode(), seed), text)]
    return [(text, side) for side, text in [*found, *splitter.finish()]]


def test_unigram_perplexity(prepared: manifest.DataManifest) -> None:
    train = Counter(token for document in documents_of(prepared.train_prefix) for token in document)
    tokens = [token for document in documents_of(prepared.validation_prefix) for token in document]
    total = sum(train.values()) + prepared.vocab_size
    nats = math.fsum(-math.log((train[token] + 1) / total) for token in tokens) / len(tokens)
    assert prepared.unigram_nats == pytest.approx(nats, rel=1e-12)
    assert prepared.unigram_perplexity == pytest.approx(math.exp(nats), rel=1e-12)
    assert 1.0 < prepared.unigram_perplexity < prepared.vocab_size


def test_reuse_and_rebuild(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sources["folder"], source)

    def again(**changes: object) -> tuple[bool, str]:
        """Whether the call reused the data, and what it said; what it says must be what happened on disk."""
        before = contents(out)
        capsys.readouterr()
        made = prepare(out, str(source), **({"vocab_size": 400} | changes))
        assert made.reused == (contents(out) == before)
        assert manifest.load(out) == made if not made.reused else manifest.load(out).train == made.train
        return made.reused, capsys.readouterr().out

    assert again() == (False, "")
    reused, said = again()
    assert reused and "reused" in said
    cache = out / "train_text_document" / "cache"  # where Megatron keeps sample orders, which go stale
    cache.mkdir(parents=True)
    for changes, reason in (
        ({"vocab_size": 500}, "vocab_size 400 -> 500"),
        ({"vocab_size": 500, "seed": 3}, "seed 0 -> 3"),
        ({"validation_fraction": 0.3}, "validation_fraction 0.05 -> 0.3"),
        ({"max_bytes": 50_000}, "max_bytes None -> 50000"),
    ):
        reused, said = again(**changes)
        assert not reused and reason in said
    assert not cache.exists()
    assert again()[0] is False and again()[0] is True
    assert again(fresh=True)[0] is False
    (source / "one more.txt").write_text("one more document")
    reused, said = again()
    assert not reused and "source_state" in said
    os.truncate(out / "train_text_document.bin", 100)
    reused, said = again()
    assert not reused and "train_text_document.bin is missing or not the" in said
    (out / "data.json").write_text("{")
    reused, said = again()
    assert not reused and "data.json is damaged" in said
    (out / "data.json").unlink()
    with pytest.raises(ValueError, match="has no data.json, so it was not finished by us"):
        again()
    assert again(fresh=True)[0] is False


def test_max_bytes_and_a_tokenizer_that_is_brought(
    sources: dict[str, Path], prepared: manifest.DataManifest, tmp_path: Path
) -> None:
    folder = prepare(
        tmp_path / "a",
        str(sources["folder"]),
        tokenizer=prepared.tokenizer,
        max_bytes=60_000,
        validation_fraction=FRACTION,
    )
    file = prepare(
        tmp_path / "b",
        str(sources["folder"]),
        tokenizer=prepared.tokenizer / "tokenizer.json",
        max_bytes=60_000,
        validation_fraction=FRACTION,
    )
    assert folder.tokenizer_sha256 == file.tokenizer_sha256 == prepared.tokenizer_sha256
    assert documents_of(folder.train_prefix) == documents_of(file.train_prefix)
    assert folder.train.bytes + folder.validation.bytes <= 60_000
    for made in (folder, file):
        loaded = AutoTokenizer.from_pretrained(made.tokenizer)
        assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")
    everything = Counter(documents_of(prepared.train_prefix) + documents_of(prepared.validation_prefix))
    part = Counter(documents_of(folder.train_prefix) + documents_of(folder.validation_prefix))
    assert part < everything


def test_messy_folders_and_single_files(tmp_path: Path) -> None:
    folder = tmp_path / "messy"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "LICENSE").write_text("no suffix")
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfafter a mark")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0\0")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\t")
    (folder / "broken link.txt").symlink_to(folder / "nowhere")
    (folder / "rows.jsonl").write_text(json.dumps({"text": "lone \ud800 surrogate"}) + '\n{"text": null}\n')
    (folder / "out").mkdir()
    (folder / "out" / "tokenizer.json").write_text("our own output")
    found = [documents.usable(text) for text in texts_of(corpus.open_source(str(folder), exclude=folder / "out"))]
    left_out = Counter(reason for reason in found if isinstance(reason, str))
    kept = sorted(content for content in found if not isinstance(content, str))
    assert kept == [(t, t.encode()) for t in ("after a mark", "caf\ufffd", "lone \ufffd surrogate", "no suffix")]
    assert left_out == {"not text": 1, "empty": 3}
    made = prepare(folder / "out", str(folder), VOCAB_SIZE)
    assert made.replaced == 2 and made.skipped == left_out
    assert "1 not text; 2 document(s) hold U+FFFD" in made.summary()

    lines = [f"line {number} of one long file\n" for number in range(20_000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    pieces = texts_of(corpus.open_source(str(tmp_path / "book.txt")))
    assert "".join(pieces) == "".join(lines) and len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces)
    endless = "\u4f60\u597d" * 100_000  # one line: cut between characters, or memory would not be bounded
    (tmp_path / "line.txt").write_text(endless)
    pieces = texts_of(corpus.open_source(str(tmp_path / "line.txt")))
    assert "".join(pieces) == endless and len(pieces) > 4


def test_files_are_read_in_an_order_drawn_by_the_seed(sources: dict[str, Path]) -> None:
    """So that a limit takes a fair sample of a folder, not its first files by name."""
    first, again, other = (texts_of(corpus.open_source(str(sources["folder"]), seed=seed)) for seed in (0, 0, 1))
    assert first == again != other and Counter(first) == Counter(other) == Counter(TEXTS)


def test_stdlib_source() -> None:
    source = corpus.open_source("stdlib")
    names = [Path(record.where.partition("#")[0]) for record, _ in source.read(None)]
    assert 4e6 < source.num_bytes < 20e6
    assert Path(json.__file__).parent / "decoder.py" in names and Path(os.__file__) in names
    assert not any({"site-packages", "test"} & set(name.parts[-4:]) for name in names)
    again = corpus.open_source("stdlib").read(None)
    assert names == [Path(record.where.partition("#")[0]) for record, _ in again]


BAD_LINES = {
    '{"text": "fine"}\n\n{"txet": "typo"}\n': r"rows.jsonl:3: no key 'text', only \['txet'\]",
    '{"text": "fine"}\n{"text": \n': r"rows.jsonl:2: not JSON \(",
    '{"text": 5}\n': r"rows.jsonl:1: 'text' holds int, not text",
    "[" * 100_000 + "\n": "rows.jsonl:1: JSON too deeply nested",
    '["text"]\n': r"rows.jsonl:1: expected an object with the key 'text', found list",
    "\n": "has no text within the limit",
    '{"text": "alone"}\n': "all 1 documents of .*rows.jsonl fell on one side",
}


@pytest.mark.parametrize("lines", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines(lines: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=BAD_LINES[lines]) as caught:
        prepare(tmp_path / "out", str(tmp_path / "rows.jsonl"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


BAD_CALLS = {
    "no such source: /nowhere/at all": {"source": "/nowhere/at all"},
    "no such source: some/rows.jsonl": {"source": "some/rows.jsonl"},
    "no files to read in the folder": {"source": "{tmp}/empty"},
    "table.csv: unknown kind of file; known are .jsonl": {"source": "{tmp}/table.csv"},
    "broken.jsonl.gz: broken gzip file after line 0": {"source": "{tmp}/broken.jsonl.gz"},
    "vocabulary size 257 is too small: .* at least 258": {"vocab_size": 257},
    "validation fraction 1.0 must lie between": {"validation_fraction": 1.0},
    "the limit of 0 bytes of text must be positive": {"max_bytes": 0},
    "the limit of -1 tokens must be positive": {"max_tokens": -1},
    "the number of workers, 0, must be at least 1": {"num_workers": 0},
    r"no file matches .*/empty/\*.jsonl": {"source": "{tmp}/empty/*.jsonl"},
    "no tokenizer at .*empty: expected a folder with": {"tokenizer": "{tmp}/empty"},
    "tokenizer.json is not a tokenizer": {"tokenizer": "{tmp}/tokenizer.json"},
    "cannot write below .*: Not a directory": {"out": "{tmp}/table.csv/out"},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls(message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "text.txt").write_text("some text\n" * 10)
    call = {"out": "{tmp}/out", "source": "{tmp}/text.txt"} | BAD_CALLS[message]
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(**{key: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for key, v in call.items()})
    assert "\n" not in str(caught.value)
    assert contents(tmp_path).keys() == before.keys()


def test_a_tokenizer_with_a_template_and_a_length_limit(
    sources: dict[str, Path], prepared: manifest.DataManifest, tmp_path: Path
) -> None:
    """Its beginning-of-text token is kept as Megatron's own preprocessing does, its EOD is not doubled."""
    record = json.loads((prepared.tokenizer / "tokenizer.json").read_text())
    begin, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("<|pad|>", "<|endoftext|>"))
    record["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for number, token in enumerate(("<|endoftext|>", "<|pad|>"))
        },
    }
    record["truncation"] = {
        "direction": "Right",
        "max_length": 16,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    given = tmp_path / "given"
    shutil.copytree(prepared.tokenizer, given)
    (given / "tokenizer.json").write_text(json.dumps(record))
    made = prepare(tmp_path / "out", str(sources["rows.jsonl"]), tokenizer=given)
    found = Counter(documents_of(made.train_prefix) + documents_of(made.validation_prefix))
    bare = expected_documents(prepared.tokenizer, TEXTS)
    assert found == Counter({(1, *ids): number for ids, number in bare.items()})


def test_tokenizers_megatron_could_not_use(prepared: manifest.DataManifest, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text\n" * 10)
    record = json.loads((prepared.tokenizer / "tokenizer.json").read_text())
    record["added_tokens"][0]["content"] = record["added_tokens"][0]["content"].upper()
    record["model"]["vocab"]["<|ENDOFTEXT|>"] = record["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="has no end-of-document token"):
        prepare(tmp_path / "out", str(tmp_path / "text.txt"), tokenizer=tmp_path / "tokenizer.json")
    shutil.copy(prepared.tokenizer / "tokenizer_config.json", tmp_path)
    with pytest.raises(ValueError, match="eos_token must name a token of the vocabulary"):
        prepare(tmp_path / "out", str(tmp_path / "text.txt"), tokenizer=tmp_path)
    record = json.loads((prepared.tokenizer / "tokenizer.json").read_text())
    record["model"]["vocab"]["x"] = VOCAB_SIZE + 10
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="ids go up to 710 but there are 700 tokens"):
        prepare(tmp_path / "out", str(tmp_path / "text.txt"), tokenizer=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_bad_line_late_in_the_file_leaves_the_old_data(prepared: manifest.DataManifest, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    good = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    rows.write_text(good)
    prepare(out, str(rows), tokenizer=prepared.tokenizer)
    before = contents(out)
    rows.write_text(good * 10 + "{}\n")  # the tokenizer is given, so the documents before it have been encoded
    with pytest.raises(ValueError, match=rf"rows.jsonl:{10 * len(TEXTS) + 1}: no key 'text'"):
        prepare(out, str(rows), tokenizer=prepared.tokenizer)
    assert contents(out) == before


def test_a_full_disk_costs_only_time(sources: dict[str, Path], prepared: manifest.DataManifest, tmp_path: Path) -> None:
    """The kernel's limit on file size stands in for the disk: the write fails in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        with pytest.raises(
            ValueError, match=r"cannot write below .*: File too large; make room; the same command goes on"
        ):
            prepare(tmp_path / "out", str(sources["rows.jsonl"]), tokenizer=prepared.tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".building"]
    made = prepare(tmp_path / "out", str(sources["rows.jsonl"]), tokenizer=prepared.tokenizer)
    found = documents_of(made.train_prefix) + documents_of(made.validation_prefix)
    assert Counter(found) == expected_documents(prepared.tokenizer, TEXTS)
    assert not (tmp_path / "out" / ".building").exists()


def test_documents_without_eod(sources: dict[str, Path], prepared: manifest.DataManifest, tmp_path: Path) -> None:
    made = prepare(tmp_path / "out", str(sources["rows.jsonl"]), tokenizer=prepared.tokenizer, append_eod=False)
    found = Counter(documents_of(made.train_prefix) + documents_of(made.validation_prefix))
    assert found == Counter(ids[:-1] for ids in expected_documents(prepared.tokenizer, TEXTS))


def test_a_tokenizer_by_its_hub_name(sources: dict[str, Path], prepared: manifest.DataManifest, tmp_path: Path) -> None:
    """From the cache that downloads leave, without a network, in a process that reads these settings on import."""
    snapshot = tmp_path / "hub" / "models--some-org--some-tokenizer" / "snapshots" / "0123"
    shutil.copytree(prepared.tokenizer, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")

    def run(tokenizer: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megatron_xact", "data", "prepare", "--source", str(sources["rows.jsonl"])]
        command += ["--out", str(tmp_path / "out"), "--tokenizer", tokenizer]
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)

    done = run("some-org/some-tokenizer")
    assert done.returncode == 0, done.stderr
    assert manifest.load(tmp_path / "out").tokenizer_sha256 == prepared.tokenizer_sha256
    done = run("some-org/another")
    assert done.returncode == 2 and "no tokenizer at some-org/another: no such folder here" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_command_line(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="xact data")
    cli.add_arguments(parser)
    command = ["prepare", "--source", str(sources["rows.jsonl"]), "--out", str(tmp_path / "out"), "--max-bytes", "100K"]
    assert cli.main(parser.parse_args([*command, "--vocab-size", "300"])) == 0
    printed = capsys.readouterr().out
    made = manifest.load(tmp_path / "out")
    assert made.settings["max_bytes"] == 100_000 and made.vocab_size == 300
    assert " ".join(made.megatron_arguments()) in printed
    assert f"perplexity {made.unigram_perplexity:.1f}" in printed
    with pytest.raises(ValueError, match="with --tokenizer it has no meaning"):
        cli.main(parser.parse_args([*command, "--vocab-size", "300", "--tokenizer", "x"]))
    with pytest.raises(ValueError, match="no prepared data in .*; make it: xact data prepare --out"):
        manifest.load(tmp_path / "elsewhere")


def test_help_is_light() -> None:
    code = (
        "import sys, argparse\n"
        "from megatron_xact.pretraining.data import cli\n"
        "parser = argparse.ArgumentParser(); cli.add_arguments(parser); text = parser.format_help()\n"
        "assert 'prepare' in text and 'inspect' in text\n"
        "print(sorted({'torch', 'numpy', 'tokenizers', 'megatron', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
