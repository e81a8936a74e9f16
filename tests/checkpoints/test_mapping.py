"""The conversion table and the config readers, against transformers' own models and formulas written here."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from saved import hf_configs

from megatron_xact import activations
from megatron_xact.checkpoints import mapping, modeling
from megatron_xact.checkpoints.architecture import (
    FAMILIES,
    Architecture,
    family,
    from_hf,
    from_megatron,
    identity,
    pad_vocab,
    record,
    to_hf,
    to_megatron,
)
from megatron_xact.checkpoints.mapping import hf_shapes, megatron_shapes, table
from megatron_xact.checkpoints.model import load_hf

BASE = Architecture(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=20,
    num_heads=6,
    num_groups=2,
    head_dim=4,
    vocab_size=50,
    padded_vocab_size=64,
    max_positions=64,
    rope_theta=10000.0,
    rope_factor=None,
    norm="RMSNorm",
    norm_eps=3e-6,  # no default of anything
    qk_norm=False,
    bias="none",
    tied=False,
    activation=activations.get("xielu"),
)


def every() -> dict[str, Architecture]:
    """Every record with every norm, qk-norm and bias."""
    options = product(activations.names(), ("RMSNorm", "LayerNorm"), (False, True), ("none", "qkv", "all"))
    return {
        f"{name} {norm} qk{qk:d} {bias}": replace(
            BASE,
            activation=activations.get(name),
            norm=norm,
            qk_norm=qk,
            bias=bias,
            tied=qk,
            rope_factor=8.0 if qk else None,
        )
        for name, norm, qk, bias in options
    }


EVERY = every()


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def exported(a: Architecture, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for rule in table(a):
        out |= dict(zip(rule.hf, rule.export(*(weights[t.name] for t in rule.megatron)), strict=True))
    return out


def restored(a: Architecture, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for rule in table(a):
        names = [t.name for t in rule.megatron]
        out |= dict(zip(names, rule.restore(*(weights[name] for name in rule.hf)), strict=True))
    return out


def families() -> dict[str, str]:
    """One architecture of every family, or more."""
    found = {}
    for key, a in EVERY.items():
        found.setdefault((family(a).model_type, a.activation.gated, a.bias), key)
    return {f"{kind} {'gated' if gated else 'plain'} {bias}": key for (kind, gated, bias), key in found.items()}


def test_every_family_serves_something():
    assert {family(a).model_type for a in EVERY.values()} == {f.model_type for f in FAMILIES}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"qk_norm": True}, "apertus"),
        ({}, "xact"),  # xIELU without qk-norm
        ({"qk_norm": True, "activation": activations.get("relu2")}, "apertus"),
        ({"activation": activations.get("relu2")}, "arcee"),
        ({"activation": activations.get("gelu")}, "arcee"),
        ({"activation": activations.get("swiglu")}, "llama"),
        ({"activation": activations.get("swiglu"), "bias": "all"}, "llama"),
        ({"activation": activations.get("swiglu"), "bias": "qkv"}, "qwen2"),
        ({"activation": activations.get("geglu"), "qk_norm": True}, "qwen3"),
        ({"activation": activations.get("gelu"), "norm": "LayerNorm", "bias": "all"}, "starcoder2"),
        ({"activation": activations.get("xiprelu"), "qk_norm": True}, "xact"),
        ({"activation": activations.get("xsilu_glu2")}, "xact"),
        ({"qk_norm": True, "bias": "all"}, "xact"),
    ],
)
def test_who_serves_what(options, expected):
    assert family(replace(BASE, **options)).model_type == expected


@pytest.mark.parametrize("key", EVERY)
def test_is_a_bijection(key):
    a = EVERY[key]
    rules = table(a)
    megatron, hf = [t.name for r in rules for t in r.megatron], [name for r in rules for name in r.hf]
    assert len(set(megatron)) == len(megatron) and len(set(hf)) == len(hf)
    weights = random_tensors(megatron_shapes(rules))
    out = exported(a, weights)
    assert {name: tuple(t.shape) for name, t in out.items()} == hf_shapes(rules)
    back = restored(a, out)
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        rows = a.vocab_size if tensor.shape[0] == a.padded_vocab_size else None
        assert torch.equal(back[name][:rows], tensor[:rows]), name
        assert back[name].shape == tensor.shape
    again = exported(a, back)
    assert all(torch.equal(again[name], tensor) for name, tensor in out.items())


def model_class(a: Architecture, folder):
    """transformers' class for it, from the config.json that we would write."""
    import transformers

    config = to_hf(a, "float32")
    (folder / "config.json").write_text(json.dumps(config))
    if family(a).model_type == "xact":
        (folder / modeling.MODELING_FILE).write_text(modeling.modeling_source(a.activation))
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True), transformers


