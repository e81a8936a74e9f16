"""Activation and quantization together: the torch path against fp64, the kernels in Triton's interpreter against fp64,
and their machine code for sm_90.

The interpreter's own rounding to FP8 is wrong, so there the kernels write the scaled values in fp32, and that the
hardware's rounding instruction is used is read from the machine code.
"""

import math

import pytest
import torch
from interpreter import in_interpreter

from megatron_xact import activations
from megatron_xact.activations.baselines import IDENTITY
from megatron_xact.kernels import fp8, fp8_product, fp8_reference

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
MANTISSA = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
SMALLEST_STEP = {torch.float8_e4m3fn: 2.0**-9, torch.float8_e5m2: 2.0**-16}  # among its subnormals
SHAPES = {"one tile": (128, 128), "ragged": (2, 75, 202), "wide": (3, 1100)}


def inputs(record, shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    *rows, columns = shape
    width = columns * (1 + record.gated)
    # rows of very different sizes, so that a scale taken from the wrong block shows
    size = torch.exp(2 * torch.randn(*rows, 1, generator=g))
    x = 2 * torch.randn(*rows, width, generator=g) * size
    dy, bias = torch.randn(*rows, columns, generator=g) * size, torch.randn(width, generator=g)
    p = {q.symbol: torch.tensor([0.3 + 0.4 * i]) if q.trainable else q.init for i, q in enumerate(record.parameters)}
    return x, dy, bias, p


def exact(record, x, dy, bias, p):
    """y [R, C], dx [R, W], parameters' gradients, bias' gradient: by autograd in fp64."""
    leaves = {"x": x.double().requires_grad_(), "bias": bias.double().requires_grad_()}
    leaves |= {s: v.double().requires_grad_() for s, v in p.items() if isinstance(v, torch.Tensor)}
    z = leaves["x"] + leaves["bias"]
    gate, up = z.chunk(2, -1) if record.gated else (z, 1.0)
    y = record.value(gate, p | {s: leaves[s] for s in leaves if s in p}) * up
    y.backward(dy.double())
    flat = lambda t: t.detach().reshape(-1, t.shape[-1])  # noqa: E731
    gradients = {s: leaves[s].grad for s in leaves if s in p}
    return flat(y), flat(leaves["x"].grad), gradients, leaves["bias"].grad


def power_of_two_scale(amax: float, largest: float) -> float:
    """The largest power of two that does not take amax over `largest`."""
    return 2.0 ** math.floor(math.log2(largest / amax)) if amax else 1.0


def check_blocks(true_RC, values_RC, scale_inv, largest, power_of_two, tolerance):
    """Factors of 1 x 128 blocks are those of the fp64 values; values times them are the fp64 values."""
    rows, columns = true_RC.shape
    assert scale_inv.shape == (math.ceil(columns / 128), math.ceil(rows / 4) * 4) and scale_inv.dtype == torch.float32
    for block in range(scale_inv.shape[0]):
        true = true_RC[:, block * 128 : (block + 1) * 128]
        values = values_RC[:, block * 128 : (block + 1) * 128].double()
        for row in range(rows):
            inverse, amax = scale_inv[block, row].item(), true[row].abs().max().item()
            if power_of_two:
                assert math.log2(inverse) == int(math.log2(inverse))
                near = {power_of_two_scale(amax * (1 + e), largest) for e in (-1e-6, 0.0, 1e-6)}
                assert 1 / inverse in near, f"block {block}, row {row}: scale {1 / inverse} for amax {amax}"
            else:
                assert 1 / inverse == pytest.approx(largest / amax, rel=1e-5)
            error = (values[row] * inverse - true[row]).abs()
            assert (error <= tolerance(true[row].abs(), inverse)).all(), f"block {block}, row {row}: {error.max()}"
    assert (scale_inv[:, rows:] == 0).all()


def half_a_step(dtype):
    """Of rounding to this FP8 format, for values of these sizes, and the error of fp32 arithmetic."""
    return lambda size, inverse: (
        torch.maximum(size * 2.0 ** -(MANTISSA[dtype] + 1), torch.tensor(SMALLEST_STEP[dtype] / 2 * inverse)) * 1.0001
        + 2e-5 * inverse
    )


def fp32_rounding(size, inverse):
    """Of a formula whose terms cancel where its value is small beside others of the block."""
    return 1e-5 * size + 2e-6 * size.max()


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["xielu", "xgelu"])
def test_blockwise_by_torch(name, shape, power_of_two, dtype):
    record = activations.get(name)
    x, dy, bias, p = inputs(record, shape)
    y, dx, _, _ = exact(record, x, dy, bias, p)
    scaling = fp8.Blockwise(power_of_two)
    for true, ours in (
        (y, fp8.forward(record, x, p, scaling, dtype, bias=bias)),
        (dx, fp8.backward(record, x, p, dy, scaling, dtype, bias=bias).dx),
    ):
        assert ours.rows_RC.dtype == ours.columns_CR.dtype == dtype and ours.amax is None
        check_blocks(true, ours.rows_RC, ours.row_scale_inv, LARGEST[dtype], power_of_two, half_a_step(dtype))
        check_blocks(true.T, ours.columns_CR, ours.column_scale_inv, LARGEST[dtype], power_of_two, half_a_step(dtype))


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("name", ["xielu", "xsilu_glu2"])
def test_per_tensor_by_torch(name, dtype):
    """Current scaling: the amax first, then nothing saturates; delayed scaling with a stale factor: it does."""
    record = activations.get(name)
    x, dy, bias, p = inputs(record, (2, 75, 200))
    y, dx, _, _ = exact(record, x, dy, bias, p)

    def forward(scaling):
        return fp8.forward(record, x, p, scaling, dtype, bias=bias)

    def backward(scaling):
        return fp8.backward(record, x, p, dy, scaling, dtype, bias=bias).dx

    for true, amax, quantized in (
        (y, fp8.forward_amax(record, x, p, bias), forward),
        (dx, fp8.backward_amax(record, x, p, dy, bias), backward),
    ):
        assert amax.item() == pytest.approx(true.abs().max().item(), rel=1e-6)
        scale = fp8.factor(amax, dtype)
        assert scale.item() == pytest.approx(LARGEST[dtype] / amax.item(), rel=1e-6)
        q = quantized(fp8.PerTensor(scale))
        assert torch.equal(q.amax, amax) and torch.equal(q.row_scale_inv, 1 / scale)
        assert torch.equal(q.columns_CR.T.float(), q.rows_RC.float())
        error = (q.rows_RC.double() * q.row_scale_inv - true).abs()
        assert (error <= half_a_step(dtype)(true.abs(), q.row_scale_inv.item())).all()
        stale = quantized(fp8.PerTensor(scale * 4))
        assert stale.rows_RC.float().abs().max() == LARGEST[dtype] and torch.equal(stale.amax, amax)


