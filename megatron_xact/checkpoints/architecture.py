"""What a model computes, said independently of Megatron and of transformers; and both sides' words for it.

`Architecture` is the middle of every conversion: Megatron's arguments and a transformers config.json are each read into
it and written from it. A setting that would change the model's function and has no place in it is refused by name
instead of dropped. `FAMILIES` says which transformers class computes which architectures; the last family is the
self-contained model of `modeling/`, which is exported along with the weights for all that transformers lacks.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.checkpoints.json_files import read_object
from megatron_xact.pretraining.resume import identity

# Megatron's `--use-rope-scaling` is Llama 3's, with these constants built in; only the factor is an argument.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
HF_XIELU_EPS = -1e-6
"""transformers' xIELU computes expm1(min(x, eps)) with this eps, ours min(x, 0): they differ by at most 1e-6 a_n."""


def is_hf_xielu_eps(stored: Tensor) -> bool:
    """Is it that eps, or what a model that was once in 16 bits has of it?"""
    return any(torch.equal(stored.to(d), torch.tensor(HF_XIELU_EPS).to(d)) for d in (torch.bfloat16, torch.float16))


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder with rotary embeddings. Sizes are of the whole model, not of a rank."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int
    """Key-value heads; equal to num_heads without grouped-query attention."""
    head_dim: int
    vocab_size: int
    """The tokenizer's, or more where an import has rows beyond its ids; without Megatron's padding."""
    padded_vocab_size: int
    """Rows of Megatron's embedding."""
    max_positions: int
    rope_theta: float
    rope_factor: float | None
    """Of Llama 3's scaling; None: unscaled."""
    norm: str
    """RMSNorm, or LayerNorm (with bias)."""
    norm_eps: float
    qk_norm: bool
    """`norm` on the query and key of every head, before rotation."""
    bias: str
    """Of linear layers: none, qkv (query, key and value only), all (except embeddings)."""
    tied: bool
    """The output layer is the embedding."""
    activation: Activation


# Reading and writing Megatron's arguments

# Arguments that change what the model computes, and the value that `Architecture` means.
_MEGATRON_MEANS = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "rope_type": None,
    "layernorm_zero_centered_gamma": False,
    "qk_l2_norm": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "window_size": None,
    "softmax_type": "vanilla",
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "num_experts": None,
    "mtp_num_layers": None,
    "is_hybrid_model": False,
    "heterogeneous_layers_config_path": None,
    "use_mup": False,
}


def vocabulary_size(args: Namespace, tokenizer_size: int) -> int:
    """Rows of the embedding that are no padding, by the arguments saved in a checkpoint and its tokenizer's ids."""
    return max(tokenizer_size, getattr(args, "vocab_size", None) or 0)


def from_megatron(args: Namespace, tokenizer_size: int) -> Architecture:
    """Of the arguments saved in a checkpoint. ValueError names the one that no family can express."""
    for name, meant in _MEGATRON_MEANS.items():
        value = getattr(args, name, meant)
        if value != meant and not (value == "rope" and name == "rope_type"):
            raise ValueError(f"unknown architecture: {name} = {value!r} has no Hugging Face form here (only {meant!r})")
    norm = getattr(args, "normalization", "LayerNorm")
    if norm not in ("RMSNorm", "LayerNorm"):
        raise ValueError(f"unknown architecture: normalization = {norm!r} (only RMSNorm and LayerNorm)")
    try:
        return _architecture(args, vocabulary_size(args, tokenizer_size))
    except AttributeError as error:
        raise ValueError(f"unknown architecture: the checkpoint's arguments do not say {error.name}") from None


def _architecture(args: Namespace, vocab_size: int) -> Architecture:
    return Architecture(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_heads=args.num_attention_heads,
        num_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab_size=vocab_size,
        padded_vocab_size=args.padded_vocab_size,
        max_positions=args.max_position_embeddings,
        rope_theta=float(args.rotary_base),
        rope_factor=float(args.rope_scaling_factor) if getattr(args, "use_rope_scaling", False) else None,
        norm=getattr(args, "normalization", "LayerNorm"),
        norm_eps=_norm_epsilon(args),
        qk_norm=bool(getattr(args, "qk_layernorm", False)),
        bias="all" if args.add_bias_linear else "qkv" if getattr(args, "add_qkv_bias", False) else "none",
        tied=not args.untie_embeddings_and_output_weights,
        activation=record(identity_of(args)),
    )


def _norm_epsilon(args: Namespace) -> float:
    return args.layernorm_epsilon if hasattr(args, "layernorm_epsilon") else args.norm_epsilon


