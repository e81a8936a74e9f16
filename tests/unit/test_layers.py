"""What layers are made of, in one process: norm and attention against fp64 maths, alpha's dtype, specs and refusals.

Everything that needs more than one rank is in tests/distributed.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import import_module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.config.yaml_utils import safe_yaml_representers
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_xact import activations
from megatron_xact.layers import coverage, fused_mlp, specs
from megatron_xact.layers.activation import TrainableActivation
from megatron_xact.layers.coverage import Unsupported
from megatron_xact.layers.local import Norm, ScaledDotProductAttention
from megatron_xact.layers.parallel_linear import added_to_main_grad

FP32 = 1e-6  # relative, in norm, against fp64


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """A world of one rank: Megatron's process groups, for real."""
    rendezvous = tmp_path_factory.mktemp("gloo") / "rendezvous"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def config(kind=TransformerConfig, **changes):
    settings = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
    }
    return kind(**settings | changes)


def gpt(transformer, activation="xielu") -> GPTModelConfig:
    return GPTModelConfig(
        transformer=transformer,
        transformer_layer_spec=getattr(specs, activation),
        vocab_size=64,
        seq_length=16,
        position_embedding_type="rope",
    )


def assert_close(mine: torch.Tensor, truth: torch.Tensor) -> None:
    assert mine.dtype == torch.float32 and truth.dtype == torch.float64 and mine.shape == truth.shape
    error = (mine - truth).norm() / truth.norm()
    assert error <= FP32, f"{error:.1e}"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- norm and attention -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norm_against_its_formula(kind):
    eps = 1e-2  # large enough to show if it were left out
    norm = Norm(config(normalization=kind), 32, eps=eps)
    x, dy = random(16, 2, 32).requires_grad_(), random(16, 2, 32, seed=1)
    for i, parameter in enumerate(norm.parameters()):
        parameter.data.copy_(random(32, seed=2 + i))
    norm(x).backward(dy)

    x64 = x.detach().double().requires_grad_()
    leaves = {name: p.detach().double().requires_grad_() for name, p in norm.named_parameters()}
    centred = x64 - x64.mean(-1, keepdim=True) if kind == "LayerNorm" else x64
    y64 = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * leaves["weight"] + leaves.get("bias", 0.0)
    y64.backward(dy.double())
    assert_close(norm(x), y64)
    assert_close(x.grad, x64.grad)
    for name, parameter in norm.named_parameters():
        assert_close(parameter.grad, leaves[name].grad)


def test_norm_is_marked_for_sequence_parallelism():
    for wanted in (False, True):
        transformer = config(normalization="LayerNorm")
        transformer.sequence_parallel = wanted  # in the constructor it would need tensor parallelism
        assert [p.sequence_parallel for p in Norm(transformer, 32).parameters()] == [wanted, wanted]


def test_norm_refuses_what_only_transformer_engine_has():
    with pytest.raises(ValueError, match="'RMSNorm' .zero-centered gamma: True. needs TransformerEngine"):
        Norm(config(layernorm_zero_centered_gamma=True), 32)
    transformer = config()
    transformer.normalization = "BatchNorm"
    with pytest.raises(ValueError, match="'BatchNorm'.*use RMSNorm or LayerNorm"):
        Norm(transformer, 32)


