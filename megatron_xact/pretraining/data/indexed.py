"""Megatron's indexed format: two files per split, `PREFIX.bin` (token ids) and `PREFIX.idx` (lengths)."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

with warnings.catch_warnings():  # Megatron warns at import about optimizers that have no part in writing data
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder


@dataclass
class Totals:
    """What one split holds. `counts[id]` is how often a token occurs, EOD included."""

    documents: int
    bytes: int
    counts: np.ndarray  # int64 [vocabulary]

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())


class SplitWriter:
    """Writes documents to `folder/prefix.bin`; `finish` writes the index, without which none is readable."""

    def __init__(self, folder: Path, prefix: str, vocab_size: int) -> None:
        self.path = folder / prefix
        self.dtype = DType.optimal_dtype(vocab_size)
        self.builder = IndexedDatasetBuilder(str(self.path) + ".bin", dtype=self.dtype)
        self.totals = Totals(0, 0, np.zeros(vocab_size, dtype=np.int64))

    def add(self, ids: list[int], num_bytes: int) -> None:
        array = np.array(ids, dtype=self.dtype)
        self.builder.add_document(array, [array.size])
        self.totals.documents += 1
        self.totals.bytes += num_bytes
        np.add.at(self.totals.counts, array, 1)

    def finish(self) -> Totals:
        self.builder.finalize(str(self.path) + ".idx")
        return self.totals

    def close(self) -> None:
        """Let go of the file without an index; harmless after `finish`."""
        self.builder.data_file.close()


def unigram_nats(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Cross entropy, in nats per token, of the validation split under the train split's token frequencies.

    The floor that a language model must leave far behind: it knows frequencies and nothing of order. Add-one
    smoothing gives tokens that train never shows a probability.
    """
    smoothed = train_counts.astype(np.float64) + 1.0
    log_probability = np.log(smoothed) - np.log(smoothed.sum())
    return float(-(validation_counts @ log_probability) / validation_counts.sum())
