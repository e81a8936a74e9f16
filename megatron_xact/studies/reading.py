"""CSV files into a table of runs; foreign ones (published results, Weights & Biases exports) through a `Mapping`."""

from __future__ import annotations

import csv
import difflib
import io
import math
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_xact.studies.table import COLUMNS, Run, Table, lines_of


@dataclass(frozen=True)
class Source:
    """Where one column comes from: a column of the file, with a factor, a lookup or a pattern; or one constant."""

    column: str = ""
    scale: float | None = None  # None: no unit is given, and counts are plain ones
    values: dict[str, object] | None = None
    pattern: str = ""  # the value is what the first group matches, or whether it matches (1 or 0) without a group
    constant: object = None

    def read(self, row: dict[str, str]) -> str:
        if self.constant is not None:
            return str(self.constant)
        text = row[self.column]
        if self.pattern:
            match = re.search(self.pattern, text)
            return (match.group(1) or "" if match.re.groups else "1") if match else "0"
        if self.values is not None:
            if text not in self.values:
                known = ", ".join(self.values)
                raise ValueError(f"{self.column} = {text!r} is not among the values of the mapping: {known}")
            return str(self.values[text])
        return text


@dataclass(frozen=True)
class Mapping:
    """How a foreign table becomes ours. `where`: (column of the file, is it equal, values)."""

    sources: dict[str, Source] = field(default_factory=dict)
    where: tuple[tuple[str, bool, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, file: Path | None = None, columns: Iterable[str] = (), constants: Iterable[str] = (),
           where: Iterable[str] = ()) -> Mapping:  # fmt: skip
        """From a TOML file and from words: NAME=COLUMN or NAME=COLUMN*FACTOR; NAME=VALUE; COLUMN=VALUE or !=VALUE."""
        sources, conditions = _read_toml(file) if file else ({}, [])
        for word in columns:
            name, column = _split(word, "=", "--columns", "NAME=COLUMN")
            scaled = re.fullmatch(r"(.+)\*([0-9.eE+-]+)", column)
            sources[name] = Source(scaled[1], float(scaled[2])) if scaled else Source(column)
        for word in constants:
            name, value = _split(word, "=", "--constant", "NAME=VALUE")
            sources[name] = Source(constant=value)
        for word in where:
            equal = "!=" not in word
            column, value = _split(word, "=" if equal else "!=", "--where", "COLUMN=VALUE or COLUMN!=VALUE")
            conditions.append((column, equal, (value,)))
        for name in sources:
            if name not in COLUMNS:
                raise ValueError(f"{name!r} is not a column of a study's table; those are {', '.join(COLUMNS)}")
        return cls(sources, tuple(conditions))


def _split(word: str, sign: str, option: str, form: str) -> tuple[str, str]:
    name, found, value = word.partition(sign)
    if not found or not name.strip():
        raise ValueError(f"{option} {word!r} must be {form}")
    return name.strip(), value.strip()


def _read_toml(path: Path) -> tuple[dict[str, Source], list]:
    if not path.is_file():
        raise ValueError(f"no such mapping: {path}")
    with open(path, "rb") as file:
        try:
            content = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: {error}") from None
    if unknown := set(content) - {"columns", "where"}:
        raise ValueError(f"{path}: unknown table {sorted(unknown)[0]!r}; a mapping has [columns] and [where]")
    for name, table in content.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name} = {table!r} must be a table")
    sources = {name: _source(value, f"{path}: columns.{name}") for name, value in content.get("columns", {}).items()}
    where = []
    for column, value in content.get("where", {}).items():
        where.append((column, True, tuple(map(str, value)) if isinstance(value, list) else (str(value),)))
    return sources, where


# Of a source in TOML: the kinds of its entries, and how they are told.
_KINDS = {
    "column": (str, "a column's name"), "scale": (int | float, "a number"), "values": (dict, "a table"),
    "pattern": (str, "a regular expression"), "constant": (str | int | float, "a text or a number"),
}  # fmt: skip