def test_casts_and_multipliers_by_torch():
    """What is no activation's output: rounded as torch rounds it; and columns multiplied before that."""
    x, dy, bias, p = inputs(record := activations.get("xielu"), (2, 75, 200))
    y, *_ = exact(record, x, dy, bias, p)
    multiplier = 2.0 ** torch.randint(-6, 7, (200,), generator=torch.Generator().manual_seed(1))
    peaks = fp8.forward_amax(record, x, p, bias, by_column=True)
    assert peaks.shape == (200,) and torch.allclose(peaks.double(), y.abs().amax(0), rtol=1e-6)
    for scaling in (fp8.PerTensor(torch.tensor([0.5])), fp8.Blockwise()):
        ours = fp8.forward(record, x, p, scaling, bias=bias, multiplier=multiplier)
        theirs = fp8.quantize((y * multiplier).float(), scaling, torch.float8_e4m3fn)
        assert (ours.rows_RC.float() != theirs.rows_RC.float()).double().mean() < 1e-3  # fp32 beside fp64, at a tie
        assert torch.equal(fp8.cast(x, scaling, torch.float8_e5m2).columns_CR.float().T,
                           fp8.quantize(x, scaling, torch.float8_e5m2).columns_CR.float().T)  # fmt: skip
    assert torch.equal(fp8.amax(x, by_column=True), x.abs().amax((0, 1))) and fp8.amax(x).item() == x.abs().max()


