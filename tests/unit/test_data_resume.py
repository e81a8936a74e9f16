"""`xact data prepare` on many processes, interrupted at any moment: the bytes are those of one undisturbed process."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_xact.pretraining.data import building, encoding, indexed, manifest, progress, workers
from megatron_xact.pretraining.data.corpus import open_source
from megatron_xact.pretraining.data.preprocess import prepare

ROOT = Path(__file__).parents[2]
FILES = tuple(f"{split}_text_document.{kind}" for split in ("train", "validation") for kind in ("bin", "idx"))

# Small chunks and a journal after each of them, so that a small corpus has many moments to be interrupted at.
PROGRAM = """
import signal, sys
from megatron_xact import cli
from megatron_xact.pretraining.data import encoding, workers

workers.CHUNK_BYTES, encoding.JOURNAL_INTERVAL = 20_000, 0.0
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    sys.exit(cli.main(["data", "prepare", *sys.argv[1:]]))
"""


def texts(number: int, seed: int) -> list[str]:
    """Documents of 0 to 4,000 words, each another."""
    rng = random.Random(seed)
    words = [f"w{rng.randrange(10**6)}" for _ in range(5000)]
    return [" ".join(rng.choices(words, k=int(rng.paretovariate(1.0) * 20) % 4000)) for _ in range(number)]


def write_corpus(folder: Path, size: int) -> Path:
    """Every kind of file, with blank lines, nulls, binary and long text files."""
    folder.mkdir()

    def rows(seed: int) -> bytes:
        lines = [json.dumps({"text": text, "id": n}) for n, text in enumerate(texts(size, seed))]
        return "\n".join([*lines[:3], "", '{"text": null}', *lines[3:]]).encode()

    (folder / "plain.jsonl").write_bytes(rows(1))
    (folder / "zipped.jsonl.gz").write_bytes(gzip.compress(rows(2)))
    (folder / "long.txt").write_text("\n".join(texts(4 * size, 3)))
    (folder / "short.txt").write_text("one short text\n")
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return folder
    (folder / "better.jsonl.zst").write_bytes(pyarrow.compress(rows(4), "zstd", asbytes=True))
    table = pyarrow.table({"n": range(size + 1), "text": [None, *texts(size, 5)]})
    parquet.write_table(table, folder / "table.parquet", row_group_size=7)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(texts(200, 0)))
    return prepare(folder / "data", str(folder / "text.txt"), vocab_size=400).tokenizer


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "files", 250)


@pytest.fixture(scope="module")
def undisturbed(corpus_folder: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(out, str(corpus_folder), tokenizer=tokenizer, num_workers=1)
    return out


@pytest.fixture
def program(tmp_path: Path, corpus_folder: Path, tokenizer: Path) -> Callable:
    """Starts PROGRAM on the corpus, in an environment by which all its processes can be found."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)

    def start(out: Path, num_workers: int) -> tuple[subprocess.Popen, str]:
        mark = uuid.uuid4().hex
        command = [sys.executable, str(script), "--source", str(corpus_folder), "--tokenizer", str(tokenizer)]
        command += ["--out", str(out), "--workers", str(num_workers)]
        environment = os.environ | {"XACT_TEST": mark, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes), mark

    return start


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("XACT_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 150) -> bool:
    """Whether the condition came true before the process ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return True


def taken(out: Path) -> int:
    """Bytes of text that the journal of a stopped run counts."""
    state = building.load(out / building.FOLDER) if out.exists() else None
    return state.bytes if state else 0


def splits(made: manifest.DataManifest) -> list[list[list[int]]]:
    """The documents of train and of validation."""
    indexes = [indexed.read_index(prefix) for prefix in (made.train_prefix, made.validation_prefix)]
    return [[index.document(n).tolist() for n in range(index.documents)] for index in indexes]


def assert_equal(out: Path, expected: Path) -> None:
    for name in FILES:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    ours, theirs = (json.loads((folder / manifest.NAME).read_text()) for folder in (out, expected))
    assert ours | {"made": 0} == theirs | {"made": 0}
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in expected.iterdir())


def test_any_number_of_workers_gives_the_same_bytes(
    corpus_folder: Path, tokenizer: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert manifest.load(undisturbed).train.documents > 500
    monkeypatch.setattr(workers, "CHUNK_BYTES", 30_000)
    prepare(tmp_path / "out", str(corpus_folder), tokenizer=tokenizer, num_workers=3)
    assert_equal(tmp_path / "out", undisturbed)


def test_every_source_can_be_read_from_every_position(corpus_folder: Path, tmp_path: Path) -> None:
    small = write_corpus(tmp_path / "small", 12)
    source = open_source(str(small))
    found = list(source.read(None))
    assert len(found) > 12 and {type(record.content) for record, _ in found} == {str, bytes, type(None)}
    places = [source.bytes_before(position) for _, position in found]
    assert places == sorted(places) and places[-1] == source.num_bytes
    for number, (_, position) in enumerate(found):
        assert list(source.read(json.loads(json.dumps(position)))) == found[number + 1 :]
    one = open_source(str(corpus_folder / "long.txt"))  # in pieces
    found = list(one.read(None))
    assert len(found) > 3
    assert [list(one.read(position)) for _, position in found] == [found[n + 1 :] for n in range(len(found))]


JOURNALS = {
    "a key more": {"shards": 3},
    "a key less": {"train": None},
    "a total more": {"validation": {"documents": 1, "lines": 7}},
}


@pytest.mark.parametrize("other", JOURNALS.values(), ids=JOURNALS)
def test_a_journal_of_another_version_is_dropped_in_one_line(
    corpus_folder: Path, tokenizer: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture, other: dict
) -> None:
    folder = tmp_path / "out" / building.FOLDER
    folder.mkdir(parents=True)
    building.save(folder, building.State({}))
    journal = folder / building.JOURNAL
    journal.write_text(json.dumps(json.loads(journal.read_text()) | other))
    (folder / f"{manifest.TRAIN}.bin").write_bytes(b"its own way")
    prepare(tmp_path / "out", str(corpus_folder), tokenizer=tokenizer, num_workers=1)
    assert f"data: what a stopped run left is dropped: {journal} is of another version\n" in capsys.readouterr().out
    assert_equal(tmp_path / "out", undisturbed)


def test_data_of_another_version_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "out")
    whole = json.loads((undisturbed / manifest.NAME).read_text())
    for other in (whole | {"format": 0}, whole | {"shards": 3}, whole | {"train": {"lines": 7}}, []):
        (tmp_path / "out" / manifest.NAME).write_text(json.dumps(other))
        with pytest.raises(ValueError, match="data.json was written by another version; rebuild with --fresh"):
            manifest.load(tmp_path / "out")


def test_kill_9_at_random_moments(program: Callable, undisturbed: Path, tmp_path: Path) -> None:
    rng, out = random.Random(), tmp_path / "out"
    text = sum(split.bytes for split in (manifest.load(undisturbed).train, manifest.load(undisturbed).validation))
    stopped_at = []
    for _ in range(4):
        wanted = taken(out) + rng.uniform(0.05, 0.25) * text
        process, mark = program(out, rng.choice((1, 2, 3)))
        if until(lambda: taken(out) >= wanted, process):  # noqa: B023
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
            stopped_at.append(taken(out))
        process.communicate()
        deadline = time.monotonic() + 20
        while marked(mark):  # the workers end by themselves
            assert time.monotonic() < deadline, marked(mark)
            time.sleep(0.02)
        if (out / manifest.NAME).exists():
            break
        assert not any((out / name).exists() for name in FILES)
    assert len([n for n in stopped_at if n]) >= 2, "it ended too soon to be interrupted"
    process, _ = program(out, 2)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "going on after" in printed or "reused" in printed
    assert_equal(out, undisturbed)


def test_the_journal_speaks_of_what_is_on_the_disk(
    corpus_folder: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses power keeps no more."""
    monkeypatch.setattr(workers, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(encoding, "JOURNAL_INTERVAL", 0.0)
    on_disk, spoken, fsync, save = {}, [], os.fsync, building.save

    def synced(number: int) -> None:
        fsync(number)
        on_disk[os.fstat(number).st_ino] = os.fstat(number).st_size

    def saved(folder: Path, state: building.State) -> None:
        for prefix, totals in ((manifest.TRAIN, state.train), (manifest.VALIDATION, state.validation)):
            for suffix, size in ((".bin", 2 * totals.tokens), (".lengths", 4 * totals.documents)):
                if size:
                    assert on_disk[(folder / f"{prefix}{suffix}").stat().st_ino] >= size
                    spoken.append(size)
        save(folder, state)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(building, "save", saved)
    prepare(tmp_path / "out", str(corpus_folder / "plain.jsonl"), tokenizer=tokenizer, num_workers=1)
    assert len(spoken) > 10


def test_ctrl_c_and_go_on(program: Callable, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process, _ = program(out, 2)
    assert until(lambda: taken(out) > 100_000, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "data: stopped; the same command goes on from where it was" in errors and "Traceback" not in errors
    assert [path.name for path in out.iterdir()] == [building.FOLDER]
    process, _ = program(out, 1)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "data: going on after" in printed
    assert_equal(out, undisturbed)


def test_a_killed_worker_is_told_and_costs_little(program: Callable, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process, mark = program(out, 2)
    assert until(lambda: taken(out) > 50_000, process)
    next(p for p in marked(mark) if "spawn_main" in " ".join(p.cmdline())).kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "a worker process ended with exit code -9" in errors
    process, _ = program(out, 2)
    assert process.wait(timeout=120) == 0
    assert_equal(out, undisturbed)


def test_stopped_while_moving_into_place(
    corpus_folder: Path, tokenizer: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, replace = tmp_path / "out", [], os.replace

    def stopping(source: Path, target: Path) -> None:
        calls.append(target)
        if Path(target).parent == out and len([c for c in calls if Path(c).parent == out]) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    out.mkdir()
    (out / manifest.NAME).write_text("{}")  # of the data that are replaced
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", stopping)
        prepare(out, str(corpus_folder), tokenizer=tokenizer)
    assert not (out / manifest.NAME).exists() and (out / FILES[0]).exists()
    prepare(out, str(corpus_folder), tokenizer=tokenizer)
    assert_equal(out, undisturbed)


def test_one_process_builds_at_a_time(corpus_folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with building.opened(out) as folder:
        with pytest.raises(ValueError, match="another process is building in"):
            prepare(out, str(corpus_folder), tokenizer=tokenizer)
        assert folder.exists()
    assert not out.exists()


def test_other_settings_drop_what_a_stopped_run_left(
    corpus_folder: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with building.opened(out) as folder:
        building.save(folder, building.State({"seed": 1}, bytes=10**6))
    made = prepare(out, str(corpus_folder), tokenizer=tokenizer, max_bytes=200_000)
    printed = capsys.readouterr().out
    assert "what a stopped run left is dropped: " in printed and "seed 1 -> 0" in printed
    assert made.train.bytes + made.validation.bytes <= 200_000


@pytest.mark.parametrize("num_workers", [1, 2])
def test_limits_take_whole_documents_from_the_beginning(
    corpus_folder: Path, tokenizer: Path, tmp_path: Path, num_workers: int
) -> None:
    source = str(corpus_folder / "plain.jsonl")
    train, validation = splits(prepare(tmp_path / "all", source, tokenizer=tokenizer))
    limit = sum(map(len, train + validation)) // 3
    made = prepare(tmp_path / "part", source, tokenizer=tokenizer, max_tokens=limit, num_workers=num_workers)
    assert limit - max(map(len, train + validation)) < made.train.tokens + made.validation.tokens <= limit
    part_of_train, part_of_validation = splits(made)
    assert part_of_validation == validation[: len(part_of_validation)]
    # In the order of the source, but for the one that was kept back for validation and comes last.
    assert part_of_train[:-1] == train[: len(part_of_train) - 1] and 1 < len(part_of_train) < len(train) / 2


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_first_bad_row_is_told_wherever_it_is_met(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr(workers, "CHUNK_BYTES", 2000)
    rows = [json.dumps({"text": text}) for text in texts(300, 7)]
    rows[200] = '{"txet": 1}'
    rows[201] = "{"
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(rows))
    with pytest.raises(ValueError, match="rows.jsonl:201: no key 'text', only") as caught:
        prepare(tmp_path / "out", str(source), tokenizer=tokenizer, num_workers=num_workers)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    made = prepare(tmp_path / "out", str(source), tokenizer=tokenizer, num_workers=num_workers, max_bytes=20_000)
    assert 0 < made.train.bytes <= 20_000


def test_broken_compressed_files_are_named(tokenizer: Path, tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"text": text}) for text in texts(300, 8)).encode()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(rows)[:-2000])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz: broken gzip file after line \d+"):
        prepare(tmp_path / "out", str(tmp_path / "cut.jsonl.gz"), tokenizer=tokenizer)
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra `data`)")
    (tmp_path / "bad.jsonl.zst").write_bytes(b"\0" * 50 + pyarrow.compress(rows, "zstd", asbytes=True))
    with pytest.raises(ValueError, match=r"bad.jsonl.zst: broken zstd file after line 0"):
        prepare(tmp_path / "out", str(tmp_path / "bad.jsonl.zst"), tokenizer=tokenizer)


def test_files_by_a_pattern(corpus_folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    made = prepare(tmp_path / "out", str(corpus_folder / "*.jsonl*"), tokenizer=tokenizer)
    files = [path.name for path in corpus_folder.glob("*.jsonl*")]
    single = [prepare(tmp_path / name, str(corpus_folder / name), tokenizer=tokenizer) for name in files]
    assert len(files) > 1
    assert sum(map(len, splits(made))) == sum(len(split) for one in single for split in splits(one))
    with pytest.raises(ValueError, match="picture.png: unknown kind of file"):
        prepare(tmp_path / "other", str(corpus_folder / "*i*"), tokenizer=tokenizer)


def test_the_index_is_the_one_that_megatron_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "BLOCK", 3)
    rng = np.random.default_rng(0)
    for vocab_size in (65_499, 65_500):
        documents = [rng.integers(0, 65_499, size=n) for n in (5, 1, 0, 700, 3, 2, 2)]
        ours = indexed.SplitWriter(tmp_path, "ours", vocab_size, indexed.Totals())
        theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=indexed.dtype_for(vocab_size).type)
        for ids in documents:
            ours.add(ids, 0)
            theirs.add_document(ids, [len(ids)])
        ours.finish()
        theirs.finalize(str(tmp_path / "theirs.idx"))
        for kind in ("bin", "idx"):
            assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()
        index = indexed.read_index(tmp_path / "theirs")
        assert [index.document(n).tolist() for n in range(7)] == [ids.tolist() for ids in documents]


def test_a_log_gets_lines_with_speed_and_eta(
    corpus_folder: Path,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    monkeypatch.setattr(workers, "CHUNK_BYTES", 100_000)
    monkeypatch.setattr(encoding, "JOURNAL_INTERVAL", 0.0)
    made = prepare(tmp_path / "out", str(corpus_folder), tokenizer=tokenizer, num_workers=1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3 and all("tokens/s with 1 worker, " in line and "ETA" in line for line in lines)
    assert "100% of" in lines[-1]  # sizes on disk, compressed and not, tell how far it is
    assert made.made["tokens_per_second"] > 0 and "tokens/s with 1 worker" in made.summary()
