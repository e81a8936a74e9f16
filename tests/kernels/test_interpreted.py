"""The forward and backward kernels, run by Triton's interpreter, against the records in fp64: every activation, odd
sizes, bias, scale, y again, and the sums that must come out with the same bits twice."""

import pytest
import torch
from accuracy import SERVED
from interpreter import in_interpreter

from megatron_xact import activations

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # the interpreter's rounding to bf16 is wrong


def inputs(record, shape, dtype, seed=1):
    """x, dy, bias, scale, p for y of this shape."""
    g = torch.Generator().manual_seed(seed)
    *rows, columns = shape
    width = columns * (1 + record.gated)
    x = 2 * torch.randn(*rows, width, generator=g)
    dy, bias, scale = (torch.randn(s, generator=g) for s in (shape, width, rows))
    p = {q.symbol: torch.tensor([0.3 + 0.4 * i]) if q.trainable else q.init for i, q in enumerate(record.parameters)}
    return x.to(dtype), dy.to(dtype), bias.to(dtype), scale, p


def exact(record, x, dy, bias, scale, p):
    """(y, gradients) by autograd through the formula in fp64."""
    leaves = {"x": x, "bias": bias, "scale": scale} | {k: v for k, v in p.items() if isinstance(v, torch.Tensor)}
    leaves = {k: v.double().requires_grad_() for k, v in leaves.items() if v is not None}
    z = leaves["x"] + leaves.get("bias", 0.0)
    gate, up = z.chunk(2, -1) if record.gated else (z, 1.0)
    y = record.value(gate, p | {k: v for k, v in leaves.items() if k in p}) * up
    y = y * leaves["scale"].unsqueeze(-1) if scale is not None else y
    y.backward(dy.double())
    return y.detach(), {k: v.grad for k, v in leaves.items()}


def assert_close(name, ours, true, terms=1.0):
    """Within twice a rounding to its own dtype, and 1e-5 of the largest value (or of `terms`, for what is summed)."""
    assert ours.shape == true.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(true.shape)}"
    if not true.numel():
        return
    rounding = (true.to(ours.dtype).double() - true).abs()
    error = ((ours.double() - true).abs() - 2 * rounding).max().item()
    assert error <= 1e-5 * max(true.abs().max().item(), terms), f"{name}: off by {error:.2e}"


def check(record, x, dy, bias, scale, p, dtype):
    from megatron_xact.kernels import triton_pointwise as kernels
    from megatron_xact.kernels.triton_launch import unserved_reason

    if unserved_reason(record, x.dtype):
        pytest.skip(f"{record.name} has no device function; test_nothing_is_missing says what to add")
    y, gradients = exact(record, x, dy, bias, scale, p)
    ours = kernels.forward(record, x, p, bias, scale)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_close("y", ours, y)
    back = kernels.backward(record, x, p, dy, bias, scale, emit_y=True)
    assert torch.equal(back.y, ours), "y of backward differs from y of forward"
    assert back.dx.dtype == dtype
    assert_close("dx", back.dx, gradients["x"])
    for symbol, value in back.parameters.items():
        assert value.dtype == torch.float32
        assert_close(symbol, value.reshape(1), gradients[symbol], terms=float(x.numel()) ** 0.5)
    for name in ("bias", "scale"):
        if name in gradients:
            assert_close(name, getattr(back, name), gradients[name], terms=10.0)
    again = kernels.backward(record, x, p, dy, bias, scale)
    assert again.y is None and torch.equal(again.dx, back.dx)
    assert all(torch.equal(again.parameters[s], v) for s, v in back.parameters.items()), "sums differ in a second run"


@pytest.mark.parametrize(
    "fused, dtype", [("plain", "fp16"), ("bias", "fp32"), ("scale", "fp32"), ("bias-scale", "fp16")]
)
@pytest.mark.parametrize("name", SERVED)
@in_interpreter
def test_kernels(name, fused, dtype):
    record = activations.get(name)
    x, dy, bias, scale, p = inputs(record, (5, 9, 200), DTYPES[dtype])  # neither tiles nor vectors divide it
    check(record, x, dy, bias if "bias" in fused else None, scale if "scale" in fused else None, p, DTYPES[dtype])


