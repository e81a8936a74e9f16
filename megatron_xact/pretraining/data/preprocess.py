"""`prepare`: from a source of text to a folder that Megatron trains on; one that is still right is reused.

Everything is built in a hidden folder inside its destination and renamed at the end, the manifest last:
whatever stops a run (a bad document, Ctrl-C, a full disk) leaves nothing under the final names.
"""

import errno
import os
import platform
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from math import exp
from pathlib import Path

from megatron_xact.pretraining.data import corpus, manifest
from megatron_xact.pretraining.data import tokenizer as bpe
from megatron_xact.pretraining.data.manifest import DataManifest, SplitInfo
from megatron_xact.pretraining.data.progress import Progress

VOCAB_SIZE = 4096
VALIDATION_FRACTION = 0.05
TOKENIZER_TRAINING_BYTES = 100 << 20  # the part of the train split that a tokenizer is trained on, at most
BATCH_BYTES = 4 << 20  # of text encoded at once: enough for all threads, little memory
BUILDING = ".building-"
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def prepare(
    out: str | Path,
    source: str = "stdlib",
    vocab_size: int = VOCAB_SIZE,
    tokenizer: str | Path | None = None,
    validation_fraction: float = VALIDATION_FRACTION,
    text_key: str = "text",
    max_bytes: int | None = None,
    seed: int = 0,
    fresh: bool = False,
) -> DataManifest:
    """Tokenise `source` into `out`, or reuse what is there if it was made with the same settings.

    `source`: "stdlib", a folder, a file (.txt, .jsonl, .jsonl.gz, .parquet), or a Hugging Face dataset
    `org/name[:config][@split]`. A byte-level BPE of `vocab_size` tokens is trained on the train split unless
    `tokenizer` brings one (a folder with tokenizer.json, or that file). `max_bytes` limits the UTF-8 text
    that is read. `fresh` builds even where nothing changed. Raises ValueError, in one line, for what the user
    can put right.
    """
    out = Path(out).expanduser()
    opened, settings = _settings(
        out, source, vocab_size, tokenizer, validation_fraction, text_key, max_bytes, seed
    )
    if not fresh:
        ready = _reusable(out, settings)
        if ready is not None:
            return ready
    with _building(out) as building:
        if tokenizer is not None:
            bpe.adopt(Path(tokenizer).expanduser(), building / manifest.TOKENIZER)
        built = _build(building, opened, settings)
        _move_into_place(building, out)
    return replace(built, folder=out.resolve())


def _settings(
    out: Path,
    source: str,
    vocab_size: int,
    tokenizer: str | Path | None,
    validation_fraction: float,
    text_key: str,
    max_bytes: int | None,
    seed: int,
) -> tuple[corpus.Source, dict[str, object]]:
    """The opened source, and all that decides the tokens: two runs with equal settings give equal data."""
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation fraction {validation_fraction} must lie between 0 and 1, such as 0.05")
    if max_bytes is not None and max_bytes <= 0:
        raise ValueError(f"the limit of {max_bytes} bytes of text must be positive")
    brought = None
    if tokenizer is None:
        bpe.check_vocab_size(vocab_size)
    else:
        brought = bpe.sha256_of(bpe.json_of(Path(tokenizer).expanduser()))
    opened = corpus.open_source(source, text_key=text_key, seed=seed, exclude=out)
    settings: dict[str, object] = {
        "source": opened.name,
        "source_state": opened.fingerprint,
        "vocab_size": vocab_size if brought is None else None,
        "tokenizer": brought,
        "validation_fraction": validation_fraction,
        "text_key": text_key,
        "max_bytes": max_bytes,
        "seed": seed,
    }
    return opened, settings


def _reusable(out: Path, settings: dict[str, object]) -> DataManifest | None:
    """The data in `out` if it fits `settings`; None, having said why, if it must be built."""
    if not (out / manifest.NAME).exists():
        for prefix in (manifest.TRAIN, manifest.VALIDATION):
            stray = out / f"{prefix}.bin"
            if stray.exists():
                raise ValueError(
                    f"{stray} exists but {out} has no {manifest.NAME}, so it was not finished by us; "
                    "choose another folder, or replace it with --fresh"
                )
        return None
    try:
        ready = manifest.load(out)
    except ValueError as error:
        print(f"data: building again: {error}", flush=True)
        return None
    changed = [
        f"{key} {ready.settings.get(key)} -> {value}"
        for key, value in settings.items()
        if ready.settings.get(key) != value
    ]
    if changed:
        print(f"data: building again: {', '.join(changed)}", flush=True)
        return None
    print(f"data: {out} is ready, made with the same settings; reused (--fresh builds it again)", flush=True)
    return replace(ready, reused=True)


