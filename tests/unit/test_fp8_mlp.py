"""The MLP with FP8 products as PyTorch sees it, on one rank: compiled, checkpointed, under autocast and torch.func.

What it computes, and on more ranks, is a matter of tests/distributed/test_fused_mlp.py.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from test_layers import config, groups, random  # noqa: F401 (a fixture)
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from megatron_xact import activations
from megatron_xact.kernels import linear, mlp_choice
from megatron_xact.layers import fp8_mlp, fused_mlp
from megatron_xact.layers.mlp import ActivationMLP


@pytest.fixture
def layer(request, groups):  # noqa: F811
    """One layer's MLP that is in FP8, of the activation and settings of the test's parameter (or xIELU)."""
    name, *settings = getattr(request, "param", ("xielu",))
    record = activations.get(name)
    mlp_choice.select_mlp(mlp_choice.FP8)
    fp8_mlp.select(fp8_mlp.Settings(*settings))
    submodules = get_gpt_layer_local_submodules(normalization="RMSNorm").mlp.keywords["submodules"]
    transformer = config(gated_linear_unit=record.gated, add_bias_linear=True, params_dtype=torch.bfloat16)
    torch.manual_seed(0)
    mlp = ActivationMLP(transformer, submodules, ffn_hidden_size=64, tp_group=groups.tp, activation=record)
    mlp.set_layer_number(1)
    results(mlp.eval(), mlp)  # what way to go is decided in the first call, which prints it
    mlp.train()
    assert mlp.way.backend == mlp_choice.FP8
    yield mlp
    mlp_choice.select_mlp(linear.UNFUSED)
    fp8_mlp.select(fp8_mlp.Settings())


def results(mlp, call, tokens=12) -> list[torch.Tensor]:
    """[out, fc2's bias, gradients of the input and of every parameter] of one step through `call`."""
    x = random(tokens, 2, 32).bfloat16().requires_grad_()
    out, bias = call(x)
    leaves = [x, *(p for p in mlp.parameters() if p is not bias)]
    return [out.detach(), bias.detach(), *torch.autograd.grad(out, leaves, random(*out.shape, seed=1).bfloat16())]


def assert_same_bits(ours, eager) -> None:
    assert len(ours) == len(eager)
    for a, b in zip(ours, eager, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.compiler
@pytest.mark.parametrize("layer", [("xielu",), ("xsilu_glu2", True, "e5m2")], indirect=True, ids=["xielu", "gated"])
def test_it_compiles_to_one_graph_with_the_bits_of_eager_code(layer):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (12, 20):
        assert_same_bits(results(layer, compiled, tokens), results(layer, layer, tokens))
    assert counters["stats"]["unique_graphs"] == 1 and sum(counters["graph_break"].values()) == 0


@pytest.mark.parametrize("layer", [("xielu",), ("xielu", True)], indirect=True, ids=["plain", "smooth"])
def test_no_tokens_have_no_gradients(layer):
    out, _, dx, *gradients = results(layer, layer, tokens=0)
    assert out.shape == dx.shape == (0, 2, 32) and not any(gradient.any() for gradient in gradients)


def test_an_overflow_is_seen_in_every_gradient_before_it(layer):
    """FP8 saturates: a loss scale would never be lowered, and the step not be skipped."""
    x = random(12, 2, 32).bfloat16().requires_grad_()
    out, _ = layer(x)
    dout = random(*out.shape, seed=1).bfloat16()
    dout[3, 1, 7] = -torch.inf
    gradients = torch.autograd.grad(out, [x, layer.linear_fc1.weight, layer.linear_fc2.weight], dout)
    assert not any(gradient.isfinite().all() for gradient in gradients)


def test_checkpointing_changes_no_bit(layer):
    recomputed = results(layer, lambda x: checkpoint(layer, x, use_reentrant=False))
    assert_same_bits(recomputed, results(layer, layer))


def test_autocast_changes_no_bit(layer):
    def call(x):
        with torch.autocast("cpu", torch.float16):
            return layer(x)

    assert_same_bits(results(layer, call), results(layer, layer))


def test_first_and_last_layers_are_kept_out_by_megatrons_option(layer):
    layer.config.num_layers, layer.config.first_last_layers_bf16 = 5, True
    layer.config.num_layers_at_start_in_bf16, layer.config.num_layers_at_end_in_bf16 = 2, 1
    backends = []
    for number in range(1, 6):
        layer.set_layer_number(number)
        layer.way = None
        layer(random(4, 2, 32).bfloat16())
        backends.append(layer.way.backend)
    assert backends == ["unfused", "unfused", "fp8", "fp8", "unfused"]


@pytest.mark.parametrize("backend", ["fp8", "unfused"])
def test_a_second_derivative_is_refused(layer, backend):
    x, dout = (random(12, 2, 32, seed=seed).bfloat16().requires_grad_() for seed in (0, 1))
    out, _ = fused_mlp.run(layer, x, linear.Way(backend))
    (dx,) = torch.autograd.grad(out, x, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_transforms_are_refused(layer):
    x = random(12, 2, 32).bfloat16()
    with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
        torch.func.grad(lambda x: layer(x)[0].sum())(x)
    with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
        torch.func.vmap(lambda x: layer(x)[0])(x.expand(2, -1, -1, -1))
