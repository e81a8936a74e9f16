"""The long part of `prepare`: records become token ids in both splits' files, with a journal to go on from."""

import time
from pathlib import Path

import numpy as np

from megatron_xact.pretraining.data import building, indexed, manifest, workers
from megatron_xact.pretraining.data import tokenizer as bpe
from megatron_xact.pretraining.data.building import State
from megatron_xact.pretraining.data.corpus import Position, Source
from megatron_xact.pretraining.data.documents import Splitter
from megatron_xact.pretraining.data.progress import Progress
from megatron_xact.pretraining.data.workers import Document

JOURNAL_INTERVAL = 5.0  # seconds of work that a killed run loses, at most


def encode(folder: Path, source: Source, state: State, num_workers: int) -> None:
    """Write both splits' files from `state` on, and keep it up to date."""
    settings = state.settings
    encoding = workers.Encoding(
        folder / manifest.TOKENIZER, settings["append_eod"], settings["text_key"], settings["seed"]
    )
    vocab_size = bpe.load(encoding.tokenizer).vocab_size
    held = state.held
    if held is not None:
        place, num_bytes, ids, *_ = held[1]
        held = (held[0], Document(place, num_bytes, np.array(ids)))
    splitter = Splitter[Document](settings["validation_fraction"], held, state.validated)
    writers = {}
    encoded = workers.encode(source, state.position, encoding, num_workers)
    try:
        for split, prefix in (("train", manifest.TRAIN), ("validation", manifest.VALIDATION)):
            writers[split] = indexed.SplitWriter(folder, prefix, vocab_size, getattr(state, split))
        with Progress("encode", None, state.bytes) as progress:
            journal = _Journal(folder, state, splitter, writers, num_workers)
            for found, end in encoded:
                taken, within = _within_limits(found, state)
                for document in taken:
                    for side, one in splitter.add(document.place, document):
                        writers[side].add(one.ids, one.num_bytes)
                if not within:
                    break
                state.position = end
                expected = expected_bytes(source, settings, end, state.bytes, state.tokens)
                progress.update(sum(document.num_bytes for document in taken), expected, journal.speed())
                journal.write_if_due()
        for side, one in splitter.finish():
            writers[side].add(one.ids, one.num_bytes)
        state.seconds = journal.seconds()
        for writer in writers.values():
            writer.finish()
    finally:
        encoded.close()
        for writer in writers.values():
            writer.close()


def _within_limits(found: list[Document | str], state: State) -> tuple[list[Document], bool]:
    """The documents of `found` before a limit is passed, counted in `state`; and whether none is."""
    max_bytes, max_tokens = state.settings["max_bytes"], state.settings["max_tokens"]
    taken = []
    for document in found:
        if isinstance(document, str):
            state.skipped[document] = state.skipped.get(document, 0) + 1
            continue
        num_bytes, num_tokens = state.bytes + document.num_bytes, state.tokens + len(document.ids)
        if max_bytes is not None and num_bytes > max_bytes or max_tokens is not None and num_tokens > max_tokens:
            return taken, False
        state.bytes, state.tokens = num_bytes, num_tokens
        state.replaced += document.replaced
        taken.append(document)
    return taken, True


class _Journal:
    """Saves the state every few seconds, between two chunks."""

    def __init__(self, folder: Path, state: State, splitter: Splitter, writers: dict, num_workers: int) -> None:
        self.folder, self.state, self.splitter, self.writers = folder, state, splitter, writers
        self.num_workers = num_workers
        self.started = self.saved = time.monotonic()
        self.before, self.tokens_before = state.seconds, state.tokens

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def speed(self) -> str:
        tokens = (self.state.tokens - self.tokens_before) / max(time.monotonic() - self.started, 1e-9)
        workers = f"{self.num_workers} worker{'s' if self.num_workers > 1 else ''}"
        return f"{self.state.tokens / 1e6:.1f} M tokens, {tokens:,.0f} tokens/s with {workers}"

    def write_if_due(self) -> None:
        if time.monotonic() - self.saved < JOURNAL_INTERVAL:
            return
        for writer in self.writers.values():
            writer.sync()
        held = self.splitter.held
        if held is not None:
            held = (held[0], held[1]._replace(ids=held[1].ids.tolist()))
        self.state.held, self.state.validated = held, self.splitter.validated
        self.state.seconds = self.seconds()
        building.save(self.folder, self.state)
        self.saved = time.monotonic()


def expected_bytes(
    source: Source,
    settings: dict[str, object],
    position: Position,
    bytes_taken: int,
    tokens_taken: int,
    limit: int | None = None,
) -> int | None:
    """Bytes of text there will be in all, as it looks now; None if nothing tells."""
    expected = [size for size in (settings["max_bytes"], limit) if size is not None]
    if read := source.bytes_before(position):
        expected.append(bytes_taken * source.num_bytes // read)
    if settings["max_tokens"] is not None and tokens_taken:
        expected.append(bytes_taken * settings["max_tokens"] // tokens_taken)
    return min(expected, default=None)
