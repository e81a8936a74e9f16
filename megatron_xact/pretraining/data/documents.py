"""What becomes of one record: its text, or why it is left out; and whether it is trained on or held out."""

import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

NOT_TEXT, EMPTY = "not text", "empty"
REPLACEMENT = "\ufffd"


class Record(NamedTuple):
    """One document as its file holds it. `where` names it in errors."""

    where: str
    content: str | bytes | None
    """A text, a line of JSON, or None for what is not text."""


def text_of(record: Record, text_key: str) -> str | None:
    """The record's text; None if it is not text. ValueError: no JSON, or no text under `text_key`."""
    if not isinstance(record.content, bytes):
        return record.content
    try:
        row = json.loads(record.content.decode("utf-8-sig", "replace"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{record.where}: not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{record.where}: JSON too deeply nested to be read") from None
    return text_of_row(row, text_key, record.where)


def text_of_row(row: object, text_key: str, where: str) -> str:
    """The text of an object; null counts as empty. `where` names the row in the error."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with the key {text_key!r}, found {type(row).__name__}")
    if text_key not in row:
        raise ValueError(f"{where}: no key {text_key!r}, only {sorted(row)}; choose one with --text-key")
    text = row[text_key]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: {text_key!r} holds {type(text).__name__}, not text")
    return text or ""


def usable(text: str | None) -> tuple[str, bytes] | str:
    """(text, its UTF-8 bytes), or the reason why there is nothing to train on."""
    if text is None:
        return NOT_TEXT
    if not text.strip():
        return EMPTY
    try:
        return text, text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text, text.encode()


def place_of(data: bytes, seed: int) -> int:
    """Where a document falls in [0, 2^64): a hash of its content, so that equal ones fall together."""
    key = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest())


class Splitter[Document]:
    """Sends documents to "train" or "validation": those with the lowest `fraction` of places are held out.

    While validation is empty, the document with the lowest place is kept back, and goes there at the end if nothing
    else did: a small corpus has a validation split too. `held` and `validated` are all of its state.
    """

    def __init__(self, fraction: float, held: tuple[int, Document] | None = None, validated: bool = False) -> None:
        self.limit = fraction * 2**64
        self.held, self.validated = held, validated

    def add(self, place: int, document: Document) -> Iterator[tuple[str, Document]]:
        """What can be written now that this document has come."""
        if place < self.limit:
            self.validated = True
            yield "validation", document
        elif not self.validated and (self.held is None or place < self.held[0]):
            before, self.held = self.held, (place, document)
            if before is not None:
                yield "train", before[1]
        else:
            yield "train", document

    def finish(self) -> Iterator[tuple[str, Document]]:
        """The document kept back, if there is one."""
        if self.held is not None:
            yield "train" if self.validated else "validation", self.held[1]
