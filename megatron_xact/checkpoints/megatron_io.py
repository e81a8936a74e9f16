"""Megatron checkpoints, one tensor at a time: distributed ones (torch_dist) read and written, legacy ones read.

Instead of building a model and loading into it, tensors are found through the checkpoint's index (`.metadata`) and read
alone, so memory is that of the tensor in hand; optimizer states are never touched. No process group and no GPU.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from megatron_xact.checkpoints.mapping import LOCAL_NAMES, MegatronTensor, Rule
from megatron_xact.pretraining.checkpointing import checksums
from megatron_xact.pretraining.checkpointing.folder import TRACKER, check_checkpoint

# What a checkpoint holds besides the model.
_NOT_THE_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|chained_\d+\.|rng_state|rerun_state|opt_param_scheduler")
_LAYERS = "decoder.layers."
_CHUNK = re.compile(r"model\d*")  # of a rank with several virtual pipeline stages: model0, model1, ...


def find(folder: Path, step: int | None = None) -> Path:
    """The iteration's own folder: `folder` itself, or what its tracker file (or `step`) names.

    FileNotFoundError: there is none. ValueError: it is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such checkpoint folder: {folder}")
    if (folder / ".metadata").is_file() or any(folder.glob("mp_rank_*")):
        if step is not None:
            raise ValueError(f"{folder} is one checkpoint; --step chooses among those of the folder above it")
        return folder
    if step is None and not (folder / TRACKER).is_file():
        raise FileNotFoundError(f"no checkpoint in {folder} (no {TRACKER}, no .metadata)")
    return check_checkpoint(folder, step)


def open_undamaged(folder: Path, step: int | None = None, trust_pickle: bool = False) -> Checkpoint:
    """As `open_checkpoint`, after reading all files that have checksums. ValueError: one is not what was saved."""
    found = find(Path(folder), step)
    if checksums.are_there(found) and (how := checksums.compare(found)):
        raise ValueError(f"checkpoint {found} {how}; take another one, --step names it")
    return open_checkpoint(found, trust_pickle=trust_pickle)


def open_checkpoint(folder: Path, step: int | None = None, trust_pickle: bool = False) -> Checkpoint:
    """Whichever kind is there."""
    found = find(Path(folder), step)
    if any(found.glob("mp_rank_*")):
        return LegacyCheckpoint(found, trust_pickle)
    return DistributedCheckpoint(found)


class DistributedCheckpoint:
    """A torch_dist checkpoint, whatever tensor, pipeline and data parallelism saved it."""

    def __init__(self, folder: Path):
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.core import CheckpointingException

        self.folder = folder
        try:
            self._metadata = FileSystemReader(folder).read_metadata()
            common = dist_checkpointing.load_common_state_dict(str(folder))
        except (CheckpointingException, pickle.UnpicklingError, EOFError, KeyError) as error:
            raise ValueError(f"checkpoint {folder} cannot be read: {error}") from error
        self.iteration: int = common.get("iteration", 0)
        if common.get("args") is None and (folder / "run_config.yaml").is_file():
            raise ValueError(f"checkpoint {folder} is Megatron-Bridge's, which only Megatron-Bridge can read yet")
        self.args = _arguments_of(common, folder)

    def shapes(self, rules: Iterable[Rule] = ()) -> dict[str, tuple[int, ...]]:
        """Of every tensor of the model, by name, layers apart."""
        found = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or _NOT_THE_MODEL.match(key):
                continue
            for name, layer in self._names(key, entry):
                shape = tuple(entry.size if layer is None else entry.size[1:])
                found[name] = shape or (1,)  # alphas of old forks are stacked as [L], not [L, 1]
        return found

    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._metadata.state_dict_metadata["embedding.word_embeddings.weight"].properties.dtype

    def read(self, tensor: MegatronTensor) -> Tensor:
        """The whole tensor, put together from what the ranks saved. KeyError: it is not there."""
        key, layer = _stacked(tensor.name)
        if key not in self._metadata.state_dict_metadata:
            key, layer = tensor.name, None
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        chunks = [c for c in entry.chunks if layer is None or c.offsets[0] <= layer < c.offsets[0] + c.sizes[0]]
        if len(chunks) == 1 and (layer is None or chunks[0].sizes[0] == 1):
            return self._chunk(key, chunks[0]).reshape(tensor.shape)
        whole = torch.empty(entry.size if layer is None else (1, *entry.size[1:]), dtype=entry.properties.dtype)
        for chunk in chunks:
            data, offsets = self._chunk(key, chunk), list(chunk.offsets)
            if layer is not None:
                data, offsets[0] = data[layer - offsets[0] : layer - offsets[0] + 1], 0
            region = tuple(slice(o, o + n) for o, n in zip(offsets, data.shape, strict=True))
            whole[region] = data
        return whole.reshape(tensor.shape)

    @staticmethod
    def _names(key: str, entry: TensorStorageMetadata) -> Iterator[tuple[str, int | None]]:
        if key.startswith(_LAYERS) and not key[len(_LAYERS)].isdigit():
            for layer in range(entry.size[0]):
                yield f"{_LAYERS}{layer}.{key[len(_LAYERS) :]}", layer
        else:
            yield key, None

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        with open(self.folder / info.relative_path, "rb") as file:
            return torch.load(_Part(file, info.offset, info.length), map_location="cpu", weights_only=True)