def _source(value: object, where: str) -> Source:
    if isinstance(value, str):
        return Source(value)
    if not isinstance(value, dict) or not value.keys() <= _KINDS.keys():
        raise ValueError(f"{where} must be a column's name or a table with {', '.join(_KINDS)}")
    for key, entry in value.items():
        kind, told = _KINDS[key]
        if not isinstance(entry, kind) or isinstance(entry, bool):
            raise ValueError(f"{where}.{key} = {entry!r} must be {told}")
    try:
        re.compile(value.get("pattern", ""))
    except re.error as error:
        raise ValueError(f"{where}.pattern = {value['pattern']!r} is no regular expression: {error}") from None
    return Source(**value)


# -- reading ----------------------------------------------------------------------------------------------------------


def read(paths: Path | Sequence[Path], mapping: Mapping | None = None, folder: Path | None = None) -> Table:
    """One table out of one or several CSV files. ValueError or OSError, one line, for what is wrong with them.

    folder: where the table will be written, for the paths of run folders; by default they start where they are read.
    """
    paths = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    runs: list[Run] = []
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; a table of runs is a CSV file")
        found = _read_csv(path, mapping or Mapping(), several=len(paths) > 1)
        if folder is not None:
            found = [replace(r, run=r.run and os.path.relpath(path.parent / r.run, folder)) for r in found]
        runs += found
    return Table(runs, paths[0].name if len(paths) == 1 else f"{len(paths)} tables")


def _read_csv(path: Path, mapping: Mapping, several: bool) -> list[Run]:
    if not path.exists():
        raise ValueError(f"no such table: {path}")
    header, rows = _cells(path)
    sources = {name: Source(name) for name in COLUMNS if name in header} | mapping.sources
    for name, source in sources.items():
        if source.constant is None and source.column not in header:
            raise ValueError(f"{path} has no column {source.column!r} for {name}; it has {', '.join(header)}"
                             + _near(source.column, header, name))  # fmt: skip
    for name, column in COLUMNS.items():
        if column.metadata["required"] and name not in sources:
            raise ValueError(
                f"{path} has no column {name!r} ({column.metadata['about']}); it has {', '.join(header)}"
                + (_near(name, header, name) or f". Say which one it is: --columns {name}=COLUMN")
            )
    _tell_unread(path, header, sources)
    for column, _, _ in mapping.where:
        if column not in header:
            raise ValueError(f"{path} has no column {column!r} to choose rows by; it has {', '.join(header)}")
    for column in {s.column for s in sources.values() if s.constant is None} | {c for c, *_ in mapping.where}:
        if header.count(column) > 1:
            raise ValueError(f"{path.name} line 1: {header.count(column)} columns are called {column!r}; a column that "
                             "is used needs a name of its own")  # fmt: skip
    prefix = f"{path.name} " if several else ""
    runs, bad = [], {}
    for number, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"{path.name} line {number} has {len(cells)} cells, but the header has {len(header)}; a "
                             "row has one for each column: quote cells that hold the separator")  # fmt: skip
        row = dict(zip(header, cells, strict=True))
        if all((row[column] in values) == equal for column, equal, values in mapping.where):
            run, wrong = _read_row(row, sources, f"{prefix}line {number}")
            runs.append(run)
            for name in wrong:
                bad.setdefault(name, []).append(run)
    if not runs:
        raise ValueError(f"{path} has no runs" + (" that --where lets through" if rows else ""))
    for name, those in bad.items():
        column = sources[name].column
        values = ", ".join(dict.fromkeys(repr(getattr(r, name)) for r in those[:3]))
        raise ValueError(f"{path.name}: {name} is not a finite number in {lines_of(those)}: {values}"
                         + _way_out(name, column, str(getattr(those[0], name))))  # fmt: skip
    if header != list(COLUMNS):  # those that `Table` wrote have plain counts
        _check_units(runs, sources, path.name)
    return runs


def _way_out(name: str, column: str, text: str) -> str:
    """What to do about a cell that is no number."""
    if re.fullmatch(r"[+-]?[\d.,'\s]*\d", text):
        return "; write numbers with a decimal point and without thousands separators, e.g. 1234567.8"
    if re.fullmatch(r"[\d.]+\s*[kKMBGT]", text):
        return "; write the number out (30M is 3e7), or give each name its number: values = {...} in a --mapping"
    return f"; leave such runs out with --where '{column}!=VALUE', or complete them" if name == "loss" else ""


