"""What every module of a model computes on a text, under names that both kinds of model share.

The modules to watch, and how Megatron's fused outputs come apart, follow from the conversion table: rows of a weight
are features of an output, so the rule that takes a weight apart takes its output apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_xact.checkpoints.architecture import Architecture, family
from megatron_xact.checkpoints.mapping import LOCAL_NAMES, Rule, table
from megatron_xact.checkpoints.model import Model

NOISE = 1e-5
"""Differences below this part of a tensor's largest value are fp32 rounding (measured: 1e-7 to 2e-6)."""
JUMP = 10.0
"""Rounding grows slowly through a model; a module in which it grows this much at once is at fault."""
_INPUTS = {"o_proj": "attention", "down": "act_fn"}  # what feeds a row-parallel weight is a result worth a name


@dataclass(frozen=True)
class Difference:
    """Of two models in one module (layer None: outside the layers): largest absolute and relative difference."""

    layer: int | None
    module: str
    absolute: float
    relative: float

    def __str__(self) -> str:
        where = f"layer {self.layer}, {self.module}" if self.layer is not None else self.module
        return f"{where} (largest difference {self.absolute:.3g}, {self.relative:.2g} of its largest value)"


def shared_name(name: str, a: Architecture) -> str:
    """A Hugging Face name in words that are the same for all families: model.layers.0.mlp.c_fc -> layers.0.mlp.up."""
    words = {own: role for role, own in family(a).names.items()}
    return ".".join(words.get(part, part) for part in name.removeprefix("model.").split("."))


@torch.no_grad()
def outputs(model: Model, a: Architecture, tokens: Tensor) -> dict[str, Tensor]:
    """tokens: [1, s] -> {name: [s, features]}, fp32 on the CPU, in the order of the computation; the logits last.

    s must not be the number of heads: some families put heads before positions, and only the size tells.
    """
    size = tokens.shape[1]
    assert size not in (a.num_heads, a.num_groups)
    found: dict[str, Tensor] = {}
    order: list[str] = []
    hooks = []

    def watch(module: str, names: list[str], split: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        def output(_, args, out) -> None:
            if isinstance(out, tuple):  # Megatron's linear layers leave the bias to whoever comes next
                out = out[0] if out[1] is None else out[0] + out[1]
            found.update(zip(names, split(_by_token(out, size)), strict=True))

        hooks.append(model.module.get_submodule(module).register_forward_hook(output))

    def watch_input(module: str, name: str) -> None:
        def before(_, args) -> None:
            found[name] = _by_token(args[0], size)

        hooks.append(model.module.get_submodule(module).register_forward_pre_hook(before))

    for rule in table(a):
        if not rule.megatron or not rule.megatron[0].name.endswith("weight"):
            continue
        names = [shared_name(name.removesuffix(".weight"), a) for name in rule.hf]
        if model.source.kind == "megatron":
            modules = [local_name(rule.megatron[0].name).removesuffix(".weight")]
        else:
            modules = [name.removesuffix(".weight") for name in rule.hf]
        if rule.megatron[0].split == 1:
            stem, _, last = names[0].rpartition(".")
            order.append(f"{stem}.{_INPUTS[last]}")
            watch_input(modules[0], order[-1])
        order += names
        if model.source.kind == "megatron":
            watch(modules[0], names, partial(_take_apart, rule))
        else:
            for module, name in zip(modules, names, strict=True):
                watch(module, [name], lambda out: (out,))
    try:
        logits = model.logits(tokens)[0].cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[name] for name in order if name in found} | {"logits": logits}


def rotary_frequencies(model: Model) -> Tensor | None:
    """[head_dim / 2], radians per position. A wrong low one would show in logits only after thousands of tokens."""
    megatron = getattr(model.module, "rotary_pos_emb", None)
    hugging_face = getattr(getattr(model.module, "model", None), "rotary_emb", None)
    module = megatron if model.source.kind == "megatron" else hugging_face
    return module.inv_freq.detach().float().cpu() if module is not None else None


def local_name(name: str) -> str:
    """A tensor's name in the Megatron model that `load_megatron` builds."""
    for saved, local in LOCAL_NAMES.items():
        name = name.replace(saved, local)
    return name


def first_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> Difference | None:
    """The first module, in the order of `a`, whose outputs differ by more than the rounding before it explains."""
    worst = 0.0
    for name, x in a.items():
        y = b.get(name)
        if y is None:
            continue
        if x.shape != y.shape and name != "logits":
            return _difference(name, float("inf"), float("inf"))
        width = min(x.shape[-1], y.shape[-1])  # logits: Megatron's may have padding
        absolute = float((x[..., :width] - y[..., :width]).abs().max())
        relative = absolute / max(float(x.abs().max()), 1e-30)
        if not relative <= max(NOISE, JUMP * worst):  # not <=: nan is a difference
            return _difference(name, absolute, relative)
        worst = max(worst, relative)
    return None


def _difference(name: str, absolute: float, relative: float) -> Difference:
    parts = name.split(".")
    if parts[0] == "layers":
        return Difference(int(parts[1]), ".".join(parts[2:]), absolute, relative)
    return Difference(None, name, absolute, relative)


def _by_token(x: Tensor, size: int) -> Tensor:
    """[s, 1, ...], [1, s, ...] or [1, heads, s, d] -> [s, features]."""
    if x.dim() == 4 and x.shape[0] == 1 and x.shape[1] != size:
        x = x.transpose(1, 2)
    return x.detach().float().cpu().reshape(size, -1).clone()


def _take_apart(rule: Rule, out: Tensor) -> tuple[Tensor, ...]:
    """A Megatron output [s, rows of the weight] -> the outputs that the Hugging Face modules have."""
    tensor = rule.megatron[0]
    if len(tensor.shape) == 1 or tensor.name.startswith("embedding."):
        return (out,)
    return tuple(part.T for part in rule.export(out.T))
