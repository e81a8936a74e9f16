"""Where text comes from: the standard library, a folder, files of records, or a Hugging Face dataset.

`open_source` looks at the source and reads no text; `Source.read` yields records and can be called again, and from
where an earlier reading stood: the tokenizer is trained on what is encoded later, and what was interrupted goes on.
Files are visited in an order shuffled by the seed, so that a byte limit takes a fair sample of a folder; records
keep their order, because Megatron shuffles when it reads.
"""

import glob
import hashlib
import os
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_xact.pretraining.data import hub, readers
from megatron_xact.pretraining.data.documents import Record
from megatron_xact.pretraining.data.readers import RECORD_SUFFIXES, TEXT_SUFFIXES

STDLIB_SUFFIXES = (".py", ".txt", ".rst")
# Tests are two thirds of the whole and not always installed; `encodings` is 1.4 MB of much the same tables.
STDLIB_SKIPPED = frozenset(["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"])
FILE_PIECE = 1 << 20  # bytes: a longer text file in a folder becomes several documents, to bound memory
SINGLE_FILE_PIECE = 64 << 10  # bytes: one text file alone becomes many documents, so that it can be split

Position = list | dict  # JSON


@dataclass(frozen=True)
class Source:
    """A corpus that can be read any number of times.

    `name` identifies it across runs, `fingerprint` its state (None where it cannot be known without reading),
    `num_bytes` its size on disk (None where unknown).
    """

    name: str
    fingerprint: str | None
    num_bytes: int | None
    read: Callable[[Position | None], Iterator[tuple[Record, Position]]]
    """(record, position after it), from a position on; None: from the beginning."""
    bytes_before: Callable[[Position], int | None]
    """How much of `num_bytes` has been read at a position."""


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
        _check_kind(path)
        return _files_source(str(path.resolve()), path.parent, [path], text_key, seed, SINGLE_FILE_PIECE)
    if glob.has_magic(spec):
        return _matching(path, text_key, seed)
    dataset = re.fullmatch(rf"({hub.NAME})(?::([\w.-]+))?(?:@([\w\[\]:%+.-]+))?", spec)
    if dataset is None or spec.endswith(RECORD_SUFFIXES + TEXT_SUFFIXES):
        raise ValueError(
            f"no such source: {spec}; give stdlib, an existing file or folder, a pattern of files, "
            "or a Hugging Face dataset as org/name[:config][@split]"
        )
    name, config, split = dataset.groups()
    return Source(
        spec, None, None, lambda start: hub.rows(name, config, split or "train", text_key, start), lambda _: None
    )


def _check_kind(file: Path) -> None:
    known = RECORD_SUFFIXES + TEXT_SUFFIXES
    if not file.name.endswith(known):
        raise ValueError(f"{file}: unknown kind of file; known are {' '.join(known)}, or a folder of text files")


def _matching(pattern: Path, text_key: str, seed: int) -> Source:
    files = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)) if os.path.isfile(name)]
    if not files:
        raise ValueError(f"no file matches {pattern}")
    for file in files:
        _check_kind(file)
    return _files_source(str(pattern.absolute()), Path(os.path.commonpath(files)), files, text_key, seed)


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
    """A position is `[number of the file in the order of visiting, *mark in it]`, see readers."""
    digest = hashlib.sha256()
    sizes = {}
    for file in files:
        status = file.stat()
        sizes[file] = status.st_size
        digest.update(os.fsencode(f"{file.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    order = list(files)
    random.Random(seed).shuffle(order)

    def read(start: Position | None) -> Iterator[tuple[Record, Position]]:
        first, *mark = start or [0, *readers.START]
        for number in range(first, len(order)):
            for record, after in readers.read(order[number], text_key, piece, mark):
                yield record, [number, *after]
            mark = readers.START

    before = [0, *accumulate(sizes[file] for file in order)]

    def bytes_before(position: Position) -> int:
        return before[position[0]] + position[3]

    return Source(name, digest.hexdigest(), before[-1], read, bytes_before)