@pytest.mark.parametrize("kinds", [("e4m3fn", "e4m3fn"), ("e5m2", "e4m3fn")], ids=" x ".join)
def test_products(kinds):
    """Against torch's own product of FP8 matrices (slow and plain on a CPU) and fp64."""
    g = torch.Generator().manual_seed(1)
    kinds = [getattr(torch, f"float8_{kind}") for kind in kinds]
    shapes = zip((48, 32), kinds, strict=True)
    a, b = (fp8_product.quantized(torch.randn(n, 64, generator=g), kind, rows=True) for n, kind in shapes)
    ours = fp8_product.product(a.rows_RC, a.row_scale_inv, b.rows_RC, b.row_scale_inv, torch.float32)
    exact = (a.rows_RC.double() * a.row_scale_inv) @ (b.rows_RC.double() * b.row_scale_inv).T
    theirs = torch._scaled_mm(a.rows_RC, b.rows_RC.T, a.row_scale_inv, b.row_scale_inv, out_dtype=torch.float32)
    assert (ours - exact).norm() <= 1e-6 * exact.norm() and (theirs - ours).norm() <= 1e-6 * exact.norm()


def test_smoothing_saves_what_outliers_would_flush():
    """Two channels 2^20 above the others: without smoothing e4m3 leaves these 0, with it the product is fine."""
    g = torch.Generator().manual_seed(1)
    record, p = activations.get("relu2"), {}
    pre = torch.randn(64, 256, generator=g)
    pre[:, [3, 100]] *= 2.0**10
    w2 = torch.randn(32, 256, generator=g)
    w2[:, [3, 100]] *= 2.0**-20  # or the outliers are all that matters
    exact = pre.double().relu().square() @ w2.double().T
    errors = {}
    for smooth in (False, True):
        of_y, of_w2, m, alone = fp8_product.second_product(record, pre, p, None, w2, smooth)
        assert alone.scale.item() == fp8.factor(w2.abs().max(), torch.float8_e4m3fn, power_of_two=True).item()
        y = fp8.forward(record, pre, p, of_y, multiplier=m)
        w = fp8.cast(w2, of_w2, torch.float8_e4m3fn, multiplier=None if m is None else 1 / m)
        out = fp8_product.product(y.rows_RC, y.row_scale_inv, w.rows_RC, w.row_scale_inv, torch.float32)
        errors[smooth] = ((out - exact).norm() / exact.norm()).item()
    assert errors[False] > 0.3 and errors[True] < 0.05
    m = fp8_product.smoothing(torch.tensor([4.0, 0.0, 1.0, float("inf")]), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert m.tolist() == [0.5, 1.0, 1.0, 1.0]


def test_gpus_with_fp8(monkeypatch):
    """An A100, and an RTX of its generation, multiply nothing in FP8; Ada was the first."""
    for capability, has in {(8, 0): False, (8, 6): False, (8, 9): True, (9, 0): True, (10, 0): True}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, its=capability: its)
        assert fp8.gpu_has_fp8.__wrapped__(torch.device("cuda")) is has