@pytest.mark.parametrize("name", ["xielu", "xsilu_glu2"])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (0, 64), (4, 0), (2, 3, 4, 5), (1, 4096), (33, 384)], ids=str)
@in_interpreter
def test_shapes(name, shape):
    record = activations.get(name)
    x, dy, bias, scale, p = inputs(record, shape, torch.float32)
    check(record, x, dy, None, None, p, torch.float32)
    if len(shape) > 1:
        check(record, x, dy, bias, scale, p, torch.float32)


@in_interpreter
def test_a_scalar_and_a_program_per_row():
    record = activations.get("xielu")
    x, dy, _, _, p = inputs(record, (1,), torch.float32)
    check(record, x[0], dy[0], None, None, p, torch.float32)


@in_interpreter
def test_fixed_and_other_learned_parameters():
    for trainable in ((), ("alpha_n",), ("alpha_p", "beta"), ("alpha_p", "alpha_n", "beta")):
        record = activations.get("xielu", trainable=trainable)
        x, dy, _, _, p = inputs(record, (3, 50), torch.float32)
        check(record, x, dy, None, None, dict(reversed(p.items())), torch.float32)  # in any order


@in_interpreter
def test_strided_inputs():
    record = activations.get("xsilu_glu2")
    x, dy, bias, scale, p = inputs(record, (6, 40), torch.float32)
    strided = torch.stack([x, x], -1)[..., 0].T.contiguous().T
    check(record, strided, dy.T.contiguous().T, bias, scale, p, torch.float32)


@in_interpreter
def test_bf16_inputs_are_read_exactly():
    """Into an fp32 y, since only the rounding to bf16 cannot be tested here."""
    from megatron_xact.kernels import triton_pointwise as kernels
    from megatron_xact.kernels.triton_launch import slots

    record = activations.get("xielu")
    x, _, _, _, p = inputs(record, (4097,), torch.bfloat16)
    y = torch.empty(x.shape)
    grid, options = kernels.launch(record, p, kernels.FORWARD, 1, x.numel())
    kernels.forward_kernel[grid](x, y, None, None, *slots(record, p), 1, x.numel(), **options)
    truth = record.value(x.double(), {s: v.double() if isinstance(v, torch.Tensor) else v for s, v in p.items()})
    assert_close("y", y, truth)


@in_interpreter
def test_sums_over_a_million_elements():
    from megatron_xact.kernels import triton_pointwise as kernels

    record = activations.get("xielu")
    x, dy, _, _, p = inputs(record, (1 << 20,), torch.float32)
    p64 = {s: v.double() if isinstance(v, torch.Tensor) else v for s, v in p.items()}
    for gradient in (dy.abs(), dy):  # no cancellation; and nearly all of it cancels
        ours = kernels.backward(record, x, p, gradient).parameters
        true = record.backward(x.double(), p64, gradient.double())[1]
        magnitudes = record.backward(x.double(), p64, gradient.abs().double())[1]
        for symbol, value in ours.items():
            error = abs(value.double() - true[symbol])
            assert error <= max(1e-5 * true[symbol].abs(), 1e-6 * magnitudes[symbol]), f"{symbol}: off by {error:.2e}"


@in_interpreter
def test_an_odd_last_dimension_is_refused_where_gated():
    from megatron_xact.kernels import triton_pointwise as kernels

    record = activations.get("swiglu")
    with pytest.raises(ValueError, match=r"splits the last dimension in two; got shape \(3, 5\)"):
        kernels.forward(record, torch.zeros(3, 5), {})


def test_a_failing_body_fails_the_test():
    with pytest.raises(AssertionError, match="planted"):
        planted()


@in_interpreter
def planted():
    raise AssertionError("planted")
