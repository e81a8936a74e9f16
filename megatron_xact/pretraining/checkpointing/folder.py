"""A folder of Megatron's checkpoints: the tracker file, the iter_* folders, and whether one of them is whole.

Megatron writes a checkpoint's shards, then their index `.metadata`, then `metadata.json`, and only then the step's
number into the tracker, so the tracker names whole checkpoints. But it empties the tracker before it writes the number:
a kill in between leaves it empty.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
_LAST_WRITTEN = (".metadata", "metadata.json")  # of a sharded (torch_dist) checkpoint


def name_of(step: int) -> str:
    return f"iter_{step:07d}"


def saved_steps(folder: Path, prefix: str = "") -> list[int]:
    """The steps that have an iter_* folder (or with a `prefix` before that), whole or not, in rising order."""
    names = (path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}iter_*") if path.is_dir())
    return sorted(int(match[1]) for match in map(re.compile(r"iter_(\d{7,})").fullmatch, names) if match)


def tracked(folder: Path) -> int | str | None:
    """What the tracker says: a step, or "release"; None: there is no tracker. ValueError: neither of them."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    word = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if word == "release":
        return word
    if not word:
        raise ValueError("is empty, as when writing it was cut off")
    if not (word.isascii() and word.isdecimal()):
        raise ValueError(f"is corrupt: {word[:40]!r} is no iteration")
    return int(word)


def is_cut_off(checkpoint: Path) -> bool:
    """Whether saving it was cut off before its last files: no one can load it, and it cannot be mended."""
    names = {path.name for path in checkpoint.iterdir()}
    sharded = not names or any(name.endswith(".distcp") or name in _LAST_WRITTEN for name in names)
    return sharded and not names.issuperset(_LAST_WRITTEN)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by its index; None: all the bytes that it promises are there.

    The shards are not read. Checkpoints that are not sharded have no index, and pass if they hold anything.
    """
    if not checkpoint.is_dir() or not any(checkpoint.iterdir()):
        return "is missing or empty"
    if not (checkpoint / "metadata.json").is_file() and not any(checkpoint.glob("*.distcp")):
        return None
    for name in reversed(_LAST_WRITTEN):
        if not (checkpoint / name).is_file():
            return f"is damaged: no {name}, as when saving was cut off"
    try:
        json.loads((checkpoint / "metadata.json").read_bytes())
    except ValueError:
        return "is damaged: metadata.json cannot be read"
    try:
        needed = _sizes(checkpoint)
    except Exception as error:  # unpickling damaged bytes can raise anything
        return f"is damaged: .metadata cannot be read ({type(error).__name__})"
    for name, size in needed.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            return f"is damaged: {name} has {found} of at least {size} bytes"
    return None


def _sizes(checkpoint: Path) -> dict[str, int]:
    """The bytes that every shard must have at least, by the index."""
    from torch.distributed.checkpoint import FileSystemReader

    needed: dict[str, int] = {}
    for shard in FileSystemReader(checkpoint).read_metadata().storage_data.values():
        needed[shard.relative_path] = max(needed.get(shard.relative_path, 0), shard.offset + shard.length)
    return needed


def check_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The checkpoint of this step (None: the one that the tracker names), found whole; no other will do.

    FileNotFoundError: it is not there. ValueError: the tracker file, the shards' index or a shard is damaged.
    """
    others = ", ".join(map(name_of, saved_steps(folder))) or "none"
    way_out = f"write the number of a whole one into {folder / TRACKER}; there are: {others}"
    try:
        word = step if step is not None else tracked(folder)
    except ValueError as error:
        raise ValueError(f"{folder / TRACKER} {error}; {way_out}") from None
    if word is None:
        raise FileNotFoundError(f"no checkpoint in {folder} (no {TRACKER})")
    checkpoint = folder / (word if isinstance(word, str) else name_of(word))
    problem = damage(checkpoint)
    if problem is not None:
        kind = ValueError if checkpoint.is_dir() and any(checkpoint.iterdir()) else FileNotFoundError
        raise kind(f"checkpoint {checkpoint} {problem}; {way_out}")
    return checkpoint
