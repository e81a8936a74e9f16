"""The operators as PyTorch sees them: opcheck, torch.compile, checkpointing, torch.func; keys; backends."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_xact import activations
from megatron_xact.kernels import backends, ops, reference, toolchain
from megatron_xact.kernels.keys import key_of, record_of

VARIED = ["xielu", "xsilu_glu2", "relu2"]


class MLP(torch.nn.Module):
    """fc1, activation (with its raw parameters), fc2."""

    def __init__(self, name, **configuration):
        super().__init__()
        torch.manual_seed(0)
        self.record = activations.get(name, **configuration)
        self.fc1 = torch.nn.Linear(16, 64)
        self.fc2 = torch.nn.Linear(32 if self.record.gated else 64, 16)
        raw = {name: torch.nn.Parameter(torch.tensor([v])) for name, v in self.record.initial_raw().items()}
        self.raw = torch.nn.ParameterDict(raw)

    def forward(self, h):
        p = self.record.effective(dict(self.raw.items()))
        return self.fc2(ops.apply_activation(self.record, self.fc1(h), p))

    def results(self, call):
        """(output, gradient of the input and of every parameter) of one step through `call`."""
        h = torch.linspace(-2, 2, 4 * 6 * 16).reshape(4, 6, 16).requires_grad_()
        self.zero_grad()
        y = call(h)
        y.square().sum().backward()
        return [y.detach(), h.grad, *(parameter.grad.clone() for parameter in self.parameters())]


def arguments(name, fused, strided=False):
    """What the two operators take; gradients are wanted for all of it."""
    record = activations.get(name)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 64, generator=g)
    x = (x.transpose(0, 1) if strided else x).requires_grad_()
    learned = [torch.full((1,), 0.7, requires_grad=True) for _ in record.trainable]
    bias, scale = (torch.rand(s, generator=g, requires_grad=True) for s in (64, x.shape[:-1]))
    return x, learned, bias if fused else None, scale if fused else None, key_of(record)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "bias-scale"])
@pytest.mark.parametrize("name", VARIED)
def test_opcheck(name, fused, strided):
    given = arguments(name, fused, strided)
    torch.library.opcheck(torch.ops.xact.activation_forward.default, given)
    x, learned, bias, scale, key = given
    dy = torch.ones_like(torch.ops.xact.activation_forward(*given))
    detached = [t if t is None else t.detach() for t in (bias, scale)]
    given = (dy.detach(), x.detach(), [t.detach() for t in learned], *detached, key)
    torch.library.opcheck(torch.ops.xact.activation_backward.default, given)


@pytest.mark.parametrize("name", VARIED)
def test_bias_and_scale_have_the_gradients_of_autograd(name):
    record = activations.get(name)
    x, learned, bias, scale, _ = (
        [t.double().detach().requires_grad_() for t in a] if isinstance(a, list) else
        a.double().detach().requires_grad_() if isinstance(a, torch.Tensor) else a
        for a in arguments(name, fused=True)
    )  # fmt: skip
    symbols = [q.symbol for q in record.trainable]
    p = {q.symbol: q.init for q in record.parameters} | dict(zip(symbols, learned, strict=True))
    y = ops.apply_activation(record, x, p, bias=bias, scale=scale)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    leaves = [x, *learned, bias, scale]
    ours = torch.autograd.grad(y, leaves, dy)
    gate, up = (x + bias).chunk(2, -1) if record.gated else (x + bias, 1.0)
    true = record.value(gate, p) * up * scale.unsqueeze(-1)
    for a, b in zip((y, *ours), (true, *torch.autograd.grad(true, leaves, dy)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.compiler
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", VARIED)
def test_a_whole_mlp_compiles_to_one_graph(name, dynamic):
    mlp = MLP(name)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=dynamic)
    for ours, eager in zip(mlp.results(compiled), mlp.results(mlp), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.compiler
def test_a_compiled_mlp_follows_its_configuration():
    for beta in (0.5, 0.25):
        mlp = MLP("xielu", beta=beta)
        compiled = torch.compile(mlp, fullgraph=True)
        torch.testing.assert_close(mlp.results(compiled), mlp.results(mlp), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("name", VARIED)
def test_activation_checkpointing_changes_no_bit(name, reentrant):
    mlp = MLP(name)
    recomputed = mlp.results(lambda h: checkpoint(mlp, h, use_reentrant=reentrant))
    for ours, plain in zip(recomputed, mlp.results(mlp), strict=True):
        assert torch.equal(ours, plain)


def test_autocast_leaves_the_dtype_it_is_given():
    record = activations.get("relu2")
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert ops.apply_activation(record, torch.ones(3, dtype=dtype), {}).dtype == dtype


def test_torch_func_differentiates_and_batches():
    record = activations.get("xielu")

    def loss(x, a):
        return ops.apply_activation(record, x, {"a_p": a, "a_n": a, "b": 0.5}).square().sum()

    x, a = torch.linspace(-2, 2, 24).reshape(4, 6), torch.tensor([0.7])
    per_row = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), (0, None))(x, a)
    for i in range(len(x)):
        row, alpha = x[i].clone().requires_grad_(), a.clone().requires_grad_()
        for ours, true in zip(per_row, torch.autograd.grad(loss(row, alpha), (row, alpha)), strict=True):
            torch.testing.assert_close(ours[i], true)


def test_a_second_derivative_is_refused_and_never_silently_zero():
    record = activations.get("xielu")
    x = torch.linspace(-1, 1, 8, requires_grad=True)
    y = ops.apply_activation(record, x, {"a_p": torch.ones(1), "a_n": torch.ones(1), "b": 0.5})
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (dx.sum() + x.sum()).backward()


# Keys: a configured record as a string


@pytest.mark.parametrize("name", activations.names())
def test_a_record_survives_its_key(name):
    record = activations.get(name)
    assert record_of(key_of(record)) == record


def test_a_configured_record_survives_its_key():
    # alpha_n above beta = 0.9, which its default initial value would not be
    record = activations.get("xielu", trainable=("alpha_p",), eps=-1e-6, beta=0.9, alpha_n=1 / 3 + 1, alpha_p=0.1)
    key = key_of(record)
    assert record_of(key) == record and json.loads(key)["init"]["alpha_n"] == 1 / 3 + 1


def test_a_record_of_another_making_is_refused():
    from dataclasses import replace

    with pytest.raises(ValueError, match="'xielu' is not one that activations.get returns"):
        key_of(replace(activations.get("xielu"), formula="other"))


# Backends


@pytest.fixture
def automatic():
    yield
    backends.select_backend("auto")


def test_the_reference_can_be_asked_for(automatic):
    record, large = activations.get("xielu"), torch.zeros(1 << 20)
    ops.select_backend("reference")
    assert backends.backend_of(record, large) is reference


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run here")
def test_triton_asked_for_without_a_gpu_is_an_error_with_the_reason(automatic):
    with pytest.raises(ValueError, match="kernels = 'triton' cannot run here: torch sees no NVIDIA GPU; use 'auto'"):
        ops.select_backend("triton")
    assert ops.triton_unavailable_reason() == "torch sees no NVIDIA GPU"
    with pytest.raises(ValueError, match="kernels = 'cuda' is not one of auto, triton, reference"):
        ops.select_backend("cuda")


def test_a_gpu_that_runs_an_activation_unfused_says_why_once_for_each(automatic, monkeypatch, caplog):
    """No GPU is needed: all that is asked of the tensor is where it is and of what dtype."""
    from dataclasses import replace

    monkeypatch.setattr(backends, "_triton_is_there", lambda: True)
    backends._warn_unfused.cache_clear()
    xielu = activations.get("xielu")
    unknown = replace(xielu, name="mine", maths=object())
    many = replace(xielu, name="many", parameters=xielu.parameters * 2)
    there = {dtype: SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype) for dtype in
             (torch.float32, torch.float64)}  # fmt: skip
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert backends.backend_of(xielu, there[torch.float32]).__name__.endswith("triton_pointwise")
            for record, dtype in ((xielu, torch.float64), (unknown, torch.float32), (many, torch.float32)):
                assert backends.backend_of(record, there[dtype]) is reference
    told = [message for message in caplog.messages if "unfused on this GPU" in message]
    assert len(told) == 3
    assert told[0].startswith("xielu ") and told[0].endswith("no kernel computes in torch.float64")
    assert told[1].startswith("mine ") and "no device function" in told[1]
    assert told[2].startswith("many ") and "more than 3 parameters" in told[2]
    monkeypatch.setattr(backends, "_choice", "triton")
    with pytest.raises(ValueError, match="has no kernel for mine"):
        backends.backend_of(unknown, there[torch.float32])


def test_triton_needs_a_c_compiler_and_pythons_headers(monkeypatch, tmp_path):
    """As triton/runtime/build.py, which is asked what it would call, where it has a function for that (3.9)."""
    from triton.runtime import build

    if not hasattr(build, "_find_compiler"):
        pytest.skip("this Triton cannot be asked which compiler it would call")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    build._find_compiler.cache_clear()
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        build._find_compiler("c")
    assert toolchain.lacks_for_triton() == "Triton finds no C compiler (gcc or clang)"
    compiler = tmp_path / "clang"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert build._find_compiler("c") == str(compiler)
    assert "compiler" not in (toolchain.lacks_for_triton() or "")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert f"(no {tmp_path}/Python.h" in toolchain.lacks_for_triton()
    (tmp_path / "Python.h").touch()
    assert toolchain.lacks_for_triton() is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert toolchain.lacks_for_triton() == "Triton finds no C compiler (no-such-compiler)"


def test_every_activation_has_a_triton_kernel():
    from megatron_xact.kernels import device_functions
    from megatron_xact.kernels.triton_launch import unserved_reason

    for name in activations.names():
        assert unserved_reason(activations.get(name), torch.float32) is None, f"{name} has no device function"
    xielu = activations.get("xielu")
    assert device_functions.device_function(xielu) is not device_functions.device_function(activations.get("xiprelu"))
    assert "torch.float64" in unserved_reason(xielu, torch.float64)
    assert "eager code" in unserved_reason(activations.get("xielu", eps=-1e-6), torch.float32)
