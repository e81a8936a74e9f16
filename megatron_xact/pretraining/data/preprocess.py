"""`prepare`: from a source of text to a folder that Megatron trains on; one that is still right is reused.

Reading is sequential, encoding parallel, writing in the order of the source. Everything grows in a hidden folder
inside its destination (see building) and is renamed at the end, the manifest last: whatever stops a run leaves
nothing under the final names, and the same call goes on from where it was.
"""

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from math import exp
from pathlib import Path

from megatron_xact.pretraining.data import building, corpus, documents, encoding, indexed, manifest
from megatron_xact.pretraining.data import tokenizer as bpe
from megatron_xact.pretraining.data.building import State
from megatron_xact.pretraining.data.documents import Splitter
from megatron_xact.pretraining.data.manifest import DataManifest, SplitInfo
from megatron_xact.pretraining.data.progress import Progress

VOCAB_SIZE = 4096
VALIDATION_FRACTION = 0.05
TOKENIZER_TRAINING_BYTES = 100 << 20  # the part of the train split that a tokenizer is trained on, at most
WORTH_A_WORKER = 4 << 20  # bytes of text: starting a process takes as long as encoding a part of that


def prepare(
    out: str | Path,
    source: str = "stdlib",
    vocab_size: int = VOCAB_SIZE,
    tokenizer: str | Path | None = None,
    validation_fraction: float = VALIDATION_FRACTION,
    text_key: str = "text",
    max_bytes: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    append_eod: bool = True,
    num_workers: int | None = None,
    fresh: bool = False,
) -> DataManifest:
    """Tokenise `source` into `out`, or reuse what is there if it was made with the same settings.

    `source`: see corpus.open_source. A byte-level BPE of `vocab_size` tokens is trained on the train split unless
    `tokenizer` brings one (a folder with tokenizer.json, that file, or a name on the Hugging Face hub). `max_bytes`
    of UTF-8 text and `max_tokens` limit both splits together, to whole documents. `append_eod`: end every document
    with the tokenizer's EOD, if it does not end so already. `num_workers`: processes, default one per core where
    there is enough to do; the result is the same for any number. `fresh` builds even where nothing changed. Raises
    ValueError, in one line, for what the user can put right.
    """
    _check_numbers(validation_fraction, max_bytes, max_tokens, num_workers)
    out = Path(out).expanduser()
    given = None if tokenizer is None else bpe.locate(tokenizer)
    if given is None:
        bpe.check_vocab_size(vocab_size)
    brought = None if given is None else bpe.sha256_of(bpe.json_of(given))
    opened = corpus.open_source(source, text_key=text_key, seed=seed, exclude=out)
    settings: dict[str, object] = {  # all that decides the tokens: equal settings give equal data
        "source": opened.name,
        "source_state": opened.fingerprint,
        "vocab_size": vocab_size if given is None else None,
        "tokenizer": brought,
        "validation_fraction": validation_fraction,
        "text_key": text_key,
        "max_bytes": max_bytes,
        "max_tokens": max_tokens,
        "seed": seed,
        "append_eod": append_eod,
    }
    if not fresh and (ready := _reusable(out, settings)) is not None:
        return ready
    with building.opened(out) as folder:
        state = _resumed(folder, out, settings, fresh) or _begun(folder, opened, given, settings)
        if not building.is_whole(folder):
            _encode(folder, opened, state, num_workers or _default_workers(opened, max_bytes))
        building.move_into_place(folder, out)
    return manifest.load(out)


def _check_numbers(
    validation_fraction: float, max_bytes: int | None, max_tokens: int | None, num_workers: int | None
) -> None:
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"the number of workers, {num_workers}, must be at least 1")
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation fraction {validation_fraction} must lie between 0 and 1, such as 0.05")
    for limit, what in ((max_bytes, "bytes of text"), (max_tokens, "tokens")):
        if limit is not None and limit <= 0:
            raise ValueError(f"the limit of {limit} {what} must be positive")


