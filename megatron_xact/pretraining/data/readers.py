"""The kinds of files that hold text, each read from any earlier position on, in bounded memory.

A reader yields (record, mark). A mark is `[offset, number, on_disk]`: where the next record begins (a byte of the
uncompressed file, or a row), how many came before it, and how many bytes of the file on disk were read for them.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_xact.pretraining.data.documents import Record
from megatron_xact.pretraining.data.hub import EXTRA

Mark = list[int]
Marked = Iterator[tuple[Record, Mark]]

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")  # compressed .json: lines, as on the hub
RECORD_SUFFIXES = (*JSON_LINES, ".parquet")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")  # of a single file; a folder may hold any text file
SNIFFED = 8192  # bytes looked at to tell text from binary
SKIPPED_AT_ONCE = 1 << 20
START: Mark = [0, 0, 0]


def read(file: Path, text_key: str, piece: int, mark: Mark) -> Marked:
    """The records of `file` from `mark` on. ValueError: it is broken, or a package for it is missing."""
    if file.name.endswith(JSON_LINES):
        return _json_lines(file, mark)
    if file.name.endswith(".parquet"):
        return _parquet(file, text_key, mark)
    return _text(file, piece, mark)


def _text(file: Path, piece: int, mark: Mark) -> Marked:
    """The file as one document, or as several cut at line ends where it is longer than `piece` bytes."""
    offset, number, _ = mark
    with file.open("rb") as stream:
        if not number and b"\0" in stream.peek(SNIFFED)[:SNIFFED]:
            size = file.stat().st_size
            yield Record(str(file), None), [size, 1, size]
            return
        stream.seek(offset)
        while True:
            data = _lines(stream, piece)
            if not data and number:
                return
            offset, number = offset + len(data), number + 1
            # Invalid bytes become U+FFFD; a byte-order mark is dropped; line ends stay as they are.
            text = data.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
            yield Record(f"{file}#{number - 1}", text), [offset, number, offset]


def _lines(stream: BinaryIO, piece: int) -> bytes:
    """More than `piece` bytes up to the end of a line; of a line longer than that, up to the end of a character."""
    data = stream.read(piece + 1)
    if len(data) > piece and not data.endswith(b"\n"):
        data += stream.readline(piece)
        if not data.endswith(b"\n"):
            while (more := stream.peek(1)[:1]) and 0x80 <= more[0] < 0xC0:
                data += stream.read(1)
    return data


def _json_lines(file: Path, mark: Mark) -> Marked:
    offset, number, _ = mark
    kind = file.suffix
    try:
        with file.open("rb") as raw, _decompressed(raw, kind, file) as stream:
            _skip(stream, offset)
            for line in stream:
                offset, number = offset + len(line), number + 1
                if line.strip():
                    yield Record(f"{file}:{number}", line), [offset, number, raw.tell()]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: broken gzip file after line {number} ({error})") from None
    except OSError as error:
        if kind != ".zst" or error.errno is not None:
            raise
        raise ValueError(f"{file}: broken zstd file after line {number} ({error})") from None


def _decompressed(raw: BinaryIO, kind: str, file: Path) -> BinaryIO:
    if kind == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if kind == ".zst":
        pyarrow = _pyarrow(file)
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), 1 << 16)
    return raw


def _skip(stream: BinaryIO, offset: int) -> None:
    if stream.seekable():
        stream.seek(offset)
        return
    while offset > 0:
        offset -= len(stream.read(min(offset, SKIPPED_AT_ONCE))) or offset


def _parquet(file: Path, text_key: str, mark: Mark) -> Marked:
    pyarrow = _pyarrow(file)
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                raise ValueError(f"{file}: no column {text_key!r}, only {columns}; choose one with --text-key")
            yield from _rows(file, table, text_key, mark[0])
    except (pyarrow.ArrowException, OSError) as error:  # of damaged pages it is an OSError, without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def _rows(file: Path, table, text_key: str, first: int) -> Marked:
    """From row `first` on; the row groups before it are not read."""
    size, total = file.stat().st_size, table.metadata.num_rows
    number, groups = 0, list(range(table.num_row_groups))
    while groups and number + table.metadata.row_group(groups[0]).num_rows <= first:
        number += table.metadata.row_group(groups.pop(0)).num_rows
    for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=[text_key]):
        for text in batch.column(0).to_pylist():
            number += 1
            if number > first:
                if text is not None and not isinstance(text, str):
                    raise ValueError(f"row {number - 1} of {file}: {text_key!r} holds {type(text).__name__}, not text")
                yield Record(f"row {number - 1} of {file}", text or ""), [number, number, size * number // total]


def _pyarrow(file: Path):
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"reading {file} needs the package `pyarrow`: {EXTRA}") from None
    return pyarrow