def attention(**changes) -> ScaledDotProductAttention:
    changes = {"attn_mask_type": AttnMaskType.causal} | changes
    transformer = changes.pop("config", None) or config()
    return ScaledDotProductAttention(transformer, layer_number=1, attention_type="self", **changes)


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_against_explicit_softmax(kv_heads, scale):
    s, b, heads, d = 12, 2, 8, 16
    q, k, v = (random(s, b, n, d, seed=n + i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    dy = random(s, b, heads * d, seed=99)
    mine = [t.clone().requires_grad_() for t in (q, k, v)]
    y = attention(softmax_scale=scale)(*mine, attention_mask=None)
    y.backward(dy)

    truth = [t.double().requires_grad_() for t in (q, k, v)]
    of_head = torch.arange(heads) // (heads // kv_heads)  # neighbouring query heads share a kv head, as in Megatron
    scores = torch.einsum("qbhd,kbhd->bhqk", truth[0], truth[1][:, :, of_head]) * (scale or d**-0.5)
    future = torch.arange(s)[None, :] > torch.arange(s)[:, None]
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    y64 = torch.einsum("bhqk,kbhd->qbhd", weights, truth[2][:, :, of_head]).reshape(s, b, heads * d)
    y64.backward(dy.double())

    assert_close(y, y64)
    for ours, theirs in zip(mine, truth, strict=True):
        assert_close(ours.grad, theirs.grad)


def test_attention_dropout_only_in_training():
    core = attention(attention_dropout=0.5)
    q = random(12, 2, 8, 16)
    assert not torch.equal(core(q, q, q, None), core(q, q, q, None))
    core.eval()
    assert torch.equal(core(q, q, q, None), attention()(q, q, q, None))


def test_attention_refuses_what_it_would_get_wrong():
    transformer = config()
    transformer.context_parallel_size = 2
    with pytest.raises(ValueError, match="context-parallel-size 2 needs Trans.*use context-parallel-size 1"):
        attention(config=transformer)
    with pytest.raises(ValueError, match="causal only"):
        attention(attn_mask_type=AttnMaskType.padding)
    q = random(4, 1, 8, 16)
    for unsupported in ({"packed_seq_params": PackedSeqParams()}, {"attention_bias": torch.zeros(1)}):
        with pytest.raises(ValueError, match="packed sequences and attention bias need TransformerEngine"):
            attention()(q, q, q, None, **unsupported)
    with pytest.raises(ValueError, match="1 queries, 4 keys"):  # of which the query would see the first only
        attention()(q[-1:], q, q, None)


# --- alpha's dtype and name -------------------------------------------------------------------------------------------
CASTS = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "double()": lambda m: m.double(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(cpu, bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
    "type(float16)": lambda m: m.type(torch.float16),
    "Float16Module": lambda m: Float16Module(config(bf16=True, params_dtype=torch.bfloat16), m).module,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_alpha_stays_in_fp32_to_the_bit(groups, cast):
    activation = activations.get("xielu", alpha_p=0.7654321, alpha_n=0.9876543)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), TrainableActivation(activation, groups.tp))
    before = {name: p.detach().clone() for name, p in module[1].named_parameters()}
    same = dict(module[1].named_parameters())
    cast(module)
    assert module[0].weight.dtype != torch.float32
    assert set(before) == {"alpha_p", "alpha_n"}
    for name, parameter in module[1].named_parameters():
        assert parameter is same[name] and parameter.requires_grad
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])


