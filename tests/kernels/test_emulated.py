"""What the kernels compile to, run on the CPU (see `ptx`), against the records in fp64: with fused multiply-adds, with
special functions as far off as a GPU's may be, and rounded to bf16 and FP8, none of which the interpreter does."""

import ptx_arithmetic
import pytest
import test_fp8
import test_fused_linear
import torch
import triton
import triton.language as tl
from accuracy import DTYPES, NAMES, excess, parameters, sample, truth
from emulated import emulated_gpu
from probe import evaluate
from test_interpreted import assert_close, check, inputs

from megatron_xact import activations
from megatron_xact.kernels import fp8, reference, triton_fp8, triton_gemm, triton_gemm_parts, triton_pointwise


def worst(name: str, dtype: str, moved: bool) -> dict[str, float]:
    """Largest errors of value and derivatives, in bounds of `accuracy`."""
    record, x = activations.get(name), sample(DTYPES[dtype])
    p = parameters(record, moved)
    with emulated_gpu(seed=moved):
        ours = evaluate(record, x, p, exact=dtype != "bf16")
    true = truth(record, x, p)
    return {key: excess(record, key, x, p, ours[key], true[key], DTYPES[dtype])[0] for key in true}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_derivatives(name, dtype):
    for moved in (False, True):
        errors = worst(name, dtype, moved)
        assert max(errors.values()) <= 1, f"times the bound: {errors}"


@pytest.mark.parametrize(
    "name, shape", [(name, (5, 9, 200)) for name in activations.names()] + [("xielu", (9, 256)), ("swiglu", (9, 256))]
)
def test_kernels(name, shape):
    record = activations.get(name)
    x, dy, _, _, p = inputs(record, shape, torch.bfloat16)
    with emulated_gpu(seed=0):
        check(record, x, dy, None, None, p, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["xielu", "relu2", "xsilu_glu2"])
def test_kernels_with_bias_and_scale(name, dtype):
    record = activations.get(name)
    with emulated_gpu(arch=80, seed=0):
        check(record, *inputs(record, (5, 9, 200), dtype), dtype)


@pytest.mark.parametrize("name, kind, rows, of_x", [
    ("xielu", "e4m3fn", 75, "bfloat16"), ("xielu", "e4m3fn", 74, "bfloat16"), ("xielu", "e5m2", 72, "float16"),
    ("xsilu_glu2", "e5m2", 72, "bfloat16"), ("swiglu", "e4m3fn", 75, "float32"), ("swiglu", "e5m2", 72, "bfloat16"),
])  # fmt: skip
def test_fp8_kernels(name, kind, rows, of_x):
    """Of twice as many rows, and in three tiles beside each other where they are 2 x 74.

    Transposed, 75 are stored as bytes, 74 in words of four, and 72 four words at a time.
    """
    dtype = getattr(torch, f"float8_{kind}")
    record, largest, tolerance = activations.get(name), test_fp8.LARGEST[dtype], test_fp8.half_a_step(dtype)
    x, dy, bias, p = test_fp8.inputs(record, (2, rows, 256 if record.gated else 272 if rows == 74 else 200))
    x, dy, bias = (t.to(getattr(torch, of_x)) for t in (x, dy, bias))
    y, dx, sums, dbias = test_fp8.exact(record, x, dy, bias, p)
    for scaling in (fp8.Blockwise(), fp8.PerTensor(torch.tensor([0.25]))):
        with emulated_gpu(seed=0), test_fused_linear.poison():
            ours = triton_fp8.forward(record, x, p, scaling, dtype, True, True, bias, None)
            back = triton_fp8.backward(record, x, p, dy, scaling, dtype, True, True, bias)
        assert_close("bias", back.bias, dbias, terms=x.numel() ** 0.5)
        assert back.parameters.keys() == sums.keys()
        for symbol, value in back.parameters.items():
            assert_close(symbol, value.reshape(1), sums[symbol], terms=x.numel() ** 0.5)
        for true, q in ((y, ours), (dx, back.dx)):
            if isinstance(scaling, fp8.Blockwise):
                test_fp8.check_blocks(true, q.rows_RC, q.row_scale_inv, largest, True, tolerance)
                test_fp8.check_blocks(true.T, q.columns_CR, q.column_scale_inv, largest, True, tolerance)
            else:
                assert q.amax.item() == pytest.approx(true.abs().max().item(), rel=1e-5)
                true = true.clamp(-4 * largest, 4 * largest)
                assert q.row_scale_inv.item() == q.column_scale_inv.item() == 4.0
                assert ((q.rows_RC.double() * 4 - true).abs() <= tolerance(true.abs(), 4.0)).all()
                assert torch.equal(q.columns_CR.T.float(), q.rows_RC.float())


