"""Megatron's indexed format: two files per split, `PREFIX.bin` (token ids) and `PREFIX.idx` (lengths).

Read and written here with numpy alone, in blocks: Megatron's own writer holds Python lists of all lengths and offsets,
and importing it takes torch into every process.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, document bounds
BLOCK = 1 << 22  # sequences, or tokens, worked on at once


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest dtype that Megatron uses for such a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass
class Totals:
    """What one split holds so far."""

    documents: int = 0
    bytes: int = 0  # of UTF-8 text
    tokens: int = 0


class SplitWriter:
    """Appends documents to `folder/prefix.bin`, their lengths to `prefix.lengths`; `finish` makes the index of those.

    `totals`, as they were at an earlier `sync`, take what was written after it back, and go on from there.
    """

    def __init__(self, folder: Path, prefix: str, vocab_size: int, totals: Totals | None = None) -> None:
        self.path = folder / prefix
        self.dtype = dtype_for(vocab_size)
        self.totals = totals or Totals()
        self._tokens = _reopened(folder / f"{prefix}.bin", self.totals.tokens * self.dtype.itemsize)
        self._lengths = _reopened(folder / f"{prefix}.lengths", self.totals.documents * 4)

    def add(self, ids: list[int] | np.ndarray, num_bytes: int) -> None:
        self._tokens.write(np.asarray(ids, dtype=self.dtype).data)
        self._lengths.write(struct.pack("<i", len(ids)))
        self.totals.documents += 1
        self.totals.bytes += num_bytes
        self.totals.tokens += len(ids)

    def sync(self) -> None:
        """What was added is on the disk when this returns."""
        for file in (self._tokens, self._lengths):
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> Totals:
        self.sync()
        self.close()
        _write_index(self.path, self.dtype, self.totals.documents)
        return self.totals

    def close(self) -> None:
        """Let go of the files; harmless after `finish`."""
        self._tokens.close()
        self._lengths.close()


def _reopened(path: Path, size: int):
    file = path.open("ab")
    if file.tell() < size:
        file.close()
        raise ValueError(f"{path} is shorter than the {size} bytes noted for it; build again with --fresh")
    file.truncate(size)
    return file


def _write_index(path: Path, dtype: np.dtype, documents: int) -> None:
    code = next(code for code, name in DTYPES.items() if name == dtype.name)
    with open(f"{path}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
        for lengths in _length_blocks(path):
            index.write(lengths.data)
        offset = 0
        for lengths in _length_blocks(path):
            ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize + offset
            index.write((ends - lengths.astype(np.int64) * dtype.itemsize).data)
            offset = int(ends[-1])
        for start in range(0, documents + 1, BLOCK):
            index.write(np.arange(start, min(start + BLOCK, documents + 1), dtype=np.int64).data)
        index.flush()
        os.fsync(index.fileno())


def _length_blocks(path: Path) -> Iterator[np.ndarray]:
    with open(f"{path}.lengths", "rb") as file:
        while block := file.read(4 * BLOCK):
            yield np.frombuffer(block, dtype=np.int32)


@dataclass(frozen=True)
class Index:
    """An open dataset, memory-mapped: nothing of it is read until it is asked for."""

    prefix: Path
    lengths: np.ndarray  # int32 [sequences], tokens in each
    offsets: np.ndarray  # int64 [sequences], bytes before each
    bounds: np.ndarray  # int64 [documents + 1], the sequence with which a document begins
    tokens: np.ndarray  # [tokens], of all sequences, one after the other

    @property
    def documents(self) -> int:
        return len(self.bounds) - 1

    def document(self, number: int) -> np.ndarray:
        """Its tokens; read when they are looked at."""
        first, last = int(self.bounds[number]), int(self.bounds[number + 1])
        start = int(self.offsets[first]) // self.tokens.itemsize if first < last else 0
        return self.tokens[start : start + int(self.lengths[first:last].sum(dtype=np.int64))]

    def document_lengths(self) -> np.ndarray:
        """int [documents], tokens in each."""
        if self.documents == len(self.lengths):
            return self.lengths
        sums = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(sums[self.bounds])


def read_index(prefix: Path) -> Index:
    """The dataset PREFIX.bin/.idx. FileNotFoundError; ValueError: not in Megatron's format, or cut off."""
    path = f"{prefix}.idx"
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{path} is no index in Megatron's format")
    _, version, code, sequences, bounds = HEADER.unpack(head)
    expected = HEADER.size + 12 * sequences + 8 * bounds
    size = os.path.getsize(path)
    # A multimodal index ends with one byte more per sequence.
    if version != VERSION or code not in DTYPES or size not in (expected, expected + sequences) or not bounds:
        raise ValueError(f"{path} is damaged: {size} bytes, where its head promises {expected}")
    raw = np.memmap(path, mode="r")
    lengths = raw[HEADER.size :][: 4 * sequences].view(np.int32)
    offsets = raw[HEADER.size + 4 * sequences :][: 8 * sequences].view(np.int64)
    dtype = np.dtype(DTYPES[code])
    promised = int(offsets[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
    if (found := os.path.getsize(f"{prefix}.bin")) != promised:
        raise ValueError(f"{prefix}.bin has {found} bytes, where its index promises {promised}")
    tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r") if promised else np.empty(0, dtype)
    starts = raw[HEADER.size + 12 * sequences :][: 8 * bounds].view(np.int64)
    return Index(prefix, lengths, offsets, starts, tokens)


def token_counts(prefix: Path, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: how often each id occurs. All of the file is read, a block at a time."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    tokens = read_index(prefix).tokens
    for start in range(0, len(tokens), BLOCK):
        counts += np.bincount(tokens[start : start + BLOCK], minlength=vocab_size)
    return counts


def unigram_nats(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Cross entropy, in nats per token, of the validation split under the train split's token frequencies.

    The floor that a language model must leave far behind: it knows frequencies and nothing of order. Add-one
    smoothing gives tokens that train never shows a probability.
    """
    smoothed = train_counts.astype(np.float64) + 1.0
    log_probability = np.log(smoothed) - np.log(smoothed.sum())
    return float(-(validation_counts @ log_probability) / validation_counts.sum())