def test_factors_at_the_edges():
    inf = float("inf")
    amax = torch.tensor([0.0, inf, float("nan"), 448.0, 449.0, 1e-42, 2.0**-120, 3.4e38, 1.0])
    exact = fp8.factor(amax, torch.float8_e4m3fn)
    power = fp8.factor(amax, torch.float8_e4m3fn, power_of_two=True)
    assert exact[:4].tolist() == power[:4].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert power[4:].tolist() == [0.5, 2.0**127, 2.0**127, 2.0**-120, 256.0]
    assert exact[8] == 448.0 and exact[5] == torch.finfo(torch.float32).max


def test_factors_are_rounded_once():
    amax = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 100
    for dtype, top in LARGEST.items():
        assert torch.equal(fp8.factor(amax, dtype), (top / amax.double()).float())


def test_nan_does_not_count_among_magnitudes_and_stays_nan():
    x = torch.tensor([[1.0, float("nan"), -3.0], [2.0, float("nan"), 0.5]])
    assert fp8_reference.largest(x).item() == 3.0
    assert fp8_reference.largest_of_columns(x).tolist() == [2.0, 0.0, 3.0]
    q = fp8_reference.quantize(x, fp8.Blockwise(), torch.float8_e4m3fn)
    assert q.row_scale_inv[0, :2].tolist() == [2.0**-7, 2.0**-7]
    values = q.rows_RC.float() * q.row_scale_inv[0, :2, None]
    assert values[:, [0, 2]].tolist() == [[1.0, -3.0], [2.0, 0.5]] and values[:, 1].isnan().all()


def test_an_infinity_makes_nan_of_what_it_scales():
    """As it does in 16 bits. Saturated, it would be a finite number like any other."""
    x = torch.tensor([[1.0, float("inf")], [-2.0, 0.5]])
    for values in (x, -x):
        q = fp8_product.quantized(values, torch.float8_e5m2, rows=True)
        assert (q.rows_RC.float() * q.row_scale_inv).isnan().all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda r, x: fp8.forward(r, x, {}, fp8.Blockwise(), torch.bfloat16), "bfloat16 is no FP8 format"),
        (lambda r, x: fp8.forward(r, x[0], {}, fp8.Blockwise()), r"shape \(256,\) has no rows"),
        (lambda r, x: fp8.forward(r, x, {}, fp8.Blockwise(), rows=False, columns=False), "neither rows nor columns"),
        (lambda r, x: fp8.backward(activations.get("swiglu"), x[:, :200], {}, x[:, :100], fp8.Blockwise()),
         "100 columns: blocks of 128 would join gate and up"),
    ],
)  # fmt: skip
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call(activations.get("relu2"), torch.zeros(4, 256))


# --- the kernels, in the interpreter ---


def fp32_instead(rows, width, scaling, by_row, by_column):
    """A Quantized to be filled whose values are fp32: everything but the last rounding."""
    q = fp8_reference.empty(rows, width, torch.empty(0), scaling, torch.float32, by_row, by_column)
    for tensor in (q.rows_RC, q.columns_CR):
        if tensor is not None:
            tensor.fill_(float("nan"))  # whatever is not written shows
    return q


