"""Bytes that a real model needs for forward and backward, on a CPU, beside what the plan says.

LayerNorm in most cases: like the fused norms of GPUs it keeps its input, where torch's RMSNorm on a CPU keeps two fp32
tensors. Collectives over a "fake" process group leave their results as they are, which changes no size.
"""

from __future__ import annotations

import contextlib
import io
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_xact.pretraining.config import RunConfig
from megatron_xact.pretraining.planning import dry_run, job, memory

TP2 = ("--tensor-model-parallel-size", "2")
GROUPED = ("--group-query-attention", "--num-query-groups", "2")
FULL = ("--recompute-granularity", "full", "--recompute-method")
# name -> (Megatron flags, --set)
CASES = {
    "xielu": ((), ()),
    "fp32": ((), ("runtime.bf16=false",)),
    "gated": ((), ("activation.name=swiglu",)),
    "tensor parallel": (TP2, ()),
    "sequence parallel": ((*TP2, "--sequence-parallel"), ()),
    "grouped queries, qk-norm": ((*GROUPED, "--qk-layernorm"), ()),
    "mlp again": (("--recompute-granularity", "selective", "--recompute-modules", "mlp"), ()),
    "all again": ((*FULL, "uniform", "--recompute-num-layers", "1"), ()),
    "two of three again": ((*FULL, "block", "--recompute-num-layers", "2"), ()),
    "large vocabulary": (("--padded-vocab-size", "2048"), ()),
    "RMSNorm": ((*GROUPED, "--qk-layernorm"), ('model.normalization="RMSNorm"',)),
}


@dataclass(frozen=True)
class Kept:
    """Bytes, the model's parameters left out."""

    held: int  # by autograd, after forward
    held_planned: float
    peak: int  # alive at once during forward and backward
    peak_planned: float


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it hold at once, each storage counted once: torch.cuda's maximum."""

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._alive = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.most = max(self.most, self._alive)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self._alive += storage.nbytes()
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)


def of(config: RunConfig) -> Kept:
    planned = job.read(config, 2, 8)
    activations, ends, passing = memory.of_pass(planned, 0)
    ends -= memory.batch_bytes(planned)
    if planned.args.normalization == "RMSNorm":
        activations = planned.shape.layers * sum(memory.layer_activations(planned, norm=8).values())
        ends = memory.head_activations(planned, norm=8)
    softmax = 4 * planned.shape.sequence * planned.layout.micro_batch * planned.shape.vocab / planned.layout.tensor
    args = dry_run.validated(planned, 0)
    with dry_run.process_groups(args), contextlib.redirect_stdout(io.StringIO()):
        model = _model(planned, args)
        held, peak = _held(model, args), _peak(model, args)
    return Kept(held, activations + ends + softmax, peak, activations + ends + passing)


def _model(planned: job.Job, args) -> torch.nn.Module:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    model_parallel_cuda_manual_seed(1)
    (model,) = dry_run.build(planned, args, "cpu")
    for parameter in model.parameters():  # as Megatron's DDP, which adds gradients to buffers of its own
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return Float16Module(model.config, model) if planned.sixteen_bit else model


def _forward(model: torch.nn.Module, args) -> torch.Tensor:
    tokens = torch.zeros(args.micro_batch_size, args.seq_length, dtype=torch.long)
    return model(tokens, torch.arange(args.seq_length).expand_as(tokens), None, labels=tokens)


def _held(model: torch.nn.Module, args) -> int:
    """By the storages that autograd keeps, each once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward(model, args)
    return sum(storage.nbytes() for storage in storages.values())


def _peak(model: torch.nn.Module, args) -> int:
    with Peak(model.parameters()) as peak:
        _forward(model, args).float().sum().backward()
    return peak.most
