"""How many parameters a model has and how many floating-point operations a token costs: arithmetic on sizes, no torch.

Letters: h hidden size, F ffn size, q = heads x head size, k = key-value heads x head size, V padded vocabulary,
s sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = ("embedding", "head", "attention", "mlp", "norms", "activation")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like decoder, as far as counting needs them."""

    layers: int
    hidden: int
    ffn: int  # of what enters fc2: a gated MLP's fc1 is twice as wide
    heads: int
    vocab: int  # rows of the embedding, padding included
    sequence: int
    groups: int | None = None  # key-value heads; None: as many as heads
    head_dim: int | None = None  # None: hidden / heads
    gated: bool = False
    tied: bool = True  # input embedding and output head are one matrix
    activation_parameters: int = 0  # learned numbers per layer, e.g. 2 for xIELU
    norm_bias: bool = False  # LayerNorm; RMSNorm has none
    qk_norm: bool = False
    linear_bias: bool = False
    qkv_bias: bool = False
    positions: int = 0  # learned position embeddings; 0: rotary

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.groups or self.heads

    @property
    def query(self) -> int:
        return self.heads * self.head_size

    @property
    def key_value(self) -> int:
        """Width of the keys, and of the values."""
        return self.key_value_heads * self.head_size

    @property
    def fc1(self) -> int:
        """Width of fc1's output, the pre-activation."""
        return self.ffn * (2 if self.gated else 1)


@dataclass(frozen=True)
class Weights:
    """How many parameters of one group: `split` over tensor-parallel ranks, and `whole` on each of them."""

    split: int = 0
    whole: int = 0

    def on_rank(self, tensor_parallel: int = 1) -> int:
        return self.split // tensor_parallel + self.whole


def layer_weights(shape: Shape) -> dict[str, Weights]:
    """Of one layer, by group."""
    h, qkv = shape.hidden, shape.query + 2 * shape.key_value
    norm = 2 if shape.norm_bias else 1
    return {
        "attention": Weights(
            h * (qkv + shape.query) + (qkv if shape.qkv_bias or shape.linear_bias else 0),
            h if shape.linear_bias else 0,
        ),
        "mlp": Weights(
            h * (shape.fc1 + shape.ffn) + (shape.fc1 if shape.linear_bias else 0), h if shape.linear_bias else 0
        ),
        "norms": Weights(whole=norm * (2 * h + (2 * shape.head_size if shape.qk_norm else 0))),
        "activation": Weights(whole=shape.activation_parameters),
    }


def parameters(shape: Shape) -> dict[str, int]:
    """Of the whole model, by group; each once, however many ranks hold it. A tied head counts nothing."""
    return stage_parameters(shape, 1, shape.layers, first=True, last=True)


def stage_parameters(shape: Shape, tensor_parallel: int, layers: int, *, first: bool, last: bool) -> dict[str, int]:
    """On one rank of a pipeline stage with this many layers, by group.

    first, last: whether the stage holds the embedding and the head. A last stage that is not the first holds a copy
    of a tied embedding, counted as its head.
    """
    table = Weights(split=shape.vocab * shape.hidden)
    count = dict.fromkeys(GROUPS, 0)
    for group, weights in layer_weights(shape).items():
        count[group] = layers * weights.on_rank(tensor_parallel)
    if first:
        count["embedding"] = table.on_rank(tensor_parallel) + shape.positions * shape.hidden
    if last:
        count["norms"] += (2 if shape.norm_bias else 1) * shape.hidden
        if not (shape.tied and first):
            count["head"] = table.on_rank(tensor_parallel)
    return count


def flops_per_token(shape: Shape, *, head: bool = True, scores: bool = True) -> int:
    """Floating-point operations of one token, forward and backward: 6 for every weight of a matrix product.

    head: with the product that makes logits. scores: with attention's products of queries, keys and values, which grow
    with s; a causal mask leaves half of them, and only that half is counted. Looking up embeddings, norms, softmax and
    activations are not counted; nor is anything computed twice (recomputation), so this is what MFU is about.
    """
    h = shape.hidden
    layer = h * (2 * shape.query + 2 * shape.key_value) + h * (shape.fc1 + shape.ffn)
    forward = 2 * shape.layers * layer
    if head:
        forward += 2 * h * shape.vocab
    if scores:
        forward += 2 * shape.layers * shape.query * shape.sequence
    return 3 * forward