@pytest.mark.parametrize("name, arch, sizes", [
    ("xielu", 80, "pointers"), ("relu2", 80, "tma"), ("xsilu_glu2", 80, "tma"),
    ("xielu", 90, "tma"), ("relu2", 90, "tma"), ("xsilu_glu2", 90, "pointers"),
])  # fmt: skip
def test_products_with_their_activation(name, arch, sizes, monkeypatch):
    """Two threads of a warp that sum up the same to different bits are an error here too."""
    record = activations.get(name)
    monkeypatch.setattr(triton_gemm, "_is_hopper", lambda device: arch == 90)
    given = test_fused_linear.inputs(record, test_fused_linear.SIZES[sizes], torch.bfloat16)
    with emulated_gpu(arch, seed=0):
        test_fused_linear.check(triton_gemm, record, *given)


@pytest.mark.parametrize("name", ["xgelu", "silu"])
def test_products_in_fp16_are_as_exact_as_the_pointwise_kernels(name):
    """The approximations that are good enough for bf16 are not for fp16."""
    record, dtype = activations.get(name), torch.float16
    p = parameters(record, moved=False)
    x = sample(dtype)
    x = x[(x.abs() < 4) & (x.abs() > 0.1)][:2048].view(-1, 16)
    learned = {q.symbol: torch.tensor([p[q.symbol]]) if q.trainable else p[q.symbol] for q in record.parameters}
    with emulated_gpu(80, seed=0):
        pre, y = triton_gemm.forward(record, x, torch.eye(16, dtype=dtype), learned)
        back = triton_gemm.backward(record, torch.ones_like(x), torch.eye(16, dtype=dtype), pre, learned, None)
    assert torch.equal(pre, x)
    true = truth(record, x.flatten(), p)
    for key, ours in (("f", y), ("slope", back.dpre_MW)):
        error, at = excess(record, key, x.flatten(), p, ours.float().flatten(), true[key], dtype)
        assert error <= 1, f"{key}: {error:.2f} times the bound at {at:g}"


@pytest.mark.parametrize("direction, name, tile", [
    (direction, "xsilu_glu2" if gated else "xielu", tile)
    for (direction, gated), tiles in triton_gemm.HOPPER.items() for tile in (tiles[0], tiles[-1])
], ids=str)  # fmt: skip
def test_hoppers_tiles(direction, name, tile):
    """Each program makes several tiles, whose loads run ahead of their products."""
    record = activations.get(name)
    x, w1, w2, dout, _, p = test_fused_linear.inputs(record, (400, 136, 520), torch.bfloat16, bias=False)
    with emulated_gpu(seed=0):
        if direction == triton_gemm.FORWARD:
            pre, y = triton_gemm.forward(record, x, w1, p, None, tile)
            assert_close("pre", pre, x.double() @ w1.double().T)
            gate, up = pre.double().chunk(2, -1) if record.gated else (pre.double(), 1.0)
            p64 = {s: v.double() if isinstance(v, torch.Tensor) else v for s, v in p.items()}
            assert_close("y", y, record.value(gate, p64) * up)
        else:
            pre = (x.double() @ w1.double().T).bfloat16()
            back = triton_gemm.backward(record, dout, w2, pre, p, None, tile)
            exact = reference.backward(record, pre.double(), p, dout.double() @ w2.double(), emit_y=True)
            assert_close("y", back.y_MF, exact.y)
            assert_close("dpre", back.dpre_MW, exact.dx)
            for symbol, value in back.parameters.items():
                assert_close(symbol, value.reshape(1), exact.parameters[symbol].reshape(1), terms=pre.numel() ** 0.5)