def _build(building: Path, source: corpus.Source, settings: dict[str, object]) -> DataManifest:
    """Make all files in `building`, which holds a tokenizer if the user brought one."""
    max_bytes = settings["max_bytes"]
    known = [size for size in (source.num_bytes, max_bytes) if size is not None]
    total = min(known) if known else None
    if total is None:
        print(
            f"data: the size of {source.name} is unknown, all of it is read; --max-mb limits it", flush=True
        )
    skipped: Counter[str] = Counter()

    def documents() -> Iterator[tuple[str, str, bytes]]:
        skipped.clear()
        readable = corpus.usable(source.documents(), max_bytes, skipped)
        return corpus.split_documents(readable, settings["validation_fraction"], settings["seed"])

    folder = building / manifest.TOKENIZER
    if not folder.exists():
        _train_tokenizer(documents(), settings["vocab_size"], folder, total)
    encoder = bpe.load(folder)

    from megatron_xact.pretraining.data import indexed  # imports Megatron, hence torch: seconds

    if settings["vocab_size"] is not None and encoder.vocab_size < settings["vocab_size"]:
        print(f"data: the text yields {encoder.vocab_size} tokens of the {settings['vocab_size']} asked for")
    writers = {}
    try:
        for split, prefix in (("train", manifest.TRAIN), ("validation", manifest.VALIDATION)):
            writers[split] = indexed.SplitWriter(building, prefix, encoder.vocab_size)
        with Progress("encode", total) as progress:
            for batch in _batches(documents()):
                ids_of = encoder.encode([text for _, text, _ in batch])
                for (split, _, data), ids in zip(batch, ids_of, strict=True):
                    writers[split].add(ids, len(data))
                progress.update(sum(len(data) for _, _, data in batch))
        totals = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    _check_split(totals["train"].documents, totals["validation"].documents, source.name, skipped)

    def info(split: str) -> SplitInfo:
        path, counted = str(writers[split].path), totals[split]
        sizes = (os.path.getsize(path + ".bin"), os.path.getsize(path + ".idx"))
        return SplitInfo(counted.documents, counted.bytes, counted.tokens, *sizes)

    nats = indexed.unigram_nats(totals["train"].counts, totals["validation"].counts)
    built = DataManifest(
        folder=building,
        settings=settings,
        source=source.name,
        vocab_size=encoder.vocab_size,
        eod=encoder.eod,
        tokenizer_sha256=encoder.sha256,
        dtype=writers["train"].dtype.__name__,
        train=info("train"),
        validation=info("validation"),
        skipped=dict(skipped),
        unigram_nats=nats,
        unigram_perplexity=exp(nats),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("tokenizers", "megatron-core")},
    )
    built.write(building)
    return built


def _batches(documents: Iterator[tuple[str, str, bytes]]) -> Iterator[list[tuple[str, str, bytes]]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[2])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _train_tokenizer(
    documents: Iterator[tuple[str, str, bytes]], vocab_size: int, folder: Path, total: int | None
) -> None:
    """Train on the train split only, or its first part where it is long."""
    limit = TOKENIZER_TRAINING_BYTES
    with Progress("read for the tokenizer", limit if total is None else min(total, limit)) as progress:

        def texts() -> Iterator[str]:
            read = 0
            for split, text, data in documents:
                progress.update(len(data))
                if split == "train":
                    yield text
                    read += len(data)
                    if read >= limit:
                        return

        bpe.train(texts(), vocab_size, folder)


def _check_split(train: int, validation: int, name: str, skipped: Counter[str]) -> None:
    if train and validation:
        return
    left_out = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items())) or "nothing"
    if not train and not validation:
        raise ValueError(f"{name} has no text within the limit (left out: {left_out})")
    raise ValueError(
        f"all {train + validation} documents of {name} fell on one side of the split; "
        "two or more are needed: give more documents, or a smaller validation fraction"
    )


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """A hidden folder in `out`, gone afterwards; removes those of killed runs on this machine too."""
    here = f"{BUILDING}{socket.gethostname()}-"
    for left in out.glob(f"{here}*"):
        if not _is_another_process(int(left.name.removeprefix(here))):
            shutil.rmtree(left, ignore_errors=True)
    building = out / f"{here}{os.getpid()}"
    existed = out.exists()
    try:
        building.mkdir(parents=True)
        yield building
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise ValueError(f"cannot write below {out}: {error.strerror}; nothing was left there") from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _is_another_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _move_into_place(building: Path, out: Path) -> None:
    """Replace what is in `out`. The old manifest goes first and the new one comes last."""
    (out / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(out / manifest.TOKENIZER, ignore_errors=True)
    for prefix in (manifest.TRAIN, manifest.VALIDATION):
        # Megatron keeps sample orders in a folder named as the prefix, known by their path, not by content.
        shutil.rmtree(out / prefix / "cache", ignore_errors=True)
        for suffix in (".bin", ".idx"):
            os.replace(building / (prefix + suffix), out / (prefix + suffix))
    os.replace(building / manifest.TOKENIZER, out / manifest.TOKENIZER)
    os.replace(building / manifest.NAME, out / manifest.NAME)