def to_megatron(a: Architecture) -> dict[str, object]:
    """The [model] table of a config that builds it, without seq-length. The inverse of `from_megatron`."""
    if a.rope_theta != int(a.rope_theta):
        raise ValueError(f"rope_theta = {a.rope_theta} is not a whole number, as Megatron's --rotary-base has to be")
    table: dict[str, object] = {
        "num-layers": a.num_layers,
        "hidden-size": a.hidden_size,
        "ffn-hidden-size": a.ffn_hidden_size,
        "num-attention-heads": a.num_heads,
        "kv-channels": a.head_dim,
        "max-position-embeddings": a.max_positions,
        "position-embedding-type": "rope",
        "rotary-base": int(a.rope_theta),
        "normalization": a.norm,
        "norm-epsilon": a.norm_eps,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
    }
    if a.num_groups != a.num_heads:
        table |= {"group-query-attention": True, "num-query-groups": a.num_groups}
    if a.rope_factor is not None:
        table |= {"use-rope-scaling": True, "rope-scaling-factor": a.rope_factor}
    flags = {
        "qk-layernorm": a.qk_norm,
        "disable-bias-linear": a.bias != "all",
        "add-qkv-bias": a.bias == "qkv",
        "untie-embeddings-and-output-weights": not a.tied,
    }
    return table | {flag: True for flag, wanted in flags.items() if wanted}


# The activation: see resume.identity, which `xact pretrain` saves

# Flags of xIELU forks of Megatron, whose checkpoints have no identity.
_FORK_FLAGS = {"xielu": "xielu", "xiprelu": "xiprelu"}


def identity_of(args: Namespace) -> dict:
    """What the checkpoint says about its activation. ValueError: nothing that is known here."""
    if hasattr(args, "xact_activation"):
        return args.xact_activation
    for flag, name in _FORK_FLAGS.items():
        if getattr(args, flag, False):
            return {"name": name}
    gated = getattr(args, "swiglu", False)
    if getattr(args, "squared_relu", False) and not gated:
        return {"name": "relu2"}
    if gated and not getattr(args, "quick_geglu", False) and not getattr(args, "activation_func_clamp_value", None):
        return {"name": "swiglu"}
    raise ValueError(
        "the checkpoint does not say which activation it was trained with (no xact_activation in its arguments and no "
        "flag that is known here); name it with --activation"
    )


def record(identity: Mapping) -> Activation:
    """The record of an `identity`, with the fixed values it was trained with: its inverse."""
    name, fixed = identity["name"], dict(identity.get("fixed", {}))
    # A trained parameter's start value only has to be possible here: above its bound, which may be a fixed value.
    start = {
        q.name: fixed[q.lower] + 1.0
        for q in activations.get(name).parameters
        if q.name not in fixed and q.lower in fixed and q.init <= fixed[q.lower]
    }
    trainable = identity.get("trainable")
    return activations.get(name, trainable=trainable, eps=identity.get("eps", 0.0), **fixed, **start)


# Families: which transformers class computes what

_LLAMA_NAMES = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "up": "up_proj",
    "down": "down_proj",
}


@dataclass(frozen=True)
class Family:
    """A transformers class, the architectures it computes exactly, and its names and config keys."""

    model_type: str
    class_name: str
    gated: bool | None = None
    """None: either. The same for the next two."""
    norm: str | None = "RMSNorm"
    qk_norm: bool | None = False
    biases: tuple[str, ...] = ("none",)
    parameters: bool = False
    """Does the class have activations with parameters (else only functions in transformers' ACT2FN)?"""
    names: Mapping[str, str] = field(default_factory=lambda: _LLAMA_NAMES)
    """Its words for the modules that are not called the same everywhere."""
    config: Callable[[Architecture], dict] = lambda a: {}
    """The config keys that not all families share."""

    def serves(self, a: Architecture) -> bool:
        return (
            self.gated in (None, a.activation.gated)
            and self.norm in (None, a.norm)
            and self.qk_norm in (None, a.qk_norm)
            and a.bias in self.biases
            and self._has(a.activation)
        )

    def _has(self, activation: Activation) -> bool:
        if self.model_type == "xact":
            return True
        return activation.hf is not None and (self.parameters or not activation.parameters)


def _llama_biases(a: Architecture) -> dict:
    return {"attention_bias": a.bias == "all", "mlp_bias": a.bias == "all"}