def test_alpha_follows_to_another_device(groups):
    for move in (
        lambda m: m.to("meta"),
        lambda m: m.to("meta", torch.bfloat16),
        lambda m: m.to_empty(device="meta"),
    ):
        module = move(TrainableActivation(activations.get("xielu"), groups.tp))
        assert [(p.device.type, p.dtype, p.shape) for p in module.parameters()] == [("meta", torch.float32, (1,))] * 2
    back = module.to_empty(device="cpu")
    assert [(p.device.type, p.dtype) for p in back.parameters()] == [("cpu", torch.float32)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_output_has_the_input_dtype_and_alpha_an_fp32_gradient(groups, dtype):
    module = TrainableActivation(activations.get("xielu"), groups.tp)
    x = random(8, 2, 16).to(dtype).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


def test_effective_values_are_what_was_asked_for(groups):
    asked = {"alpha_p": 1.25, "alpha_n": 0.75}
    module = TrainableActivation(activations.get("xielu", **asked), groups.tp)
    assert {n: v.item() for n, v in module.effective_values().items()} == pytest.approx(asked, rel=1e-6)
    assert TrainableActivation(activations.get("relu"), groups.tp).effective_values() == {}


def test_state_dict_of_a_whole_model(groups):
    """The names and shapes that existing xIELU checkpoints have; they load back."""
    [model] = GPTModelBuilder(gpt(config())).build_distributed_models(
        groups, wrap_with_ddp=False, mixed_precision_wrapper=None
    )
    alphas = {name: value for name, value in model.state_dict().items() if "alpha" in name}
    assert {name: (value.shape, value.dtype) for name, value in alphas.items()} == {
        f"decoder.layers.{layer}.mlp.activation_func.{name}": ((1,), torch.float32)
        for layer in (0, 1)
        for name in ("alpha_p", "alpha_n")
    }
    state = model.state_dict()
    state["decoder.layers.1.mlp.activation_func.alpha_p"] = torch.tensor([3.25])
    model.load_state_dict(state)
    assert model.decoder.layers[1].mlp.activation_func.alpha_p.item() == 3.25
    # One record for all layers, but parameters of their own.
    assert model.decoder.layers[0].mlp.activation_func.alpha_p.item() != 3.25


# --- weight gradients that are added into main_grad -------------------------------------------------------------------
def test_a_gradient_that_somebody_will_add_is_zero():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    torch.use_deterministic_algorithms(True)  # fills what is allocated and not written with NaN
    try:
        stand_in = added_to_main_grad(weight, torch.ones(4, 3), torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert weight.grad_added_to_main_grad
    assert torch.equal(stand_in, torch.zeros(4, 3, dtype=torch.bfloat16))


def test_megatrons_kernel_is_the_one_for_main_grads_dtype(monkeypatch):
    """apex's, which adds into 32 or 16 bits of whatever it is given."""
    called = []
    kernels = {f"wgrad_gemm_accum_fp{bits}": lambda *tensors, bits=bits: called.append(bits) for bits in (16, 32)}
    monkeypatch.setattr(megatron_layers, "fused_weight_gradient_mlp_cuda", SimpleNamespace(**kernels), raising=False)
    weight, x, dy = torch.nn.Parameter(torch.ones(4, 3)), torch.ones(2, 3), torch.ones(2, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        main_grad = torch.zeros(4, 3, dtype=dtype)
        fused_mlp._weight_gradient(weight, main_grad, x, dy, SimpleNamespace(accumulate=True))
        assert weight.main_grad is main_grad
    assert called == [32, 16, 16]
    with pytest.raises(RuntimeError, match="gradients in torch.float64 cannot be accumulated"):
        fused_mlp._weight_gradient(weight, main_grad.double(), x, dy, SimpleNamespace(accumulate=True))


# --- specs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", activations.names())
def test_megatron_finds_the_spec_of_every_activation(groups, name):
    found = import_module(("megatron_xact.layers.specs", name))
    block = found(gpt(config(gated_linear_unit=activations.get(name).gated)))
    assert block.layer_specs[0].submodules.mlp.keywords["activation"] == activations.get(name)


def test_megatron_finds_a_spec_in_a_process_that_never_heard_of_us():
    program = (
        "from megatron.core.transformer.spec_utils import import_module\n"
        "found = import_module(('megatron_xact.layers.specs', 'xielu'))\n"
        "print(found.__module__, found.__qualname__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "megatron_xact.layers.specs xielu"


def test_a_config_saved_by_name_finds_the_spec_again():
    """As Megatron's representers for YAML, which Megatron-Bridge uses, write it: as a function by its name."""
    with safe_yaml_representers():
        written = yaml.safe_load(yaml.safe_dump(specs.xielu))
    assert written == {"_target_": "megatron_xact.layers.specs.xielu", "_call_": False}


def test_a_spec_says_that_it_is_in(groups, capsys):
    specs.xielu(gpt(config()))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "megatron-xact" in line]
    assert "xielu in every MLP" in line and activations.get("xielu").formula in line
    assert "trainable: alpha_p, alpha_n" in line and line.endswith("local layer")
    specs.relu(gpt(config()))
    assert "trainable: none" in capsys.readouterr().out


def test_a_spec_names_the_flag_whose_activation_it_replaces(groups, capsys):
    specs.xielu(gpt(config(activation_func=squared_relu)))
    assert "xielu in every MLP (in the place of --squared-relu), x > 0" in capsys.readouterr().out
    specs.xielu(gpt(config()))
    assert "in the place of" not in capsys.readouterr().out


def test_a_spec_says_that_transformer_engine_is_missing(groups, capsys):
    if specs.HAVE_TE:
        pytest.skip("TransformerEngine is installed here")
    specs.xielu(gpt(config(transformer_impl="transformer_engine")))
    assert "local (TransformerEngine is not installed) layer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("activation", "swiglu", "way_out"),
    [("xsilu_glu1", False, "add --swiglu"), ("swiglu", False, "add --swiglu"), ("xielu", True, "remove --swiglu")],
)
def test_gatedness_must_match_the_config(groups, activation, swiglu, way_out):
    """Otherwise fc1 would have half or twice the rows that the activation takes."""
    with pytest.raises(ValueError, match=f"'{activation}' is .*gated_linear_unit is {swiglu}: {way_out}"):
        GPTModelBuilder(gpt(config(gated_linear_unit=swiglu), activation)).build_model(groups)


REFUSED = {
    "mixture of experts": partial(config, num_moe_experts=2),
    "multi-latent attention": partial(config, MLATransformerConfig, multi_latent_attention=True),
    "multi-token prediction": partial(config, mtp_num_layers=1),
}


@pytest.mark.parametrize("feature", REFUSED)
def test_refuses_what_the_spec_does_not_cover(groups, feature):
    with pytest.raises(Unsupported, match=f"{feature}.* is not supported.*leave it out"):
        specs.xielu(gpt(REFUSED[feature]()))


@pytest.mark.parametrize(
    "key, what",
    [
        ("hybrid_layer_pattern", "layers of several kinds"),
        ("heterogeneous_layers_config_path", "layers of several kinds"),
        ("enable_mhc_connections", "hyper-connections"),  # Megatron 0.20
    ],
)
def test_refuses_layers_that_it_does_not_build(key, what):
    with pytest.raises(Unsupported, match=f"{what} .{key.replace('_', '-')} = 'x'. is not supported"):
        coverage.refuse(Namespace(**{key: "x"}), None)


@pytest.mark.parametrize("key, value", [("fp8", "hybrid"), ("window_size", (8, 0)), ("softmax_type", "off-by-one")])
def test_refuses_what_the_local_layer_would_leave_out(groups, key, value):
    """Through `--spec` too, where Megatron asks nobody before it trains without."""
    transformer = config()
    setattr(transformer, key, value)
    with pytest.raises(Unsupported, match=r"needs Transf.*the local one \(transformer-impl = 'local'\)"):
        specs.xielu(gpt(transformer))