@pytest.mark.parametrize("key", families().values(), ids=families())
def test_names_and_shapes_are_those_of_the_transformers_class(key, tmp_path):
    a = EVERY[key]
    config, transformers = model_class(a, tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == family(a).class_name
    state = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if a.tied:
        del state["lm_head.weight"]  # the same tensor as the embedding
    assert hf_shapes(table(a)) == state


def test_queries_keys_and_values_by_head():
    """Row by row, from the description in words: group g holds its queries, then its key, then its value."""
    weights = random_tensors(megatron_shapes(table(BASE)))
    out = exported(BASE, weights)
    fused = weights["decoder.layers.1.self_attention.linear_qkv.weight"]
    at, D, per_group = 0, BASE.head_dim, BASE.num_heads // BASE.num_groups  # noqa: N806
    for g in range(BASE.num_groups):
        for i in range(per_group):
            head = g * per_group + i
            q = out["model.layers.1.self_attn.q_proj.weight"][head * D : (head + 1) * D]
            assert torch.equal(q, fused[at : at + D])
            at += D
        for kind in "kv":
            part = out[f"model.layers.1.self_attn.{kind}_proj.weight"][g * D : (g + 1) * D]
            assert torch.equal(part, fused[at : at + D])
            at += D
    assert at == len(fused)


def test_xielu_always_has_its_four_tensors():
    for trainable in (("alpha_p", "alpha_n"), ("alpha_p", "alpha_n", "beta"), ("alpha_n",), ()):
        fixed = {n: v for n, v in {"alpha_p": 0.8, "alpha_n": 0.8, "beta": 0.25}.items() if n not in trainable}
        act = record({"name": "xielu", "trainable": trainable, "fixed": fixed})
        a = replace(BASE, qk_norm=True, activation=act)
        out = exported(a, random_tensors(megatron_shapes(table(a))))
        for i in range(a.num_layers):
            found = {n: out[f"model.layers.{i}.mlp.act_fn.{n}"] for n in ("alpha_p", "alpha_n", "beta", "eps")}
            assert [tuple(t.shape) for t in found.values()] == [(1,), (1,), (), ()]
            assert float(found["eps"]) == pytest.approx(-1e-6)
            if "beta" not in trainable:
                assert float(found["beta"]) == 0.25
            if "alpha_p" not in trainable:  # 0.8 = softplus(raw)
                assert float(torch.nn.functional.softplus(found["alpha_p"])) == pytest.approx(0.8)
            if "alpha_n" not in trainable and "beta" not in trainable:  # 0.8 = beta + softplus(raw)
                assert 0.25 + float(torch.nn.functional.softplus(found["alpha_n"])) == pytest.approx(0.8)


def test_a_fixed_parameter_that_was_trained_since_is_refused():
    a = replace(BASE, qk_norm=True)
    out = exported(a, random_tensors(megatron_shapes(table(a))))
    out["model.layers.1.mlp.act_fn.beta"] = torch.tensor(0.51)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act_fn\.beta = 0\.51.*fixed at 0\.5"):
        restored(a, out)


def test_padding_gets_at_most_its_share_of_the_probability():
    a = pad_vocab(replace(BASE, vocab_size=50), 16, 5)
    assert a.padded_vocab_size == 80
    weights = restored(a, random_tensors(hf_shapes(table(a))))
    hidden = torch.randn(200, a.hidden_size, generator=torch.Generator().manual_seed(1))
    p = torch.softmax(hidden @ weights["output_layer.weight"].T, dim=-1)[:, 50:].sum(dim=-1)
    assert 0 < p.max() <= 30 / 80


# Configs


@pytest.mark.parametrize("key", families().values(), ids=families())
def test_config_json_comes_back(key):
    a = EVERY[key]
    config = json.loads(json.dumps(to_hf(a, "bfloat16")))
    assert replace(from_hf(config), padded_vocab_size=a.padded_vocab_size) == a


@pytest.mark.parametrize("key", list(EVERY)[::7])
def test_megatron_arguments_come_back(key):
    from megatron_xact.pretraining import arguments

    a = EVERY[key]
    words = [w for k, v in to_megatron(a).items() for w in arguments.find(k)[0].tokens(v)]
    args = arguments.parse(words + (["--swiglu"] if a.activation.gated else []))
    args.padded_vocab_size, args.xact_activation = a.padded_vocab_size, identity(a.activation)
    args.layernorm_epsilon = args.norm_epsilon if hasattr(args, "norm_epsilon") else args.layernorm_epsilon
    assert from_megatron(args, a.vocab_size) == a


@pytest.mark.parametrize("name", hf_configs())
def test_reads_what_transformers_saves(name, tmp_path):
    """transformers 5 writes rope_parameters only; and our own config.json is read by it as the same model."""
    import transformers

    config = hf_configs()[name]
    config.save_pretrained(tmp_path)
    a = from_hf(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(to_hf(a, "float32")))
    ours = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(ours) is type(config)
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys += ("hidden_act", "vocab_size", "tie_word_embeddings", "max_position_embeddings", "rope_parameters")
    for key in keys:
        assert getattr(ours, key) == getattr(config, key), key
    a_theta = {k: ours.rope_parameters[k] for k in ("rope_theta", "rope_type")}
    assert a_theta == {k: config.rope_parameters[k] for k in a_theta}


@pytest.mark.parametrize("factor", [None, 8.0])
def test_rope_is_written_in_both_forms(factor):
    config = to_hf(replace(BASE, rope_factor=factor, rope_theta=500000.0), "float32")
    new, old = config["rope_parameters"], dict(config["rope_scaling"] or {"rope_type": "default"})
    assert new == old | {"rope_theta": config["rope_theta"]}
    flat = {key: config[key] for key in ("rope_theta", "rope_scaling")}
    for form in ({"rope_parameters": new}, flat):
        rest = {k: v for k, v in config.items() if not k.startswith("rope")}
        assert from_hf(rest | form).rope_factor == factor


def apertus(**changes) -> dict:
    return to_hf(replace(BASE, qk_norm=True), "float32") | changes


@pytest.mark.parametrize(
    "config, said",
    [
        (apertus(model_type="gpt2"), "model_type = 'gpt2'; known: apertus, llama"),
        (apertus(rope_theta=1e6), "contradicts itself about RoPE"),
        (apertus(rope_theta=None, rope_parameters=None), "neither rope_parameters nor rope_theta"),
        (apertus(rope_theta=None, rope_parameters={"rope_type": "default"}), "no rope_theta"),
        (apertus(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}, rope_theta=None), "RoPE scaling yarn"),
        (
            apertus(
                rope_theta=None,
                rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 2.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            ),
            "low_freq_factor': 2.0",
        ),
        (apertus(post_norm=True), "post_norm = True"),
        (apertus(hidden_act="mish"), "hidden_act = 'mish'"),
        (apertus(attention_bias=True), "attention_bias = True with mlp_bias = False"),
        (apertus(attention_bias=True, mlp_bias=True), "ApertusForCausalLM with bias all"),
        (apertus(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    ],
)  # fmt: skip
def test_a_config_that_means_another_model_is_refused(config, said):
    with pytest.raises(ValueError) as error:
        from_hf(config)
    assert said in str(error.value) and "\n" not in str(error.value)


MISSING = object()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type = 'learned_absolute'"),
        ({"rotary_percent": 0.5}, "rotary_percent = 0.5"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma = True"),
        ({"window_size": (128, 0)}, "window_size = (128, 0)"),
        ({"xact_activation": MISSING}, "does not say which activation"),
        ({"kv_channels": MISSING}, "do not say kv_channels"),
        ({"normalization": "DeepNorm"}, "normalization = 'DeepNorm'"),
    ],
)
def test_arguments_of_another_architecture_are_refused(change, said):
    from megatron_xact.pretraining import arguments

    args = arguments.parse([w for k, v in to_megatron(BASE).items() for w in arguments.find(k)[0].tokens(v)])
    args.padded_vocab_size, args.xact_activation = 64, {"name": "xielu"}
    assert from_megatron(args, 50).activation.name == "xielu"
    vars(args).update({k: v for k, v in change.items() if v is not MISSING})
    for name in (k for k, v in change.items() if v is MISSING):
        delattr(args, name)
    with pytest.raises(ValueError) as error:
        from_megatron(args, 50)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"xielu": True}, "xielu"),
        ({"xiprelu": True}, "xiprelu"),
        ({"swiglu": True}, "swiglu"),
        ({"squared_relu": True}, "relu2"),
    ],
)
def test_the_activation_of_checkpoints_that_name_none(flags, expected):
    from megatron_xact.checkpoints.architecture import identity_of

    args = type("Args", (), flags)()
    assert record(identity_of(args)).name == expected