FAMILIES = (
    Family(
        "apertus",
        "ApertusForCausalLM",
        gated=False,
        qk_norm=True,
        parameters=True,
        names=_LLAMA_NAMES | {"input_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
        # transformers has no key for the last three; mlx-lm reads them
        config=lambda a: {"attention_bias": False, "mlp_bias": False, "post_norm": False, "qk_norm": True},
    ),
    Family("llama", "LlamaForCausalLM", gated=True, biases=("none", "all"), config=_llama_biases),
    Family("arcee", "ArceeForCausalLM", gated=False, biases=("none", "all"), config=_llama_biases),
    Family("qwen2", "Qwen2ForCausalLM", gated=True, biases=("qkv",), config=lambda a: {"use_sliding_window": False}),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        gated=True,
        qk_norm=True,
        config=lambda a: {"attention_bias": False, "use_sliding_window": False},
    ),
    Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        gated=False,
        norm="LayerNorm",
        biases=("none", "all"),
        names=_LLAMA_NAMES | {"up": "c_fc", "down": "c_proj"},
        config=lambda a: {
            "use_bias": a.bias == "all",
            "norm_epsilon": a.norm_eps,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
            "sliding_window": None,
        },
    ),
    Family(
        "xact",
        "XactForCausalLM",
        norm=None,
        qk_norm=None,
        biases=("none", "qkv", "all"),
        parameters=True,
        config=lambda a: {
            "activation": identity(a.activation),
            "normalization": a.norm,
            "qk_norm": a.qk_norm,
            "bias": a.bias,
            "attention_bias": a.bias != "none",
            "hidden_act": "silu",  # Qwen3's, never called: `activation` takes its place
            "use_sliding_window": False,
            "auto_map": {
                "AutoConfig": "modeling_xact.XactConfig",
                "AutoModel": "modeling_xact.XactModel",  # what vLLM builds
                "AutoModelForCausalLM": "modeling_xact.XactForCausalLM",
            },
        },
    ),
)


def family(a: Architecture) -> Family:
    """The first that computes it; the self-contained model computes all."""
    return next(f for f in FAMILIES if f.serves(a))


# Reading and writing config.json


def to_hf(a: Architecture, dtype: str) -> dict:
    """config.json, without token ids. `dtype`: float32, bfloat16 or float16.

    RoPE is written in both forms: transformers 5 reads rope_parameters, transformers 4 and mlx-lm the flat keys.
    """
    f = family(a)
    scaling = None
    if a.rope_factor is not None:
        scaling = {"rope_type": "llama3", "factor": a.rope_factor, **LLAMA3_ROPE}
    config = {
        "architectures": [f.class_name],
        "model_type": f.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_groups,
        "head_dim": a.head_dim,
        "hidden_act": a.activation.hf or a.activation.name,
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_theta": a.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": a.rope_theta, **(scaling or {"rope_type": "default"})},
    }
    if a.activation.parameters and f.model_type != "xact":
        config["xact_activation"] = identity(a.activation)  # which were trained: the tensors cannot tell
    return config | f.config(a)


# Config keys that change what the model computes, and the value that `Architecture` means.
_HF_MEANS = {
    "partial_rotary_factor": 1.0,
    "post_norm": False,
    "use_sliding_window": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "num_local_experts": None,
    "quantization_config": None,
}


