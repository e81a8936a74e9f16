"""Hugging Face weights, one tensor at a time: safetensors shards written as a stream, and read by name.

The format is an 8-byte length, a JSON header with every tensor's dtype, shape and place, and the bytes. The header only
needs shapes, which are known before any tensor is: so a shard is written tensor by tensor, where the library's own
`save_file` wants the whole shard in memory.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_xact.checkpoints.json_files import read_object

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BLOCK = 16 * 2**20
"""Elements converted at a time, so that casting a large tensor needs no second one."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    file: str
    shapes: dict[str, Shape]


def plan(shapes: dict[str, Shape], dtype: torch.dtype, max_bytes: int) -> list[Shard]:
    """Which tensor goes into which file, in order, each file at most `max_bytes` unless one tensor is larger."""
    groups: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in shapes.items():
        more = prod(shape) * dtype.itemsize
        if groups[-1] and size + more > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += more
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    return [Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", g) for i, g in enumerate(groups, 1)]


def write(
    folder: Path,
    shards: list[Shard],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> dict[str, int]:
    """Writes the shards (and their index), tensors coming in the plan's order; returns a checksum of each one's bytes.

    ValueError: a tensor has a value that is not finite, or becomes infinite in `dtype`.
    """
    stream = iter(tensors)
    checksums: dict[str, int] = {}
    for shard in shards:
        with open(folder / shard.file, "wb") as file:
            file.write(_header(shard.shapes, dtype))
            for name, shape in shard.shapes.items():
                found, tensor = next(stream)
                assert (found, tuple(tensor.shape)) == (name, shape), (found, tensor.shape, name, shape)
                checksum = 0
                for block in _blocks(name, tensor, dtype):
                    file.write(block)
                    checksum = zlib.crc32(block, checksum)
                    progress(len(block))
                checksums[name] = checksum
    if len(shards) > 1:
        places = {name: shard.file for shard in shards for name in shard.shapes}
        total = sum(prod(s) for shard in shards for s in shard.shapes.values())
        index = {"metadata": {"total_parameters": total, "total_size": total * dtype.itemsize}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return checksums


def _header(shapes: dict[str, Shape], dtype: torch.dtype) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(name: str, tensor: Tensor, dtype: torch.dtype):
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK]
        cast = block.to(dtype).contiguous()
        if not torch.isfinite(cast).all():
            why = "is not finite" if not torch.isfinite(block).all() else f"does not fit into {dtype}"
            worst = block[~torch.isfinite(cast)][0].item()
            raise ValueError(f"{name} holds {worst}, which {why}; nothing was exported")
        yield memoryview(cast.view(torch.uint8).numpy())


def verify_checksums(folder: Path, shards: list[Shard], checksums: dict[str, int]) -> None:
    """Reads every tensor back from the disk, not from the cache. ValueError: one is not what was written.

    Plain reads: the library would map each file as private memory, which counts where memory is limited.
    """
    for shard in shards:
        with open(folder / shard.file, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            if {name: tuple(entry["shape"]) for name, entry in header.items()} != shard.shapes:
                raise ValueError(f"{shard.file} does not hold the tensors that were written to it; is the disk sound?")
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                file.seek(8 + length + start)
                checksum, left = 0, end - start
                while left and (block := file.read(min(left, _BLOCK))):
                    checksum, left = zlib.crc32(block, checksum), left - len(block)
                if left or checksum != checksums[name]:
                    raise ValueError(f"{name} in {shard.file} reads back differently than written; is the disk sound?")


def _files_of(index: Path) -> list[str]:
    try:
        return sorted(set(read_object(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} has no weight_map of tensors and files") from None


class Weights:
    """The safetensors files of a folder. ValueError: there are none, or one is damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / INDEX).is_file():
            files = _files_of(folder / INDEX)
            if (folder / SINGLE).is_file() and SINGLE not in files:  # transformers reads this one, vLLM the others
                raise ValueError(f"{folder} holds two models: {SINGLE}, and what {INDEX} names; delete one of them")
        elif (folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} has no safetensors files (other weight formats are not read)")
        self._files = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        for name in files:
            try:
                file = safe_open(folder / name, "pt")
                keys = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{folder / name} cannot be read: {error}") from None
            for key in keys:
                part = file.get_slice(key)
                self._files[key] = file
                self.shapes[key] = tuple(part.get_shape())
                self.dtypes[key] = part.get_dtype()

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def drop_tied_head(self) -> None:
        """Forgets the copy of the embedding that some writers leave there. ValueError: it is none."""
        if "lm_head.weight" not in self.shapes:
            return
        if not torch.equal(self.read("lm_head.weight"), self.read("model.embed_tokens.weight")):
            raise ValueError(
                f"{self.folder}: tie_word_embeddings is true in its config.json, but lm_head.weight is not the "
                "embedding; set it to false if the head is the model's, or delete the tensor"
            )
        del self.shapes["lm_head.weight"]
