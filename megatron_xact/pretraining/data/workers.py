"""Records in, token ids out, in the same order, by any number of processes.

Instead of a pool from the library: each worker has a pipe of its own and no end of another's, so that all of them
end when this process does, however it does; and no more chunks are under way than memory should hold.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from megatron_xact.pretraining.data import documents, indexed
from megatron_xact.pretraining.data import tokenizer as bpe
from megatron_xact.pretraining.data.corpus import Position, Source
from megatron_xact.pretraining.data.documents import Record

CHUNK_BYTES = 1 << 20  # handed to a worker at once: about half a second of its work
CHUNK_RECORDS = 4096
AHEAD = 3  # chunks under way or waiting for their turn, per worker


class Chunk(NamedTuple):
    records: list[Record]
    end: Position  # where reading goes on after them


class Document(NamedTuple):
    place: int  # see documents.place_of
    num_bytes: int  # of UTF-8
    ids: np.ndarray  # [tokens]
    replaced: bool = False  # holds U+FFFD, which takes the place of what is not UTF-8


@dataclass(frozen=True)
class Encoding:
    """What makes a document of a record; the same in every process."""

    tokenizer: Path
    append_eod: bool
    text_key: str
    seed: int

    def open(self) -> Callable[[list[Record]], list[Document | str]]:
        """A function: records -> for each a Document, or the reason why it is left out."""
        encoder = bpe.load(self.tokenizer)
        dtype = indexed.dtype_for(encoder.vocab_size)

        def encode(records: list[Record]) -> list[Document | str]:
            found = []
            for record in records:
                content = documents.usable(documents.text_of(record, self.text_key))
                if isinstance(content, str):
                    found.append(content)
                    continue
                text, data = content
                ids = np.array(encoder.encode(text, self.append_eod), dtype=dtype)
                place, replaced = documents.place_of(data, self.seed), documents.REPLACEMENT in text
                found.append(Document(place, len(data), ids, replaced))
            return found

        return encode


def chunks(source: Source, position: Position | None) -> Iterator[Chunk]:
    """The source's records from a position on. Where one chunk ends and the next begins changes no token."""
    records, size = [], 0
    for record, after in source.read(position):
        records.append(record)
        size += len(record.content or "")
        if size >= CHUNK_BYTES or len(records) >= CHUNK_RECORDS:
            yield Chunk(records, after)
            records, size = [], 0
    if records:
        yield Chunk(records, after)


def encode(
    source: Source, position: Position | None, encoding: Encoding, workers: int
) -> Iterator[tuple[list[Document | str], Position]]:
    """(documents or reasons, position after them), in the order of the source. Close it to stop the workers.

    An error in a record, or of the source, is raised when its turn has come, whatever was read ahead.
    """
    if workers == 1:
        work = encoding.open()
        for chunk in chunks(source, position):
            yield work(chunk.records), chunk.end
        return
    with _Workers(encoding, workers) as pool:
        yield from pool.run(chunks(source, position))


class _Workers:
    def __init__(self, encoding: Encoding, number: int) -> None:
        context = multiprocessing.get_context("spawn")  # forked ones would inherit the pipes of those before
        self.processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
        self.limit = AHEAD * number
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, encoding), daemon=True)
            process.start()
            theirs.close()
            self.processes[ours] = process

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self.processes.items():
            connection.close()
            process.terminate()
        for process in self.processes.values():
            process.join()

    def run(self, source: Iterator[Chunk]) -> Iterator[tuple[list[Document | str], Position]]:
        idle, busy = list(self.processes), {}  # busy: connection -> number of its chunk
        ends: dict[int, Position] = {}
        answers: dict[int, list[Document | str] | Exception] = {}
        handed_out = turn = 0
        more = True
        while True:
            while more and idle and handed_out - turn < self.limit:
                try:
                    chunk = next(source, None)
                except (ValueError, OSError) as error:
                    answers[handed_out], more = error, False
                    break
                if chunk is None:
                    more = False
                    break
                connection = idle.pop()
                self._send(connection, chunk.records)
                busy[connection], ends[handed_out] = handed_out, chunk.end
                handed_out += 1
            if turn in answers:
                answer = answers.pop(turn)
                if isinstance(answer, Exception):
                    raise answer
                yield answer, ends.pop(turn)
                turn += 1
            elif busy:
                for connection in wait(list(busy)):
                    answers[busy.pop(connection)] = self._receive(connection)
                    idle.append(connection)
            else:
                return

    def _send(self, connection: Connection, records: list[Record]) -> None:
        try:
            connection.send(records)
        except OSError:
            self._ended(connection)

    def _receive(self, connection: Connection) -> list[Document | str] | Exception:
        try:
            return connection.recv()
        except (EOFError, OSError):
            self._ended(connection)

    def _ended(self, connection: Connection) -> NoReturn:
        process = self.processes[connection]
        process.join()
        raise ChildProcessError(
            f"a worker process ended with exit code {process.exitcode} (-9: killed, mostly for want of memory; "
            "fewer --workers need less); the same command goes on from where it was"
        ) from None


def _work(connection: Connection, encoding: Encoding) -> None:
    """One worker's life; it ends when the other end of its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or each worker would have a thread for every core
    try:
        encode = encoding.open()
        while True:
            records = connection.recv()
            try:
                answer = encode(records)
            except ValueError as error:
                answer = error
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