class _Part(io.RawIOBase):
    """A part of a file as a file: torch.load then reads the tensor where it lies, without a copy of the bytes."""

    def __init__(self, file: io.BufferedReader, start: int, length: int):
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.length - self.at)]
        self.file.seek(self.start + self.at)
        count = self.file.readinto(view)
        self.at += count
        return count

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.at)
        self.file.seek(self.start + self.at)
        data = self.file.read(left if size < 0 else min(size, left))
        self.at += len(data)
        return data


def _stacked(name: str) -> tuple[str, int | None]:
    """decoder.layers.3.mlp... -> (decoder.layers.mlp..., 3)."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    return (_LAYERS + match[2], int(match[1])) if match else (name, None)


class LegacyCheckpoint:
    """Megatron's `torch` format: one file per tensor- and pipeline-parallel rank, in mp_rank_TT or mp_rank_TT_PPP.

    The format of older forks. Every rank wrote its own copy of what is replicated, so here copies can disagree:
    `replicas` gives them all. Files are unpickled with torch's safe subset unless `trust_pickle`.
    """

    def __init__(self, folder: Path, trust_pickle: bool = False):
        import megatron.training.checkpointing  # noqa: F401  (registers what Megatron's arguments may hold as safe)

        self.folder = folder
        ranks: dict[tuple[int, int], dict] = {}
        for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt")):
            rank = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.parent.name)
            if rank is None:
                raise ValueError(f"{path.parent} is not named as a rank's folder, mp_rank_TT or mp_rank_TT_PPP")
            ranks[int(rank[1]), int(rank[2] or 0)] = _load_rank(path, trust_pickle)
        if not ranks:
            raise ValueError(f"{folder} has mp_rank folders but no model_optim_rng.pt in them")
        self.tp, self.pp = (1 + max(rank[axis] for rank in ranks) for axis in (0, 1))
        if len(ranks) != self.tp * self.pp:
            raise ValueError(f"{folder} has the files of {len(ranks)} ranks, not of {self.tp} x {self.pp}")
        self.args = _arguments_of(ranks[0, 0], folder)
        self.iteration: int = ranks[0, 0].get("iteration", 0)
        self._tensors = [self._of_tp_rank({pp: ranks[tp, pp] for pp in range(self.pp)}) for tp in range(self.tp)]
        shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in self._tensors]
        for tp, found in enumerate(shapes):
            if differing := sorted(name for name, _ in found.items() ^ shapes[0].items()):
                raise ValueError(f"{folder}: tensor-parallel ranks 0 and {tp} differ in whether they have, or in the "
                                 f"shape of, {differing[0]}")  # fmt: skip

    def _of_tp_rank(self, stages: dict[int, dict]) -> dict[str, Tensor]:
        """Every pipeline stage's (and virtual stage's) tensors, layers renumbered from the first stage on."""
        chunks = [key for key in stages[0] if _CHUNK.fullmatch(key)]
        chunks.sort(key=lambda key: int(key.removeprefix("model") or 0))  # model10 comes after model9
        per_chunk = self.args.num_layers // (self.pp * len(chunks))
        found = {}
        for pp, state in stages.items():
            for virtual, key in enumerate(chunks):
                first = (virtual * self.pp + pp) * per_chunk
                for name, tensor in state[key].items():
                    if not isinstance(tensor, Tensor) or name.endswith("_extra_state"):
                        continue
                    for ours, local in LOCAL_NAMES.items():
                        name = name.replace(local, ours)
                    base, layer = _stacked(name.removeprefix("module."))
                    if layer is not None:
                        base = f"{_LAYERS}{layer + first}.{base[len(_LAYERS) :]}"
                    found[base] = tensor
        if not getattr(self.args, "untie_embeddings_and_output_weights", False):
            found.pop("output_layer.weight", None)  # the last stage's copy of the embedding
        return found

    def shapes(self, rules: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
        """Of the whole tensors, by name; `rules` tell how they are split."""
        splits = {t.name: t.split for rule in rules for t in rule.megatron}
        found = {}
        for name, tensor in self._tensors[0].items():
            shape, split = list(tensor.shape) or [1], splits.get(name)
            if split is not None:
                shape[0 if split == "gated" else split] *= self.tp
            found[name] = tuple(shape)
        return found

    def dtype(self) -> torch.dtype:
        return self._tensors[0]["embedding.word_embeddings.weight"].dtype

    def replicas(self, tensor: MegatronTensor) -> list[Tensor]:
        """Every tensor-parallel rank's copy or part."""
        return [rank[tensor.name] for rank in self._tensors]

    def read(self, tensor: MegatronTensor) -> Tensor:
        """The whole tensor. ValueError: the ranks' copies of a replicated one differ."""
        parts = self.replicas(tensor)
        if tensor.split is None:
            if any(not torch.equal(part, parts[0]) for part in parts):
                raise ValueError(f"{self.folder}: tensor-parallel ranks hold different copies of {tensor.name}")
            return parts[0].reshape(tensor.shape)
        if tensor.split == "gated":
            halves = [part.chunk(2) for part in parts]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(parts, dim=tensor.split)


