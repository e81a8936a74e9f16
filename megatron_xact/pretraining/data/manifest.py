"""`data.json`: what lies in a data folder and how it was made. Written last: a folder with one is whole."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_xact.whole import write_text

NAME = "data.json"
FORMAT = 1  # raised when the same settings would give other tokens
TRAIN, VALIDATION = "train_text_document", "validation_text_document"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class SplitInfo:
    """One split: `documents`, their UTF-8 `bytes`, `tokens` with EODs, and the two files' sizes."""

    documents: int
    bytes: int
    tokens: int
    bin_bytes: int
    idx_bytes: int


@dataclass(frozen=True)
class DataManifest:
    """What a run needs to know about its data. Paths follow from `folder`, so the folder may be moved."""

    folder: Path
    settings: dict[str, object]  # as `prepare` was called, and the state of the source: what reuse compares
    source: str
    vocab_size: int
    eod: int
    tokenizer_sha256: str
    dtype: str
    train: SplitInfo
    validation: SplitInfo
    skipped: dict[str, int]
    unigram_nats: float  # cross entropy of validation under train's token frequencies, nats per token
    unigram_perplexity: float
    versions: dict[str, str]
    replaced: int = 0  # documents that hold U+FFFD
    made: dict[str, object] = field(default_factory=dict)  # when, and how fast: nothing that decides the tokens
    reused: bool = False  # this call found the data ready

    @property
    def train_prefix(self) -> Path:
        return self.folder / TRAIN

    @property
    def validation_prefix(self) -> Path:
        return self.folder / VALIDATION

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def bytes_per_token(self) -> float:
        return (self.train.bytes + self.validation.bytes) / (self.train.tokens + self.validation.tokens)

    def megatron_arguments(self) -> list[str]:
        """The flags with which Megatron trains on this data. Vocabulary padding is left to Megatron."""
        return [
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(self.tokenizer)),
            *("--train-data-path", str(self.train_prefix), "--valid-data-path", str(self.validation_prefix)),
        ]

    def summary(self) -> str:
        splits = "\n".join(
            f"  {name:10} {info.documents:,} documents, {info.bytes / 1e6:.2f} MB, {info.tokens:,} tokens  {prefix}"
            for name, info, prefix in (
                ("train", self.train, self.train_prefix),
                ("validation", self.validation, self.validation_prefix),
            )
        )
        left_out = ", ".join(f"{count} {kind}" for kind, count in sorted(self.skipped.items())) or "nothing"
        if self.replaced:
            left_out += f"; {self.replaced} document(s) hold U+FFFD, which takes the place of what is not UTF-8"
        return (
            f"{self.source}\n{splits}\n"
            f"  tokenizer  {self.vocab_size:,} tokens, {self.bytes_per_token:.2f} bytes each"
            f"  {self.tokenizer}\n"
            f"  left out   {left_out}\n"
            f"  unigram    validation perplexity {self.unigram_perplexity:.1f} "
            f"({self.unigram_nats:.3f} nats per token): what a model must beat\n"
            f"  encoded    {self.made['tokens_per_second']:,} tokens/s with {self.made['workers']} worker(s), "
            f"finished {self.made['finished']}"
        )

    def write(self, folder: Path) -> None:
        record = asdict(self) | {"format": FORMAT, "bytes_per_token": self.bytes_per_token}
        del record["folder"], record["reused"]
        write_text(folder / NAME, json.dumps(record, indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> DataManifest:
    """The manifest of a finished data folder; ValueError, saying what is wrong, where it is not one."""
    path = folder / NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"no prepared data in {folder} (no {NAME}); make it: xact data prepare --out {folder}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); rebuild with --fresh") from None
    try:
        if record.pop("format") != FORMAT:
            raise TypeError
        del record["bytes_per_token"]
        splits = {name: SplitInfo(**record.pop(name)) for name in ("train", "validation")}
        manifest = DataManifest(folder=folder.resolve(), **splits, **record)
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} was written by another version; rebuild with --fresh") from None
    for prefix, info in ((TRAIN, manifest.train), (VALIDATION, manifest.validation)):
        for suffix, size in ((".bin", info.bin_bytes), (".idx", info.idx_bytes)):
            file = folder / (prefix + suffix)
            if not file.is_file() or file.stat().st_size != size:
                raise ValueError(f"{file} is missing or not the {size} bytes of {path}; rebuild with --fresh")
    if not (manifest.tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"{manifest.tokenizer} is missing; rebuild with --fresh")
    return manifest