def _default_workers(source: corpus.Source, max_bytes: int | None) -> int:
    known = [size for size in (source.num_bytes, max_bytes) if size is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *(size // WORTH_A_WORKER for size in known)]))


def _reusable(out: Path, settings: dict[str, object]) -> DataManifest | None:
    """The data in `out` if it fits `settings`; None, having said why, if it must be built."""
    if not (out / manifest.NAME).exists():
        return None
    try:
        ready = manifest.load(out)
    except ValueError as error:
        print(f"data: building again: {error}", flush=True)
        return None
    if changed := _changes(ready.settings, settings):
        print(f"data: building again: {changed}", flush=True)
        return None
    print(f"data: {out} is ready, made with the same settings; reused (--fresh builds it again)", flush=True)
    return replace(ready, reused=True)


def _resumed(folder: Path, out: Path, settings: dict[str, object], fresh: bool) -> State | None:
    """The state of a stopped run to go on from; None if the build must begin."""
    try:
        state = None if fresh else building.load(folder)
    except ValueError as error:
        print(f"data: what a stopped run left is dropped: {error}", flush=True)
        state = None
    if state is not None and (changed := _changes(state.settings, settings)):
        print(f"data: what a stopped run left is dropped: {changed}", flush=True)
        state = None
    if state is not None:
        print(f"data: going on after {state.bytes / 1e6:.1f} MB, {state.tokens:,} tokens", flush=True)
    elif not fresh and not (out / manifest.NAME).exists():
        for prefix in (manifest.TRAIN, manifest.VALIDATION):
            stray = out / f"{prefix}.bin"
            if stray.exists():
                raise ValueError(
                    f"{stray} exists but {out} has no {manifest.NAME}, so it was not finished by us; "
                    "choose another folder, or replace it with --fresh"
                )
    return state


def _begun(folder: Path, source: corpus.Source, given: Path | None, settings: dict[str, object]) -> State:
    """The first state of a build, whose folder holds the tokenizer and a journal."""
    building.clear(folder)
    if source.num_bytes is None and settings["max_bytes"] is None and settings["max_tokens"] is None:
        print(f"data: all of {source.name} is read; --max-tokens and --max-bytes limit it", flush=True)
    _make_tokenizer(folder, source, given, settings)
    state = State(settings)
    building.save(folder, state)
    return state


def _encode(folder: Path, source: corpus.Source, state: State, num_workers: int) -> None:
    """Both splits' files and the manifest in `folder`, from `state` on."""
    try:
        encoding.encode(folder, source, state, num_workers)
    except KeyboardInterrupt:
        print("data: stopped; the same command goes on from where it was", file=sys.stderr, flush=True)
        raise
    _check_split(state, source.name)
    _manifest(folder, source, state, num_workers).write(folder)


def _changes(before: dict[str, object], now: dict[str, object]) -> str:
    return ", ".join(f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value)


def _make_tokenizer(folder: Path, source: corpus.Source, given: Path | None, settings: dict[str, object]) -> None:
    """`folder/tokenizer`, brought or trained on the train split, or its first part where it is long."""
    if given is not None:
        bpe.adopt(given, folder / manifest.TOKENIZER)
        bpe.load(folder / manifest.TOKENIZER)
        return
    limit, read = TOKENIZER_TRAINING_BYTES, 0
    with Progress("read for the tokenizer", limit) as progress:

        def texts() -> Iterator[str]:
            nonlocal read
            for side, (text, size) in _split(source, settings, progress):
                if side == "train":
                    yield text
                    read += size
                    if read >= limit:
                        return

        vocab_size = settings["vocab_size"]
        bpe.train(texts(), vocab_size, folder / manifest.TOKENIZER)
    found = bpe.load(folder / manifest.TOKENIZER).vocab_size
    if read and found < vocab_size:
        print(f"data: the text yields {found} tokens of the {vocab_size} asked for", flush=True)


def _split(
    source: corpus.Source, settings: dict[str, object], progress: Progress
) -> Iterator[tuple[str, tuple[str, int]]]:
    """(side, (text, bytes)) of every document within the limit of bytes, in this process."""
    splitter = Splitter[tuple[str, int]](settings["validation_fraction"])
    total = 0
    for record, position in source.read(None):
        content = documents.usable(documents.text_of(record, settings["text_key"]))
        if isinstance(content, str):
            continue
        text, data = content
        total += len(data)
        if settings["max_bytes"] is not None and total > settings["max_bytes"]:
            break
        expected = encoding.expected_bytes(source, settings, position, total, 0, TOKENIZER_TRAINING_BYTES)
        progress.update(len(data), expected)
        yield from splitter.add(documents.place_of(data, settings["seed"]), (text, len(data)))
    yield from splitter.finish()


def _check_split(state: State, name: str) -> None:
    train, validation = state.train.documents, state.validation.documents
    if train and validation:
        return
    left_out = ", ".join(f"{count} {kind}" for kind, count in sorted(state.skipped.items())) or "nothing"
    if not train and not validation:
        raise ValueError(f"{name} has no text within the limit (left out: {left_out})")
    raise ValueError(
        f"all {train + validation} documents of {name} fell on one side of the split; "
        "two or more are needed: give more documents, or a smaller validation fraction"
    )


def _manifest(folder: Path, source: corpus.Source, state: State, num_workers: int) -> DataManifest:
    """What is in `folder`, whose files are whole."""
    encoder = bpe.load(folder / manifest.TOKENIZER)

    def info(prefix: str, totals: indexed.Totals) -> SplitInfo:
        sizes = (os.path.getsize(folder / f"{prefix}{suffix}") for suffix in (".bin", ".idx"))
        return SplitInfo(totals.documents, totals.bytes, totals.tokens, *sizes)

    train_counts, validation_counts = (
        indexed.token_counts(folder / prefix, encoder.vocab_size) for prefix in (manifest.TRAIN, manifest.VALIDATION)
    )
    nats = indexed.unigram_nats(train_counts, validation_counts)
    return DataManifest(
        folder=folder,
        settings=state.settings,
        source=source.name,
        vocab_size=encoder.vocab_size,
        eod=encoder.eod,
        tokenizer_sha256=encoder.sha256,
        dtype=indexed.dtype_for(encoder.vocab_size).name,
        train=info(manifest.TRAIN, state.train),
        validation=info(manifest.VALIDATION, state.validation),
        skipped=state.skipped,
        replaced=state.replaced,
        unigram_nats=nats,
        unigram_perplexity=exp(nats),
        versions={"python": platform.python_version()} | {"tokenizers": version("tokenizers")},
        made={
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "encoding_seconds": round(state.seconds, 3),
            "tokens_per_second": round(state.tokens / state.seconds),
            "workers": num_workers,
        },
    )