@pytest.mark.parametrize("wanted", ["both", "rows", "columns"])
@pytest.mark.parametrize("shape", ["one tile", "ragged"])
@pytest.mark.parametrize("name", ["xielu", "xsilu_glu2", "relu2"])
@in_interpreter
def test_blockwise_kernels(name, shape, wanted):
    from megatron_xact.kernels import triton_fp8 as kernels

    record = activations.get(name)
    shape = SHAPES[shape] if not record.gated else (*SHAPES[shape][:-1], 256)
    x, dy, bias, p = inputs(record, shape)
    y, dx, gradients, dbias = exact(record, x, dy, bias, p)
    by_row, by_column = wanted != "columns", wanted != "rows"
    flat, rows, columns = kernels._matrix(record, x)
    for dtype in LARGEST:
        for power_of_two in (True, False):
            scaling = fp8.Blockwise(power_of_two)
            ours = fp32_instead(rows, columns, scaling, by_row, by_column)
            kernels._launch_forward(record, flat, p, bias, ours, scaling, dtype)
            back = fp32_instead(rows, flat.shape[1], scaling, by_row, by_column)
            partial = torch.zeros(math.ceil(rows / 128), flat.shape[1])
            dp = torch.zeros(len(gradients), kernels._programs(rows, columns) * (1 + record.gated))
            kernels._launch_backward(record, flat, p, dy, bias, back, scaling, dtype, partial, dp)
            for true, q in ((y, ours), (dx, back)):
                if by_row:
                    check_blocks(true, q.rows_RC, q.row_scale_inv, LARGEST[dtype], power_of_two, fp32_rounding)
                if by_column:
                    check_blocks(true.T, q.columns_CR, q.column_scale_inv, LARGEST[dtype], power_of_two, fp32_rounding)
            assert torch.allclose(partial.sum(0).double(), dbias, rtol=1e-5, atol=1e-5 * dbias.abs().max().item())
            for true, ours in zip(gradients.values(), dp.sum(1), strict=True):
                assert ours.item() == pytest.approx(true.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["xielu", "xgelu_glu1"])
@in_interpreter
def test_per_tensor_kernels(name):
    from megatron_xact.kernels import triton_fp8 as kernels

    record = activations.get(name)
    x, dy, bias, p = inputs(record, (2, 75, 200))
    y, dx, gradients, dbias = exact(record, x, dy, bias, p)
    flat, rows, columns = kernels._matrix(record, x)
    scaling = fp8.PerTensor(torch.tensor([3.0]))
    ours = fp32_instead(rows, columns, scaling, True, True)
    amax = kernels._launch_forward(record, flat, p, bias, ours, scaling, torch.float8_e4m3fn)
    back = fp32_instead(rows, flat.shape[1], scaling, True, True)
    partial = torch.zeros(math.ceil(rows / 128), flat.shape[1])
    dp = torch.zeros(len(gradients), kernels._programs(rows, columns) * (1 + record.gated))
    back_amax = kernels._launch_backward(record, flat, p, dy, bias, back, scaling, torch.float8_e5m2, partial, dp)
    for true, q, largest in ((y, ours, amax), (dx, back, back_amax)):
        size = true.abs().max().item()
        assert largest.max().item() == pytest.approx(size, rel=1e-6)
        assert torch.equal(q.columns_CR.T, q.rows_RC)
        assert (q.rows_RC.double() / 3.0 - true).abs().max() <= 1e-6 * size
    assert kernels.forward_amax(record, x, p, bias).item() == amax.max().item()
    assert kernels.forward_amax(record, -bias.expand_as(flat), p, bias).item() == 0.0, "a tile's padding counts"
    assert kernels.backward_amax(record, x, p, dy, bias).item() == back_amax.max().item()
    assert torch.allclose(partial.sum(0).double(), dbias, rtol=1e-5, atol=1e-5 * dbias.abs().max().item())
    for true, ours in zip(gradients.values(), dp.sum(1), strict=True):
        assert ours.item() == pytest.approx(true.item(), rel=1e-5)


@in_interpreter
def test_multiplier_and_column_amax_of_the_kernels():
    from megatron_xact.kernels import triton_fp8 as kernels

    for record in (activations.get("xielu"), IDENTITY):
        x, dy, bias, p = inputs(record, (2, 75, 200))
        y, *_ = exact(record, x, dy, bias, p)
        multiplier = 2.0 ** torch.randint(-6, 7, (200,), generator=torch.Generator().manual_seed(1))
        flat, rows, columns = kernels._matrix(record, x)
        for scaling in (fp8.PerTensor(torch.tensor([3.0])), fp8.Blockwise()):
            ours = fp32_instead(rows, columns, scaling, True, True)
            amax = kernels._launch_forward(record, flat, p, bias, ours, scaling, torch.float8_e4m3fn, multiplier)
            if isinstance(scaling, fp8.PerTensor):
                true = y * multiplier
                assert amax.max().item() == pytest.approx(true.abs().max().item(), rel=1e-6)
                assert torch.equal(ours.columns_CR.T, ours.rows_RC)
                assert ((ours.rows_RC.double() / 3.0 - true).abs() <= 1e-6 * true.abs().amax(0)).all()
            else:
                check_blocks(y * multiplier, ours.rows_RC, ours.row_scale_inv, 448.0, True, fp32_rounding)
        peaks = kernels.forward_amax(record, x, p, bias, by_column=True)
        assert torch.allclose(peaks.double(), y.abs().amax(0), rtol=1e-6)