def test_names_that_do_not_fit_are_told():
    expected = {"a": (2, 3), "b": (4,)}
    mapping.check_names(expected, expected, "here")
    for found, said in (
        ({"a": (2, 3)}, "here lacks b;"),
        (expected | {"c": (1,)}, "here has unexpected c;"),
        ({"a": (3, 2), "b": (4,)}, r"here: a has shape \[3, 2\], its arguments say \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=said):
            mapping.check_names(expected, found, "here")


# The self-contained model


def variants() -> list[activations.Activation]:
    plain = [activations.get(name) for name in activations.names()]
    trained = [
        activations.get(q.name, trainable=[p.name for p in q.parameters]) for q in plain if len(q.parameters) > 1
    ]
    return [*plain, *trained, activations.get("xielu", trainable=(), beta=0.1), activations.get("xielu", eps=-1e-6)]


@pytest.mark.parametrize("act", variants(), ids=lambda a: f"{a.name} {len(a.trainable)} {a.eps:g}")
def test_the_exported_code_computes_the_record(act):
    namespace: dict = {}
    exec(modeling.modeling_source(act), namespace)  # noqa: S102
    module = namespace["XactActivation"]()
    raw = {q.name: torch.tensor([0.3 * i - 0.4]) for i, q in enumerate(act.trainable)}
    assert set(dict(module.named_parameters())) == set(raw)
    module.load_state_dict(raw)
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:-1]
    p = act.effective({name: t.double() for name, t in raw.items()})
    with torch.no_grad():
        module.double()
        if act.gated:
            ours = module(x[:2000], x[2000:])
        else:
            ours = module(x)
        assert torch.equal(ours, act.forward(x, p))
        half = module.float()(x[:2000].bfloat16(), x[2000:].bfloat16()) if act.gated else module(x.bfloat16())
    theirs = act.forward(x.bfloat16(), act.effective(raw))
    assert half.dtype == torch.bfloat16 and torch.equal(half, theirs)


def test_the_exported_code_stands_alone():
    for act in variants():
        tree = ast.parse(modeling.modeling_source(act))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for top in (name.split(".")[0] for name in names):
                assert top in ("torch", "transformers", *sys.stdlib_module_names), (act.name, top)


def test_the_file_in_the_package_is_in_step_with_the_records():
    path = modeling.Path(modeling.__file__).parent / modeling.MODELING_FILE
    assert path.read_text() == modeling.modeling_source(activations.get("xiprelu"))


def test_only_our_own_code_is_trusted(tmp_path):
    a = replace(BASE, activation=activations.get("xiprelu"))
    (tmp_path / "config.json").write_text(json.dumps(to_hf(a, "float32")))
    file = tmp_path / modeling.MODELING_FILE
    assert not modeling.is_ours(tmp_path)
    file.write_text(modeling.modeling_source(a.activation))
    assert modeling.is_ours(tmp_path)
    file.write_text(file.read_text() + "print()\n")
    assert not modeling.is_ours(tmp_path)
    with pytest.raises(ValueError, match="modeling_xact.py is not what this version .* export the checkpoint again"):
        load_hf(tmp_path)