def from_hf(config: Mapping) -> Architecture:
    """Of a config.json, without padding of the vocabulary. ValueError names what no family here has."""
    f = next((f for f in FAMILIES if f.model_type == config.get("model_type")), None)
    if f is None:
        known = ", ".join(f.model_type for f in FAMILIES)
        raise ValueError(f"unknown architecture: model_type = {config.get('model_type')!r}; known: {known}")
    for key, meant in _HF_MEANS.items():
        if config.get(key, meant) not in (meant, None):
            raise ValueError(f"unknown architecture: {key} = {config[key]!r} has no Megatron form (only {meant!r})")
    if f.model_type in ("starcoder2", "llama") and config.get("sliding_window") is not None:
        raise ValueError(f"unknown architecture: sliding_window = {config['sliding_window']} is not supported")
    theta, factor = _rope(config)
    heads = _size(config, "num_attention_heads")
    a = Architecture(
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=_size(config, "hidden_size"),
        ffn_hidden_size=_size(config, "intermediate_size"),
        num_heads=heads,
        num_groups=_size(config, "num_key_value_heads", heads),
        head_dim=_size(config, "head_dim", _size(config, "hidden_size") // heads),
        vocab_size=_size(config, "vocab_size"),
        padded_vocab_size=_size(config, "vocab_size"),
        max_positions=_size(config, "max_position_embeddings"),
        rope_theta=theta,
        rope_factor=factor,
        norm=f.norm or config["normalization"],
        norm_eps=_number(config, "norm_epsilon" if f.model_type == "starcoder2" else "rms_norm_eps"),
        qk_norm=config["qk_norm"] if f.qk_norm is None else f.qk_norm,
        bias=_hf_bias(f, config),
        tied=config.get("tie_word_embeddings", f.model_type == "starcoder2"),
        activation=_hf_activation(f, config),
    )
    if family(a) != f:
        # e.g. a Llama with biases in its attention only
        raise ValueError(f"unknown architecture: {f.class_name} with bias {a.bias} has no Megatron form here")
    return a


def read_hf(folder: Path) -> tuple[Architecture, dict]:
    """Of a Hugging Face folder, and its config.json. ValueError or OSError: it has none, or not a whole one."""
    file = folder / "config.json"
    config = read_object(file)
    try:
        return from_hf(config), config
    except KeyError as error:
        raise ValueError(f"{file} lacks the key {error}") from None


def _size(config: Mapping, key: str, otherwise: int | None = None) -> int:
    """otherwise: what it is without the key, or at null."""
    value = config[key] if otherwise is None else config.get(key)
    if value is None and otherwise is not None:
        return otherwise
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {key} = {value!r} must be a whole number of at least 1")
    return value


def _number(config: Mapping, key: str) -> float:
    if type(config[key]) not in (int, float):
        raise ValueError(f"config.json: {key} = {config[key]!r} must be a number")
    return float(config[key])


def _object(config: Mapping, key: str) -> dict:
    """Empty without the key, or at null."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"config.json: {key} = {value!r} must be an object")
    return value


def _hf_bias(f: Family, config: Mapping) -> str:
    if f.model_type == "xact":
        return config["bias"]
    if f.model_type == "qwen2":
        return "qkv"
    if f.model_type == "starcoder2":
        return "all" if config.get("use_bias", True) else "none"
    attention, mlp = config.get("attention_bias", False), config.get("mlp_bias", False)
    if attention != mlp:
        raise ValueError(
            f"unknown architecture: attention_bias = {attention} with mlp_bias = {mlp}; Megatron has both or neither"
        )
    return "all" if attention else "none"


def _hf_activation(f: Family, config: Mapping) -> Activation:
    if f.model_type == "xact":
        return record(config["activation"])
    act = config.get("hidden_act", "silu")
    if act == "xielu" and f.parameters:
        return record(_object(config, "xact_activation") or {"name": "xielu"})
    for name in activations.names():
        candidate = activations.get(name)
        if candidate.hf == act and candidate.gated == f.gated and not candidate.parameters:
            return candidate
    kind = "gated" if f.gated else "ungated"
    raise ValueError(f"unknown activation: hidden_act = {act!r} in a {kind} MLP; `xact doctor` lists those known here")


def _rope(config: Mapping) -> tuple[float, float | None]:
    """(theta, Llama 3's factor or None). Both forms may be given; then they must say the same."""
    forms = {}
    if parameters := _object(config, "rope_parameters"):
        forms["rope_parameters"] = parameters
    scaling = _object(config, "rope_scaling")
    if config.get("rope_theta") is not None or scaling:
        forms["rope_theta and rope_scaling"] = {"rope_theta": config.get("rope_theta"), **scaling}
    if not forms:
        raise ValueError("config.json has neither rope_parameters nor rope_theta; the rotary base cannot be guessed")
    read = {name: _one_rope(form) for name, form in forms.items()}
    first, *others = read.values()
    if any(other != first for other in others):
        raise ValueError(f"config.json contradicts itself about RoPE (theta, factor): {read}; readers would disagree")
    return first


def _one_rope(form: Mapping) -> tuple[float, float | None]:
    kind = form.get("rope_type", form.get("type", "default"))
    if form.get("rope_theta") is None:
        raise ValueError("config.json gives no rope_theta; the rotary base cannot be guessed")
    if form.get("partial_rotary_factor") not in (1.0, None):
        raise ValueError(
            f"unknown architecture: partial_rotary_factor = {form['partial_rotary_factor']!r} has no Megatron form here"
        )
    if kind == "default":
        return _number(form, "rope_theta"), None
    different = {k: form.get(k) for k, meant in LLAMA3_ROPE.items() if form.get(k) != meant}
    if kind != "llama3" or different:
        raise ValueError(
            f"unknown architecture: RoPE scaling {kind} {different or ''}; Megatron has Llama 3's with {LLAMA3_ROPE}"
        )
    return _number(form, "rope_theta"), _number(form, "factor")


def pad_vocab(a: Architecture, divisible_by: int, tensor_parallel: int) -> Architecture:
    """With the embedding rows that Megatron makes: a multiple of `divisible_by` x `tensor_parallel`."""
    multiple = divisible_by * tensor_parallel
    return replace(a, padded_vocab_size=-(-a.vocab_size // multiple) * multiple)
