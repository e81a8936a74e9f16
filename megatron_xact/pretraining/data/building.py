"""The hidden folder in which data grows until it is whole: OUT/.building, owned by one process at a time.

Its journal, `state.json`, is replaced from time to time by one that says where reading goes on and how much of each
file is then right. What a stopped run wrote after its last journal is cut off when the next one opens the files: the
bytes at the end are the same as if nothing had happened.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_xact.pretraining.data import manifest
from megatron_xact.pretraining.data.corpus import Position
from megatron_xact.pretraining.data.indexed import Totals
from megatron_xact.whole import write_text

FOLDER, JOURNAL, LOCK = ".building", "state.json", "lock"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (*NO_ROOM, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # as on Lustre mounted without flock


@dataclass
class State:
    """How far a build has come. JSON."""

    settings: dict[str, object]
    position: Position | None = None
    train: Totals = field(default_factory=Totals)
    validation: Totals = field(default_factory=Totals)
    bytes: int = 0  # of text taken, the document kept back included
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    replaced: int = 0  # documents taken that hold U+FFFD
    held: tuple | None = None  # see documents.Splitter
    validated: bool = False
    seconds: float = 0.0  # of encoding


@contextmanager
def opened(out: Path) -> Iterator[Path]:
    """The folder, locked. When left, it stays if there is a journal to go on from, and no ValueError was raised."""
    existed, folder = out.exists(), out / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            try:
                yield folder
            except ValueError:  # of the data or the settings: going on would meet it again
                clear(folder)
                raise
            finally:
                if not (folder / JOURNAL).exists():
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        kept = os.path.exists(folder / JOURNAL)
        advice = "make room; the same command goes on from where it was" if kept else "nothing was left there"
        raise ValueError(f"cannot write below {out}: {error.strerror}; {advice}") from error
    finally:
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held until left, or until the process ends."""
    path = folder / LOCK
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process is building in {folder}; wait for it, or name another --out"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            # The owner before may have removed the file between our opening and locking it.
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                folder.mkdir(parents=True, exist_ok=True)
                continue
            yield
            return


def clear(folder: Path) -> None:
    """Remove all but the lock, the journal first."""
    (folder / JOURNAL).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def save(folder: Path, state: State) -> None:
    """Replace the journal. What it speaks of must be on the disk already."""
    write_text(folder / JOURNAL, json.dumps(asdict(state)))


def load(folder: Path) -> State | None:
    """The journal of a stopped run; None if there is none. ValueError: another version of ours wrote it."""
    try:
        record = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        record |= {split: Totals(**record[split]) for split in ("train", "validation")}
        return State(**record)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{folder / JOURNAL} is of another version") from None


def is_whole(folder: Path) -> bool:
    """Whether all that is left to do is `move_into_place`."""
    return (folder / manifest.NAME).exists()


def move_into_place(folder: Path, out: Path) -> None:
    """Replace what is in `out` by what is in `folder`. The old manifest goes first and the new one comes last.

    Interrupted, it can be called again: what is no longer in `folder` is in place.
    """
    (out / manifest.NAME).unlink(missing_ok=True)
    for prefix in (manifest.TRAIN, manifest.VALIDATION):
        # Megatron keeps sample orders in a folder named as the prefix, known by their path, not by content.
        shutil.rmtree(out / prefix / "cache", ignore_errors=True)
        for suffix in (".bin", ".idx"):
            if (folder / (prefix + suffix)).exists():
                os.replace(folder / (prefix + suffix), out / (prefix + suffix))
    if (folder / manifest.TOKENIZER).exists():
        shutil.rmtree(out / manifest.TOKENIZER, ignore_errors=True)
        os.replace(folder / manifest.TOKENIZER, out / manifest.TOKENIZER)
    os.replace(folder / manifest.NAME, out / manifest.NAME)
    (folder / JOURNAL).unlink(missing_ok=True)
