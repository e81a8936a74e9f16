"""A checkpoint of either kind as `xact verify` sees it: architecture, tensors under shared names, the model itself."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from megatron_xact.checkpoints import model as models
from megatron_xact.checkpoints import trace
from megatron_xact.checkpoints.architecture import Architecture, family, from_megatron, read_hf
from megatron_xact.checkpoints.mapping import Rule, hf_shapes, megatron_shapes, table
from megatron_xact.checkpoints.megatron_io import open_checkpoint
from megatron_xact.checkpoints.model import Model, Source
from megatron_xact.checkpoints.safetensors_io import Weights


class Side:
    """One of the two checkpoints."""

    def __init__(self, source: Source):
        self.source = source
        if source.kind != "huggingface":
            self.file = open_checkpoint(source.path)
            self.args, self.vocabulary_known = self.file.args, True
            try:
                vocabulary = models.tokenizer_files_of(source, self.args).size
            except ValueError:
                vocabulary, self.vocabulary_known = self.args.padded_vocab_size, False
            self.use(from_megatron(self.args, vocabulary))
        else:
            self.file, self.args, self.vocabulary_known = Weights(source.path), None, True
            self.use(read_hf(source.path)[0])
            if self.architecture.tied:
                self.file.drop_tied_head()
        self.last: tuple[Rule, tuple[Tensor, ...]] | None = None

    def __str__(self) -> str:
        if self.source.kind == "huggingface":
            dtypes = " and ".join(sorted(set(self.file.dtypes.values())))
            return f"{self.source.path} ({self.family.class_name}, {dtypes})"
        return f"{self.source.path} (Megatron, {str(self.file.dtype()).removeprefix('torch.')})"

    def use(self, architecture: Architecture) -> None:
        self.architecture, self.family = architecture, family(architecture)
        self.rules = table(architecture)
        self.places = {
            trace.shared_name(name, architecture): (rule, index)
            for rule in self.rules
            for index, name in enumerate(rule.hf)
        }

    def settle_vocabulary(self, other: Side) -> None:
        """A run whose tokenizer is not here has as many tokens as the other side says."""
        if not self.vocabulary_known and other.vocabulary_known:
            rows = min(other.architecture.vocab_size, self.architecture.padded_vocab_size)
            self.use(replace(self.architecture, vocab_size=rows))

    def names(self) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """(expected, found) shapes by the file's own names."""
        if self.source.kind == "huggingface":
            return hf_shapes(self.rules), self.file.shapes
        return megatron_shapes(self.rules), self.file.shapes(self.rules)

    def read(self, name: str) -> Tensor:
        """A Hugging Face tensor by its shared name, in the file's dtype."""
        rule, index = self.places[name]
        if self.source.kind == "huggingface":
            return self.file.read(rule.hf[index])
        if self.last is None or self.last[0] is not rule:
            self.last = rule, rule.export(*(self.file.read(tensor) for tensor in rule.megatron))
        return self.last[1][index]

    def parameters(self) -> int:
        return sum(prod(shape) for shape in hf_shapes(self.rules).values())

    def load(self, dtypes: dict[str, torch.dtype]) -> Model:
        """The model in fp32, its weights rounded to the dtypes that the comparison of tensors was made in."""
        model = models.load(self.source.path)
        model.vocab_size = min(model.vocab_size, self.architecture.vocab_size)
        tensors = dict(model.module.named_parameters()) | dict(model.module.named_buffers())
        for name, (rule, index) in self.places.items():
            dtype = dtypes.get(name, torch.float32)
            if dtype == torch.float32:
                continue
            own = [rule.hf[index]] if self.source.kind == "huggingface" else [t.name for t in rule.megatron]
            for tensor in (tensors[trace.local_name(key)] for key in own if trace.local_name(key) in tensors):
                tensor.data.copy_(tensor.data.to(dtype))
        return model