Checkpoint = DistributedCheckpoint | LegacyCheckpoint


def _load_rank(path: Path, trust_pickle: bool) -> dict:
    """ValueError: it cannot be read, holds what is not unpickled untrusted, or is not what Megatron writes."""
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        what = next((line for line in str(error).splitlines() if "GLOBAL" in line), "unknown classes").strip()
        raise ValueError(
            f"{path} holds more than tensors and plain arguments ({what}); "
            "if you trust where it came from, --trust-pickle loads it anyway"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or not any(_CHUNK.fullmatch(str(key)) for key in state):
        raise ValueError(f"{path} holds no model")
    return state


def _arguments_of(state: dict, folder: Path) -> Namespace:
    if not hasattr(state.get("args"), "num_layers"):
        raise ValueError(f"checkpoint {folder} holds no arguments of Megatron's; nothing says what model it is")
    return state["args"]


# Writing

# Objects that layers load besides tensors (TransformerEngine's FP8 state; nothing elsewhere). A checkpoint that lacks
# one cannot be loaded, one that has more can: so these are the ones of either layer implementation.
_EXTRA_STATES = (
    "self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj",
    "self_attention.q_layernorm", "self_attention.k_layernorm", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip


def write(
    folder: Path,
    tensors: list[MegatronTensor],
    dtypes: dict[str, torch.dtype],
    produce: Callable[[MegatronTensor], Tensor],
    args: Namespace,
) -> None:
    """A torch_dist checkpoint of model weights in `folder`, which any TP/PP can load. `produce` is called per tensor,
    in order, while writing: memory is that of one tensor (and of the outer ones, which torch's writer keeps)."""
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    objects = {"common_state/shard_0_1": common, "decoder.final_layernorm._extra_state/shard_0_1": None}
    layers = args.num_layers
    for i in range(layers):
        objects |= {f"{_LAYERS}{name}._extra_state/shard_{i}_{layers}": None for name in _EXTRA_STATES}
    try:
        torch.distributed.checkpoint.save(
            {},
            storage_writer=FileSystemWriter(folder, overwrite=False),
            planner=_Planner(tensors, dtypes, layers, objects, produce),
            no_dist=True,
        )
    except CheckpointException as error:  # torch wraps all that is raised inside, Ctrl-C too
        cause, _ = error.failures[0]
        raise cause from None
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend), encoding="utf-8")


class _Planner(SavePlanner):
    """Tells torch's writer what there is to write, and hands each tensor over when its turn comes."""

    def __init__(self, tensors, dtypes, layers: int, objects: dict[str, object], produce):
        self.objects, self.produce = objects, produce
        self.sources: dict[MetadataIndex, MegatronTensor] = {}
        self.items: list[WriteItem] = []
        self.entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name in objects:
            self.items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
            self.entries[name] = BytesStorageMetadata()
        for t in tensors:
            key, layer = _stacked(t.name)
            stack = () if layer is None else (layers,)
            chunk = ChunkStorageMetadata(
                torch.Size(([] if layer is None else [layer]) + [0] * len(t.shape)),
                torch.Size(([] if layer is None else [1]) + list(t.shape)),
            )
            properties, size = TensorProperties(dtype=dtypes[t.name]), torch.Size((*stack, *t.shape))
            entry = self.entries.setdefault(key, TensorStorageMetadata(properties, size, []))
            entry.chunks.append(chunk)
            index = MetadataIndex(key, chunk.offsets)
            self.sources[index] = t
            self.items.append(WriteItem(index, WriteItemType.SHARD, None, TensorWriteData(chunk, properties, size)))

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self.items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata(self.entries)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([self.objects[write_item.index.fqn]], data)
            data.seek(0)
            return data
        tensor = self.produce(self.sources[write_item.index])
        assert tensor.dtype == write_item.tensor_data.properties.dtype, write_item.index
        return tensor.reshape(write_item.tensor_data.chunk.sizes).contiguous()