def _cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header, and the rows with something in them, with their line numbers; cells without spaces around them.

    Spreadsheets separate by comma, semicolon or tab, by country: the one that is most often in the header counts. A
    wrong guess cannot misread a number, since rows must fit the header and a decimal comma is no number.
    """
    data = path.read_bytes()
    for start, kind in ((b"PK\x03\x04", "a spreadsheet or a zip archive"), (b"\x1f\x8b", "compressed by gzip")):
        if data.startswith(start):
            raise ValueError(f"{path} is {kind}, not a CSV file; save the table as CSV in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, encoding = data[: error.start].count(b"\n") + 1, "latin1"
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            encoding = "utf-16"
        raise ValueError(f"{path} is not a CSV file in UTF-8: line {line} has the byte 0x{data[error.start]:02x}; save "
                         f"it as UTF-8, e.g. iconv -f {encoding} -t utf-8 {path.name}") from None  # fmt: skip
    separator = max(",;\t", key=text.partition("\n")[0].count)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        table = [[cell.strip() for cell in row] for row in lines]
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from None
    if not table or not any(table[0]):
        raise ValueError(f"{path} is empty; a table has a header and a row per run")
    return table[0], [(number, row) for number, row in enumerate(table[1:], start=2) if any(row)]


def _near(wanted: str, header: list[str], name: str) -> str:
    """What to say of a column that is nearly called so; nothing where there is none."""
    lower = {column.lower(): column for column in header}
    found = difflib.get_close_matches(wanted.lower(), lower, n=1)
    return f". If it is {lower[found[0]]!r}: --columns '{name}={lower[found[0]]}'" if found else ""


def _tell_unread(path: Path, header: list[str], sources: dict[str, Source]) -> None:
    """One line on stderr where columns nearly have the names of optional ones, which are not read then."""
    read = {s.column for s in sources.values()}
    unread = {_plain(column): column for column in header if column not in read}
    near = {}
    for name in COLUMNS:
        if name not in sources and (found := difflib.get_close_matches(_plain(name), unread, n=1, cutoff=0.8)):
            near[name] = unread[found[0]]
    if near:
        told = ", ".join(f"{column!r} (meant as {name}?)" for name, column in near.items())
        way = " ".join(f"'{name}={column}'" for name, column in near.items())
        print(f"xact: warning: {path} has columns that are not read: {told}. If so: --columns {way}", file=sys.stderr)


def _plain(name: str) -> str:
    """Without case, signs and a plural: Step_times is steptime."""
    return re.sub(r"[^a-z0-9]|s$", "", name.lower())


def _check_units(runs: list[Run], sources: dict[str, Source], name: str) -> None:
    """Counts too small for a language model are taken for millions or billions, unless the mapping gives a factor."""
    for column, least, unit in (("params", 1e3, "1e6"), ("tokens", 1e5, "1e9")):
        those = [r for r in runs if 0 < getattr(r, column) < least]
        if those and sources[column].scale is None:
            word = f"{column}={sources[column].column or 'COLUMN'}"
            raise ValueError(
                f"{name}: {column} below {least:g} in {lines_of(those)}: are they in millions or billions? "
                f"Say so: --columns '{word}*{unit}', or '{word}*1' if they are plain counts"
            )


def _read_row(row: dict[str, str], sources: dict[str, Source], line: str) -> tuple[Run, list[str]]:
    values: dict[str, object] = {name: COLUMNS[name].default for name in COLUMNS}
    wrong = []
    for name, source in sources.items():
        try:
            text = source.read(row)
        except ValueError as error:
            raise ValueError(f"{line}: {error}") from None
        kind = str(COLUMNS[name].type)
        if kind == "str":
            values[name] = text or values[name]
        elif text or COLUMNS[name].metadata["required"]:
            try:
                number = float(text) * (1.0 if source.scale is None else source.scale)
                if not math.isfinite(number):
                    raise ValueError
                values[name] = int(number) if kind == "int" else number
            except ValueError:
                values[name] = text
                wrong.append(name)
    return Run(**values, line=line), wrong
