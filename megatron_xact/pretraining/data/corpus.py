"""Where text comes from: the standard library, a folder, a file of records, or a Hugging Face dataset.

`open_source` looks at the source and reads no text; `Source.documents` yields `(name, text)` and can be
called again, which is how the tokenizer is trained on the same documents that are encoded later. Files are
visited in an order shuffled by the seed, so that a byte limit takes a fair sample of a folder; records keep
their order, because Megatron shuffles when it reads.
"""

import gzip
import hashlib
import json
import os
import random
import re
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")  # of a single file; a folder may hold any text file
STDLIB_SUFFIXES = (".py", ".txt", ".rst")
# Tests are two thirds of the whole and not always installed; `encodings` is 1.4 MB of much the same tables.
STDLIB_SKIPPED = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"]
)
FILE_PIECE = 1 << 20  # bytes: a longer text file in a folder becomes several documents, to bound memory
SINGLE_FILE_PIECE = 64 << 10  # bytes: one text file alone becomes many documents, so that it can be split
SNIFFED = 8192  # bytes looked at to tell text from binary
EXTRA = "pip install 'megatron-xact[data]'"

Documents = Iterator[tuple[str, str | None]]


@dataclass(frozen=True)
class Source:
    """A corpus that can be read any number of times.

    `name` identifies it across runs, `fingerprint` its state (None where it cannot be known without reading),
    `num_bytes` its size (None where unknown). `documents()` yields (name, text); text None = not text.
    """

    name: str
    fingerprint: str | None
    num_bytes: int | None
    documents: Callable[[], Documents]


def open_source(spec: str, *, text_key: str = "text", seed: int = 0, exclude: Path | None = None) -> Source:
    """The source that `spec` names; ValueError where there is none. `exclude`: a folder not to read."""
    if spec == "stdlib":
        return _stdlib(seed)
    path = Path(spec).expanduser()
    if path.is_dir():
        files = _files_below(path, exclude, skipped=frozenset(["__pycache__"]))
        if not files:
            raise ValueError(f"no files to read in the folder {path}")
        return _files_source(str(path.resolve()), path, files, text_key, seed)
    if path.is_file():
        if not path.name.endswith(RECORD_SUFFIXES + TEXT_SUFFIXES):
            known = " ".join(RECORD_SUFFIXES + TEXT_SUFFIXES)
            raise ValueError(f"{path}: unknown kind of file; known are {known}, or a folder of text files")
        return _files_source(str(path.resolve()), path.parent, [path], text_key, seed, SINGLE_FILE_PIECE)
    dataset = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?(?:@([\w\[\]:%+.-]+))?", spec)
    if dataset is None or spec.endswith(RECORD_SUFFIXES + TEXT_SUFFIXES):
        raise ValueError(
            f"no such source: {spec}; give stdlib, an existing file or folder, "
            "or a Hugging Face dataset as org/name[:config][@split]"
        )
    name, config, split = dataset.groups()
    split = split or "train"
    return Source(spec, None, None, lambda: hugging_face_documents(name, config, split, text_key))


def usable(documents: Documents, max_bytes: int | None, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """(text, its UTF-8 bytes) of documents that hold text, at most `max_bytes` in all; counts the others."""
    total = 0
    for _, text in documents:
        if text is None:
            skipped["not text"] += 1
        elif not text.strip():
            skipped["empty"] += 1
        else:
            try:
                data = text.encode()
            except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                data = text.encode()
            total += len(data)
            if max_bytes is not None and total > max_bytes:
                return
            yield text, data


def split_documents(
    documents: Iterator[tuple[str, bytes]], fraction: float, seed: int
) -> Iterator[tuple[str, str, bytes]]:
    """("train" or "validation", text, bytes) of every document, by a hash of its content and the seed.

    Equal documents fall on the same side, whatever their order or file. The document with the lowest hash is
    held back to the end: it goes to validation if nothing else did, so that a small corpus has one too.
    """
    key = seed.to_bytes(8, "little", signed=True)
    held: tuple[int, str, bytes] | None = None  # lowest hash so far, while validation is empty
    validated = False
    for text, data in documents:
        place = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest())
        if place < fraction * 2**64:
            validated = True
            yield "validation", text, data
        elif not validated and (held is None or place < held[0]):
            if held is not None:
                yield "train", held[1], held[2]
            held = (place, text, data)
        else:
            yield "train", text, data
    if held is not None:
        yield "train" if validated else "validation", held[1], held[2]