@in_interpreter
def test_factors_of_the_kernels_at_the_edges():
    from megatron_xact.kernels import triton_fp8 as kernels

    record = activations.get("relu")
    edges = [0.0, 448.0, 449.0, 57344.0, 57345.0, 1e-42, 2.0**-120, 3.4e38, 1.0, 1e-45, 2.0**127, float("inf")]
    x = torch.zeros(len(edges), 128)
    x[:, 5] = torch.tensor(edges)
    for dtype in LARGEST:
        for power_of_two in (True, False):
            scaling = fp8.Blockwise(power_of_two)
            ours = fp32_instead(len(edges), 128, scaling, True, False)
            kernels._launch_forward(record, x, {}, None, ours, scaling, dtype)
            true = 1 / fp8.factor(x.amax(1), dtype, power_of_two)
            found = ours.row_scale_inv[0, : len(edges)].tolist()
            # the interpreter's division is not correctly rounded
            near = true.tolist() if power_of_two else pytest.approx(true.tolist(), rel=2e-7, abs=0.0)
            assert found == near


# --- their machine code ---


# Compiling one takes seconds; these have the costliest functions, of one, two and three parameters, gated and not.
COSTLY = ["xielu", "xielu_neg_xsilu", "xatlu", "xgelu_glu1", "xsilu_glu2", "swiglu"]


# Values are e4m3 and gradients e5m2; one activation shows the other way round.
KINDS = [(name, direction, kind) for name in COSTLY for direction, kind in (("forward", "e4m3"), ("backward", "e5m2"))]
KINDS += [("xielu", "forward", "e5m2"), ("xielu", "backward", "e4m3")]


@pytest.mark.parametrize("blockwise", [True, False], ids=["blockwise", "per-tensor"])
@pytest.mark.parametrize("name, direction, kind", KINDS)
def test_machine_code(name, direction, blockwise, kind):
    binary = compile_fp8(name, direction, blockwise, kind)
    record = activations.get(name)
    assert binary.stack_bytes == binary.count("LDL") == binary.count("STL") == 0, "spills"
    assert binary.shared_bytes <= 16384
    # each value for both matrices, two to an instruction, saturating: of the second no byte is moved after rounding
    assert binary.count(f"F2FP.SATFINITE.{kind.upper()}") == binary.elements // 2 * 2
    wide = [sum(n for o, n in binary.instructions.items() if o.startswith(k) and ".128" in o) for k in ("LDG", "STG")]
    # x and what belongs to it: up, or dy; a program of gated backward has x in two branches of which it takes one
    matrices = {"forward": 1 + record.gated, "backward": 2 + 2 * record.gated}[direction]
    assert wide[0] == matrices * binary.elements // 8, "loads are not of 16 bytes"
    assert wide[1] == 2 * binary.elements // 16, "stores are not of 16 bytes"


@pytest.mark.parametrize("blockwise", [True, False], ids=["blockwise", "per-tensor"])
@pytest.mark.parametrize("direction, kind", [("forward", "e4m3"), ("backward", "e5m2")])
@pytest.mark.parametrize("name", ["xelu_glu2", "xatlu_glu2", "xielu"])
def test_machine_code_with_a_bias(name, direction, kind, blockwise):
    more = {"bias_ptr": "*bf16"} | ({"dbias_ptr": "*fp32"} if direction == "backward" else {})
    binary = compile_fp8(name, direction, blockwise, kind, more=more)
    assert binary.stack_bytes == binary.count("LDL") == binary.count("STL") == 0, "spills"
    assert binary.shared_bytes <= 16384


