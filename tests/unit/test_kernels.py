"""The one door `apply_activation`: gradients, what it saves, and the fused CPU path against fp64."""

import logging
import re
from pathlib import Path

import pytest
import torch

from megatron_xact import activations
from megatron_xact.kernels import cpu, ops, reference, toolchain
from megatron_xact.kernels.backends import backend_of


def raw_parameters(record, dtype=torch.float32):
    return {name: torch.tensor([raw], dtype=dtype, requires_grad=True) for name, raw in record.initial_raw().items()}


def inputs(record, rows, dtype, width=64):
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(rows, width * (1 + record.gated), generator=generator, dtype=torch.float64)
    dy = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), dy.to(dtype)


def forward_backward(record, x, dy):
    """(y, dx, {name: gradient of the raw parameter}) through the door."""
    x = x.detach().requires_grad_()
    raw = raw_parameters(record, torch.promote_types(x.dtype, torch.float32))
    y = ops.apply_activation(record, x, record.effective(raw))
    y.backward(dy)
    return y.detach(), x.grad, {name: parameter.grad for name, parameter in raw.items()}


@pytest.mark.parametrize("name", activations.names())
def test_gradients_are_those_of_autograd_through_the_formula(name):
    record = activations.get(name)
    x, dy = inputs(record, 3, torch.float64)
    y, dx, draw = forward_backward(record, x, dy)

    x = x.detach().requires_grad_()
    raw = raw_parameters(record, torch.float64)
    p = record.effective(raw)
    gate, up = x.chunk(2, -1) if record.gated else (x, 1.0)
    truth = record.value(gate, p) * up
    truth.backward(dy)
    torch.testing.assert_close(y, truth.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dx, x.grad, rtol=1e-12, atol=1e-14)
    for key, gradient in draw.items():
        torch.testing.assert_close(gradient, raw[key].grad, rtol=1e-11, atol=1e-13)


def test_only_the_input_and_the_parameters_are_kept_for_backward():
    record = activations.get("xielu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.randn(8, 64, requires_grad=True)
        p = {symbol: torch.tensor([0.8], requires_grad=True) for symbol in ("a_p", "a_n")} | {"b": 0.5}
        ops.apply_activation(record, x, p)
    assert sorted(t.numel() for t in saved) == [1, 1, 8 * 64]


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["xielu", "xsilu_glu2"])
def test_fused_cpu_path_is_as_good_as_the_reference(name, dtype):
    record = activations.get(name)
    x, dy = inputs(record, cpu.MIN_ELEMENTS // 64, dtype)
    assert cpu.serves(x)
    fused = forward_backward(record, x, dy)
    truth = forward_backward(record, x.double(), dy.double())

    p = record.effective({key: value.detach() for key, value in raw_parameters(record).items()})
    plain = (reference.forward(record, x, p), reference.backward(record, x, p, dy)[0])
    for ours, eager, true in zip(fused[:2], plain, truth[:2], strict=True):
        assert ours.dtype == dtype
        allowed = 2 * (eager.double() - true).abs().max() + 1e-6
        assert (ours.double() - true).abs().max() <= allowed
    for key, gradient in fused[2].items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), truth[2][key], rtol=1e-5, atol=0)


@pytest.mark.compiler
def test_fused_cpu_path_gives_the_same_bits_twice():
    record = activations.get("xielu")
    x, dy = inputs(record, cpu.MIN_ELEMENTS // 64, torch.float32)
    (y1, dx1, d1), (y2, dx2, d2) = forward_backward(record, x, dy), forward_backward(record, x, dy)
    assert torch.equal(y1, y2) and torch.equal(dx1, dx2)
    assert all(torch.equal(d1[key], d2[key]) for key in d1)


@pytest.mark.compiler
def test_the_compiled_backward_is_one_pass_for_any_number_of_rows():
    """dx in both halves and the sum; and no constant of a record (here the 2 of x^2) is left to be computed with."""
    from torch._dynamo import config
    from torch._inductor.utils import run_and_get_code

    for name in ("xsilu_glu2", "xiprelu"):
        record = activations.get(name)
        p = {q.symbol: torch.tensor([q.init]) if q.trainable else q.init for q in record.parameters}
        x, dy = inputs(record, cpu.MIN_ELEMENTS // 64, torch.bfloat16)
        _, codes = run_and_get_code(cpu.backward, record, x, p, dy)
        assert len(codes) == 1 and codes[0].count("for(int64_t x0=") == 1 and ".pow(" not in codes[0]
        x, dy = inputs(record, 3000, torch.bfloat16)
        with config.patch(error_on_recompile=True):
            result = cpu.backward(record, x.view(1000, 3, -1), p, dy.view(1000, 3, -1))
        torch.testing.assert_close(result.dx.view_as(x), reference.backward(record, x, p, dy).dx, rtol=2**-7, atol=0)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="no huge pages here")
def test_large_results_ask_for_huge_pages():
    result = cpu._empty((cpu.ALWAYS_FRESH,), torch.float16)
    inside = result.data_ptr() + result.nbytes // 2
    places = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]
    ranges = [[int(end, 16) for end in place.split()[0].split("-")] for place in places]
    (place,) = (place for place, (start, end) in zip(places, ranges, strict=True) if start <= inside < end)
    assert "hg" in re.search(r"VmFlags:(.*)", place)[1].split()


def test_small_fp64_and_clamped_inputs_are_served_by_the_reference():
    large = torch.zeros(cpu.MIN_ELEMENTS)
    assert not cpu.serves(large[:-1]) and not cpu.serves(large.double())
    assert backend_of(activations.get("xielu", eps=-1e-6), large) is reference


@pytest.mark.parametrize("how", ["TORCHINDUCTOR_CACHE_DIR", "tempdir"])
def test_a_path_that_the_compiler_would_get_in_two_words_is_told(how, tmp_path, monkeypatch):
    """torch.compile does not quote the paths it gives to g++: in a clone below "my models" it would end the run."""
    monkeypatch.setattr(toolchain, "_lacks", lambda *_: None)
    monkeypatch.setattr(toolchain.tempfile, "tempdir", "/tmp")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda *_: "/include")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert toolchain.lacks_for_torch() is None
    if how == "tempdir":
        monkeypatch.setattr(toolchain.tempfile, "tempdir", "/home/my models")
    else:
        monkeypatch.setenv(how, "/home/my models")
    assert toolchain.lacks_for_torch() == (
        "torch.compile's C++ compiler gets no path with a space or a quote (/home/my models)"
    )


def test_without_a_compiler_it_says_so_once_and_works(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu._available.cache_clear()
    try:
        record = activations.get("xielu")
        x, dy = inputs(record, cpu.MIN_ELEMENTS // 64, torch.float32)
        with caplog.at_level(logging.WARNING):
            y, _, _ = forward_backward(record, x, dy)
            forward_backward(record, x, dy)
        assert sum("no-such-compiler" in message for message in caplog.messages) == 1
        p = record.effective({key: value.detach() for key, value in raw_parameters(record).items()})
        assert torch.equal(y, record.forward(x, p))
    finally:
        cpu._available.cache_clear()