def hugging_face_documents(name: str, config: str | None, split: str, text_key: str) -> Documents:
    """The rows of a dataset on the Hugging Face hub (or a folder that `datasets` understands), streamed."""
    for number, row in enumerate(_hugging_face_rows(name, config, split)):
        yield f"{name}@{split}:{number}", _text_of(row, text_key, f"row {number} of {name}")


def _hugging_face_rows(name: str, config: str | None, split: str) -> Iterator[dict]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"reading the dataset {name} needs the package `datasets`: {EXTRA}") from None
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # the hub, http and file layers each raise kinds of their own, with long texts
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} is no file or folder here, and cannot be read as a Hugging Face dataset: {reason}"
        ) from error


def _stdlib(seed: int) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _files_below(root, None, STDLIB_SKIPPED) if file.name.endswith(STDLIB_SUFFIXES)]
    if not files:
        raise ValueError(f"this Python has no standard library sources in {root}; give another source")
    version = ".".join(map(str, sys.version_info[:3]))
    return _files_source(f"stdlib of Python {version}", root, files, "text", seed)


def _files_below(root: Path, exclude: Path | None, skipped: frozenset[str]) -> list[Path]:
    """Every file below `root`, sorted; nothing hidden, no folder named in `skipped`, nothing in `exclude`."""
    files = []
    avoided = exclude.resolve() if exclude is not None else None
    for folder, names, leaves in os.walk(root):
        here = Path(folder)
        names[:] = [
            name
            for name in names
            if name not in skipped and not name.startswith(".") and (here / name).resolve() != avoided
        ]
        files += [here / leaf for leaf in leaves if not leaf.startswith(".") and (here / leaf).is_file()]
    return sorted(files)


def _files_source(
    name: str, root: Path, files: list[Path], text_key: str, seed: int, piece: int = FILE_PIECE
) -> Source:
    digest = hashlib.sha256()
    num_bytes = 0
    for file in files:
        status = file.stat()
        num_bytes += status.st_size
        digest.update(
            f"{file.relative_to(root).as_posix()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode()
        )
    order = list(files)
    random.Random(seed).shuffle(order)

    def documents() -> Documents:
        for file in order:
            if file.name.endswith((".jsonl", ".jsonl.gz")):
                yield from _json_lines(file, text_key)
            elif file.name.endswith(".parquet"):
                yield from _parquet(file, text_key)
            else:
                yield from _text_file(file, piece)

    compressed = any(file.name.endswith((".gz", ".parquet")) for file in files)
    return Source(name, digest.hexdigest(), None if compressed else num_bytes, documents)


def _text_file(file: Path, piece: int) -> Documents:
    """The file as one document, or as several cut at line ends where it is longer than `piece` bytes."""
    with file.open("rb") as stream:
        if b"\0" in stream.peek(SNIFFED)[:SNIFFED]:
            yield str(file), None
            return
        # Invalid bytes become U+FFFD; a byte-order mark is dropped; line ends stay as they are.
        yield f"{file}#0", b"".join(stream.readlines(piece)).decode("utf-8-sig", "replace")
        for number in count(1):
            lines = stream.readlines(piece)
            if not lines:
                return
            yield f"{file}#{number}", b"".join(lines).decode("utf-8", "replace")


def _json_lines(file: Path, text_key: str) -> Documents:
    number = 0
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    where = f"{file}:{number}"
                    try:
                        row = json.loads(line.decode("utf-8-sig", "replace"))
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
                    yield where, _text_of(row, text_key, where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: broken gzip file after line {number} ({error})") from None


def _parquet(file: Path, text_key: str) -> Documents:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"reading {file} needs the package `pyarrow`: {EXTRA}") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                raise ValueError(f"{file}: no column {text_key!r}, only {columns}; choose with --text-key")
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
                for row in batch.to_pylist():
                    yield f"{file}:{number}", _text_of(row, text_key, f"row {number} of {file}")
                    number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def _text_of(row: object, text_key: str, where: str) -> str:
    """The text of one record; null counts as empty. `where` names the record in the error."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with the key {text_key!r}, found {type(row).__name__}")
    if text_key not in row:
        raise ValueError(f"{where}: no key {text_key!r}, only {sorted(row)}; choose one with --text-key")
    text = row[text_key]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: {text_key!r} holds {type(text).__name__}, not text")
    return text or ""