@pytest.mark.parametrize("given", [("multiplier_ptr",), ("column_amax_ptr",), ()], ids=" ".join)
@pytest.mark.parametrize("name", ["xielu", "swiglu", "identity"])
def test_machine_code_of_casts_and_smoothing(name, given):
    """As above; and looking for the columns' largest alone writes nothing of 16 bytes."""
    looking = "column_amax_ptr" in given
    binary = compile_fp8(name, "forward", False, "e4m3", more=dict.fromkeys(given, "*fp32"), quantizes=not looking)
    assert binary.stack_bytes == binary.count("LDL") == binary.count("STL") == 0, "spills"
    wide = [sum(n for o, n in binary.instructions.items() if o.startswith(k) and ".128" in o) for k in ("LDG", "STG")]
    matrices, multipliers = 2 if name == "swiglu" else 1, 4 if "multiplier_ptr" in given else 0  # of 16 columns
    assert wide[0] == matrices * binary.elements // 8 + multipliers
    assert wide[1] == (0 if looking else 2 * binary.elements // 16)


def test_the_gate_notices_spills():
    binary = compile_fp8("xielu", "backward", True, "e4m3", maxnreg=64)
    assert binary.stack_bytes or binary.count("LDL")


def test_the_gate_notices_narrow_stores():
    binary = compile_fp8("xielu", "forward", True, "e4m3", divisible=False)
    assert not any(".128" in opcode for opcode in binary.instructions if opcode.startswith("STG"))


def test_the_gate_notices_bytes():
    binary = compile_fp8("xielu", "forward", False, "e4m3", WORDS=False)
    assert binary.count("F2FP.SATFINITE.E4M3") < binary.elements // 2 * 2


def compile_fp8(name, direction, blockwise, kind, divisible=True, more=None, quantizes=True, **options):
    from compiled import compiled, parameters

    from megatron_xact.kernels import triton_fp8 as kernels

    record = IDENTITY if name == "identity" else activations.get(name)
    p = {q.symbol: torch.ones(1) if q.trainable else q.init for q in record.parameters}
    scaling = fp8.Blockwise() if blockwise else fp8.PerTensor(torch.ones(1))
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    x = torch.empty(16384, 12288, device="meta")
    result = fp8_reference.empty(16384, 12288, x, scaling, dtype, quantizes, quantizes)
    constants = kernels._launch(record, x, p, 1, scaling, dtype, result)[3]
    if direction == "forward":
        constants["maxnreg"] = kernels.MAX_REGISTERS_OF_FORWARD[blockwise and "bias_ptr" not in (more or {})]
    constants |= options
    values = {"e4m3": "*fp8e4nv", "e5m2": "*fp8e5"}[kind]
    scales = "*fp32" if blockwise else None
    whole = None if blockwise else "*fp32"
    given = {
        "x_ptr": "*bf16", "dy_ptr": "*bf16", "rows_ptr": values, "columns_ptr": values, "dp_ptr": "*fp32",
        "row_scale_ptr": scales, "column_scale_ptr": scales, "scale_ptr": whole, "amax_ptr": whole,
        "rows": "i32", "columns": "i32",
    } | (more or {})  # fmt: skip
    if not quantizes:
        given |= dict.fromkeys(("rows_ptr", "columns_ptr", "scale_ptr"))
    kernel = kernels.forward_kernel if direction == "forward" else kernels.backward_kernel
    elements = fp8.BLOCK**2 // (32 * constants["num_warps"])
    return compiled(kernel, given | parameters(constants["LEARNED"]), constants, 90, elements, divisible)
