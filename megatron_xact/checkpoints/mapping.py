"""The one table between Megatron's tensors and Hugging Face's, in both directions.

`table(architecture)` is the whole correspondence for one model: a list of `Rule`s, each a group of Megatron tensors, a
group of Hugging Face tensors, and the two functions that take one to the other. Everything that moves weights, checks
for missing ones or compares models walks this list; there is no other.

Shapes: L layers, H hidden, F ffn, N query heads, G key-value heads, D head_dim, V vocabulary, P padded vocabulary.
Megatron names are those of a distributed checkpoint, one layer at a time (in the file, layers are stacked: [L, ...]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.checkpoints.architecture import HF_XIELU_EPS, Architecture, Family, family

# Checkpoint name -> name in a model built from the local layer spec (with TransformerEngine they are the same).
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class MegatronTensor:
    """A tensor of the whole model. `split`: how tensor-parallel ranks share it: the axis; None: each has all of it;
    "gated": along axis 0, each rank with its part of the gate and then its part of the rest."""

    name: str
    shape: tuple[int, ...]
    split: int | str | None = None


@dataclass(frozen=True)
class Rule:
    """`export` takes the Megatron tensors, in order, to the Hugging Face tensors; `restore` is its inverse.

    Both are exact: they reorder, cut and copy, and compute nothing (xIELU's fixed parameters excepted).
    """

    layer: int | None
    """None: outside the layers."""
    megatron: tuple[MegatronTensor, ...]
    hf: tuple[str, ...]
    export: Callable[..., tuple[Tensor, ...]]
    restore: Callable[..., tuple[Tensor, ...]]
    activation: bool = False
    """Holds an activation's parameters: fp32 in Megatron whatever the model's dtype."""

    @property
    def hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(t.shape) for t in self.export(*(torch.empty(t.shape, device="meta") for t in self.megatron)))


def table(a: Architecture) -> list[Rule]:
    """Every tensor of the model, in the order of the computation."""
    f = family(a)
    rules = [_vocabulary(a, "embedding.word_embeddings.weight", "model.embed_tokens.weight")]
    for i in range(a.num_layers):
        rules += _layer(a, f, i)
    rules += _norm(a, None, "decoder.final_layernorm.", "model.norm.", a.hidden_size)
    if not a.tied:
        rules.append(_vocabulary(a, "output_layer.weight", "lm_head.weight"))
    return rules


def _layer(a: Architecture, f: Family, i: int) -> list[Rule]:
    m, h = f"decoder.layers.{i}.", f"model.layers.{i}."
    H, F, heads = a.hidden_size, a.ffn_hidden_size, a.num_heads * a.head_dim  # noqa: N806
    rules = [
        *_norm(a, i, f"{m}self_attention.linear_qkv.layer_norm_", f"{h}{f.names['input_norm']}.", H),
        *_qkv(a, i, f"{m}self_attention.linear_qkv.", f"{h}self_attn."),
    ]
    if a.qk_norm:
        rules += _norm(a, i, f"{m}self_attention.q_layernorm.", f"{h}self_attn.q_norm.", a.head_dim)
        rules += _norm(a, i, f"{m}self_attention.k_layernorm.", f"{h}self_attn.k_norm.", a.head_dim)
    rules += [
        *_linear(a, i, f"{m}self_attention.linear_proj.", f"{h}self_attn.o_proj.", (H, heads), split=1),
        *_norm(a, i, f"{m}mlp.linear_fc1.layer_norm_", f"{h}{f.names['mlp_norm']}.", H),
    ]
    if a.activation.gated:
        rules += _gate_up(a, i, f"{m}mlp.linear_fc1.", f"{h}mlp.", f.names["up"])
    else:
        rules += _linear(a, i, f"{m}mlp.linear_fc1.", f"{h}mlp.{f.names['up']}.", (F, H), split=0)
    rules += _activation(a, f, i, f"{m}mlp.activation_func.", f"{h}mlp.act_fn.")
    return rules + _linear(a, i, f"{m}mlp.linear_fc2.", f"{h}mlp.{f.names['down']}.", (H, F), split=1)


# Transforms


def _same(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


def _vocabulary(a: Architecture, megatron: str, hf: str) -> Rule:
    """[P, H] <-> [V, H]. Added rows are the mean of the others, not zero: their logit is then the mean logit, whose exp
    is at most the mean of the exps (Jensen), so all padding together gets at most (P - V) / P of the probability."""

    def cut(weight: Tensor) -> tuple[Tensor]:
        return (weight[: a.vocab_size],)

    def pad(weight: Tensor) -> tuple[Tensor]:
        extra = a.padded_vocab_size - a.vocab_size
        if not extra:
            return (weight,)
        mean = weight.mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
        return (torch.cat([weight, mean.expand(extra, -1)]),)

    tensor = MegatronTensor(megatron, (a.padded_vocab_size, a.hidden_size), split=0)
    return Rule(None, (tensor,), (hf,), cut, pad)


def _norm(a: Architecture, layer: int | None, megatron: str, hf: str, size: int) -> list[Rule]:
    kinds = ("weight", "bias") if a.norm == "LayerNorm" else ("weight",)
    return [Rule(layer, (MegatronTensor(megatron + k, (size,)),), (hf + k,), _same, _same) for k in kinds]


def _linear(a: Architecture, layer: int, megatron: str, hf: str, shape: tuple[int, int], split: int) -> list[Rule]:
    rules = [Rule(layer, (MegatronTensor(f"{megatron}weight", shape, split),), (f"{hf}weight",), _same, _same)]
    if a.bias == "all":  # a row-parallel bias is added once, after the sum over ranks
        bias = MegatronTensor(f"{megatron}bias", shape[:1], 0 if split == 0 else None)
        rules.append(Rule(layer, (bias,), (f"{hf}bias",), _same, _same))
    return rules


def _qkv(a: Architecture, layer: int, megatron: str, hf: str) -> list[Rule]:
    """Rows in G groups: the group's N/G queries, its key, its value, each D rows. No rotation of rows is needed: both
    sides rotate halves of a head."""
    G, q, D = a.num_groups, a.num_heads // a.num_groups, a.head_dim  # noqa: N806

    def take_apart(fused: Tensor) -> tuple[Tensor, ...]:
        grouped = fused.view(G, q + 2, D, *fused.shape[1:])
        parts = grouped[:, :q], grouped[:, q], grouped[:, q + 1]
        return tuple(part.reshape(-1, *fused.shape[1:]) for part in parts)

    def join(*parts: Tensor) -> tuple[Tensor]:
        rest = parts[0].shape[1:]
        grouped = [part.reshape(G, n, D, *rest) for part, n in zip(parts, (q, 1, 1), strict=True)]
        return (torch.cat(grouped, dim=1).reshape(-1, *rest),)

    rows = G * (q + 2) * D
    kinds = {"weight": (rows, a.hidden_size)} | ({"bias": (rows,)} if a.bias != "none" else {})
    return [
        Rule(
            layer,
            (MegatronTensor(megatron + kind, shape, split=0),),
            tuple(f"{hf}{part}_proj.{kind}" for part in "qkv"),
            take_apart,
            join,
        )
        for kind, shape in kinds.items()
    ]


def _gate_up(a: Architecture, layer: int, megatron: str, hf: str, up: str) -> list[Rule]:
    """[2F, H] <-> [F, H] twice: the gate half is first."""

    def cut(fused: Tensor) -> tuple[Tensor, Tensor]:
        return fused[: a.ffn_hidden_size], fused[a.ffn_hidden_size :]

    def join(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        return (torch.cat([gate, up]),)

    kinds = {"weight": (2 * a.ffn_hidden_size, a.hidden_size)}
    if a.bias == "all":
        kinds["bias"] = (2 * a.ffn_hidden_size,)
    return [
        Rule(
            layer,
            (MegatronTensor(megatron + kind, shape, split="gated"),),
            (f"{hf}gate_proj.{kind}", f"{hf}{up}.{kind}"),
            cut,
            join,
        )
        for kind, shape in kinds.items()
    ]


def _activation(a: Architecture, f: Family, layer: int, megatron: str, hf: str) -> list[Rule]:
    """Raw parameters, shape (1,), unchanged. transformers' xIELU also stores beta and eps, and every alpha."""
    if f.model_type == "apertus" and a.activation.name == "xielu":
        return [_xielu(a, layer, megatron, hf)]
    learned = [q.name for q in a.activation.trainable]
    if not learned:
        return []
    tensors = tuple(MegatronTensor(megatron + name, (1,)) for name in learned)
    return [Rule(layer, tensors, tuple(hf + name for name in learned), _same, _same, activation=True)]


XIELU_HF = ("alpha_p", "alpha_n", "beta", "eps")
"""Tensors of transformers' xIELU: raw alphas (1,), and the effective beta and eps ()."""


def _xielu(a: Architecture, layer: int, megatron: str, hf: str) -> Rule:
    learned = tuple(q.name for q in a.activation.trainable)
    fixed = _xielu_fixed_raw(a)

    def export(*raw: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(learned, raw, strict=True)) | {n: torch.tensor([v]) for n, v in fixed.items()}
        return values["alpha_p"], values["alpha_n"], values["beta"].reshape(()), torch.tensor(HF_XIELU_EPS)

    def restore(*stored: Tensor) -> tuple[Tensor, ...]:
        values = {name: t.reshape(1) for name, t in zip(XIELU_HF, stored, strict=True)}
        for name, value in fixed.items():
            if values[name] != torch.tensor([value]).to(values[name].dtype):
                raise ValueError(
                    f"{hf}{name} = {values[name].item():.6g}, but the activation should have it fixed at {value:.6g}"
                )
        return tuple(values[name] for name in learned)

    tensors = tuple(MegatronTensor(megatron + name, (1,)) for name in learned)
    return Rule(layer, tensors, tuple(hf + name for name in XIELU_HF), export, restore, activation=True)


def _xielu_fixed_raw(a: Architecture) -> dict[str, float]:
    """Raw values of the parameters that are not trained, by name."""
    init = {q.name: q.init for q in a.activation.parameters}
    every = activations.get(a.activation.name, trainable=tuple(init), **init).initial_raw()
    return {q.name: every[q.name] for q in a.activation.parameters if not q.trainable}


# Checks against what is there


def check_names(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """ValueError: a tensor is missing, unexpected, or of the wrong shape. `where`: in what, for the message."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    for what, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{where} {what} {', '.join(names[:3])}{more}; its arguments describe another model")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise ValueError(f"{where}: {name} has shape {list(found[name])}, its arguments say {list(shape)}")


def megatron_shapes(rules: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
    return {t.name: t.shape for rule in rules for t in rule.megatron}


def hf_shapes(rules: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
    return {name: shape for rule in rules for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)}