def test_the_last_of_more_than_2_to_the_31_elements():
    """Whose offsets 32 bits do not hold. Of the memory, only what the last program touches is ever there."""
    record, columns = activations.get("relu2"), 2048
    rows = 2**31 // columns + 16
    try:
        reserved = [torch.empty(rows, columns, dtype=torch.bfloat16) for _ in range(5)]
        del reserved
    except RuntimeError:
        pytest.skip("no room to reserve 22 GB of addresses (ulimit -v, or vm.overcommit_memory = 2)")
    x, dy = (torch.empty(rows, columns, dtype=torch.bfloat16) for _ in range(2))
    x[-1], dy[-1] = torch.linspace(-2, 2, columns), 1.0
    y, slope = (t.bfloat16() for t in (x[-1].float().relu() ** 2, 2 * x[-1].float().relu()))
    scale, one = torch.ones(rows), fp8.PerTensor(torch.ones(1))
    narrow, w1 = torch.empty(rows, 16, dtype=torch.bfloat16), torch.randn(columns, 16).bfloat16()
    narrow[-1] = 0.5
    with emulated_gpu(80, last_only=True):
        for given in ((), (None, scale)):  # as one long row, and row by row
            assert torch.equal(triton_pointwise.forward(record, x, {}, *given)[-1, -64:], y[-64:])
        assert torch.equal(triton_pointwise.backward(record, x, {}, dy, None, scale).dx[-1, -64:], slope[-64:])
        pre, _ = triton_gemm.forward(record, narrow, w1, {})
        assert_close("pre", pre[-1:, -64:], narrow[-1:].double() @ w1[-64:].double().T)
    with emulated_gpu(90, last_only=True):
        found = triton_fp8.forward(record, x, {}, one, torch.float8_e5m2, True, False, None, None)
        assert torch.equal(found.rows_RC[-1, -64:].float(), y[-64:].to(torch.float8_e5m2).float())


@triton.jit
def place_kernel(out_ptr, rows, columns, SIZE: tl.constexpr):
    row, column = triton_gemm_parts.place(tl.program_id(0), rows, columns, SIZE, SIZE)
    tl.store(out_ptr + tl.program_id(0), (100 * row + column).to(tl.float32))


def test_every_tile_of_a_product_is_made_once():
    """Of 19 x 3: two whole groups of row blocks, and one that is not."""
    out = torch.empty(19 * 3)
    with emulated_gpu():
        place_kernel[(19 * 3,)](out, 19 * 32 - 3, 3 * 32 - 1, SIZE=32)
    assert sorted(out.tolist()) == [100 * row + column for row in range(19) for column in range(3)]


# Planted errors


def test_special_functions_further_off_are_noticed(monkeypatch):
    monkeypatch.setitem(ptx_arithmetic.ULPS, "ex2", 16.0)
    assert max(worst("xielu", "fp32", moved=False).values()) > 1


@triton.jit
def planted_kernel(x_ptr, y_ptr, n, step, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i * step, tl.load(x_ptr + i, mask=i < n))


@pytest.mark.parametrize("given, found", [((100, 1, 128), "accesses outside of tensor 1"),
                                          ((128, 0, 128), "different values to one place")])  # fmt: skip
def test_wrong_accesses_are_noticed(given, found):
    *sizes, threads = given
    with emulated_gpu(), pytest.raises(AssertionError, match=found):
        planted_kernel[(1,)](torch.arange(sizes[0]).float(), torch.zeros(100), *sizes, SIZE=threads)
