"""A decoder with an activation that transformers does not have, trained with megatron-xact.

Load it with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. It needs torch and transformers
(>= 4.56). It is Qwen3's model (pre-norm, rotary embeddings, grouped-query attention) with the MLP replaced, and
norms and biases as config.json says.
"""

from __future__ import annotations

import math  # noqa: F401  (for the activation below)
from dataclasses import dataclass  # noqa: F401
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model, Qwen3PreTrainedModel, Qwen3RMSNorm

Pointwise = Values = Grads = Unary = Any  # words of the annotations below

# >>> the activation, from its record in megatron-xact

NAME, GATED = 'xiprelu', False
IN_FP32 = True  # or in the dtype of x, rounding after each operation
# x > 0: a_p x^2 + b x; x <= 0: a_n x^2 + b x
# symbol: (name, bound b of effective = b + softplus(raw), None: raw; value if fixed, None: trained)
PARAMETERS = {
    'a_p': ('alpha_p', 0.0, None),
    'a_n': ('alpha_n', 0.0, None),
    'b': ('beta', None, 0.5),
}


def negative_part(x: Tensor) -> Tensor:
    """min(x, 0). Not `clamp`: there autograd at x = 0 depends on the torch version."""
    return torch.where(x > 0, 0.0, x)


@dataclass(frozen=True)
class TwoSided:
    positive: Pointwise
    negative: Pointwise

    def value(self, x: Tensor, p: Values) -> Tensor:
        return torch.where(x > 0, self.positive.value(x, p), self.negative.value(negative_part(x), p))

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        right, partials = self.positive.slopes(x.clamp(min=0.0), p)
        left, others = self.negative.slopes(negative_part(x), p)
        for symbol, partial in others.items():  # each is 0 on the other side
            partials[symbol] = partials[symbol] + partial if symbol in partials else partial
        return torch.where(x > 0, right, left), partials


@dataclass(frozen=True)
class Power:
    """a x^degree + b x; `symbol` says which parameter a is."""

    symbol: str
    degree: int

    def value(self, x: Tensor, p: Values) -> Tensor:
        return (p[self.symbol] * x ** (self.degree - 1) + p["b"]) * x

    def slopes(self, x: Tensor, p: Values) -> tuple[Tensor, Grads]:
        lower = x ** (self.degree - 1)
        return self.degree * p[self.symbol] * lower + p["b"], {self.symbol: lower * x, "b": x}


def value(x, p):
    return TwoSided(positive=Power(symbol='a_p', degree=2), negative=Power(symbol='a_n', degree=2)).value(x, p)


# <<< the activation


class XactConfig(Qwen3Config):
    """Qwen3's keys, and: normalization (RMSNorm or LayerNorm), qk_norm, bias (none, qkv or all), activation (what it
    was trained with; the code is above)."""

    model_type = "xact"


class XactActivation(nn.Module):
    """Holds the raw parameters, shape (1,); transformers gives them the model's dtype."""

    def __init__(self):
        super().__init__()
        for name, _, fixed in PARAMETERS.values():
            if fixed is None:
                self.register_parameter(name, nn.Parameter(torch.zeros(1)))

    def effective(self, dtype: torch.dtype) -> dict[str, Tensor | float]:
        """Symbol -> effective value: fixed ones as numbers, trained ones of shape () in `dtype`."""
        p: dict[str, Tensor | float] = {}

        def find(symbol: str) -> Tensor | float:
            if symbol not in p:
                name, lower, fixed = PARAMETERS[symbol]
                if fixed is None:
                    raw = getattr(self, name).to(torch.promote_types(dtype, torch.float32)).reshape(())
                    bound = find(lower) if isinstance(lower, str) else lower
                    free = bound is None
                    p[symbol] = raw if free else bound + nn.functional.softplus(raw, threshold=40.0)
                else:
                    p[symbol] = fixed
            return p[symbol]

        return {symbol: find(symbol) for symbol in PARAMETERS}

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """f(x), or f(x) * up in a gated MLP, where x is the gate."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) if IN_FP32 else x
        y = value(wide, self.effective(wide.dtype))
        return (y if up is None else y * up).to(x.dtype)


class XactMLP(nn.Module):
    def __init__(self, config: XactConfig):
        super().__init__()
        size, bias = (config.hidden_size, config.intermediate_size), config.bias == "all"
        if GATED:
            self.gate_proj = nn.Linear(*size, bias=bias)
        self.up_proj = nn.Linear(*size, bias=bias)
        self.down_proj = nn.Linear(*size[::-1], bias=bias)
        self.act_fn = XactActivation()

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(self.gate_proj(x), up) if GATED else self.act_fn(up))


class XactModel(Qwen3Model):
    config_class = XactConfig

    def __init__(self, config: XactConfig):
        if config.activation["name"] != NAME:
            raise ValueError(f"config.json says {config.activation['name']}, this file has {NAME}")
        super().__init__(config)
        heads = config.num_attention_heads * config.head_dim
        for layer in self.layers:
            layer.mlp = XactMLP(config)
            layer.input_layernorm = self._norm(config.hidden_size)
            layer.post_attention_layernorm = self._norm(config.hidden_size)
            for name in ("q_norm", "k_norm"):
                setattr(layer.self_attn, name, self._norm(config.head_dim) if config.qk_norm else nn.Identity())
            if config.bias == "qkv":
                layer.self_attn.o_proj = nn.Linear(heads, config.hidden_size, bias=False)
        self.norm = self._norm(config.hidden_size)

    def _norm(self, size: int) -> nn.Module:
        kind = Qwen3RMSNorm if self.config.normalization == "RMSNorm" else nn.LayerNorm
        return kind(size, eps=self.config.rms_norm_eps)


class XactForCausalLM(Qwen3ForCausalLM):
    config_class = XactConfig

    def __init__(self, config: XactConfig):
        Qwen3PreTrainedModel.__init__(self, config)  # without Qwen3's own model
        self.model = XactModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
