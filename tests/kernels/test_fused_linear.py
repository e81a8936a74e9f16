"""A linear layer and its activation in one kernel: the door unfused and the Triton kernels in the interpreter, against
fp64; the kernels' machine code for sm_80 and sm_90; and that each of these checks can fail."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from interpreter import in_interpreter
from test_interpreted import assert_close

from megatron_xact import activations
from megatron_xact.kernels import linear

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # the interpreter multiplies bf16 wrongly
# nothing learned, a gate, one learned, two, three; TMA needs rows of whole 16 bytes, plain loads do not
NAMES = ["relu2", "swiglu", "xsilu_glu2", "xielu", "xiprelu", "xielu_neg_xsilu"]
SIZES = {"tma": (70, 48, 88), "pointers": (37, 45, 51)}  # M, H, F: no tile divides them


def inputs(record, sizes, dtype, bias=True, seed=1):
    """x, w1, w2, dout, bias or None, p."""
    rows, hidden, columns = sizes
    width = columns * (1 + record.gated)
    g = torch.Generator().manual_seed(seed)
    x, w1, w2, dout = (
        torch.randn(*shape, generator=g)
        for shape in ((rows, hidden), (width, hidden), (hidden, columns), (rows, hidden))
    )
    p = {q.symbol: torch.tensor([0.3 + 0.4 * i]) if q.trainable else q.init for i, q in enumerate(record.parameters)}
    x, w1, w2, dout = (t.to(dtype) for t in (x, w1 * 2 / hidden**0.5, w2 / hidden**0.5, dout))
    return x, w1, w2, dout, torch.randn(width, generator=g).to(dtype) if bias else None, p


def check(backend, record, x, w1, w2, dout, bias, p, **tiles):
    """forward and backward of `backend` (its name in `linear`, or a module) against autograd in fp64."""
    if isinstance(backend, str):
        saved, y, pre = linear.forward(backend, record, x, w1, p, bias, with_pre=True)
        alone = linear.forward(backend, record, x, w1, p, bias)
        assert torch.equal(alone.saved, saved) and torch.equal(alone.y_MF, y), "what is made for others changes it"
        assert saved is (y if linear.saves_output(record, x.dtype) else pre)
        backward = partial(linear.backward, backend)
    else:
        pre, y = backend.forward(record, x, w1, p, bias, *tiles.values())
        saved, backward = pre, backend.backward
    assert pre.dtype == y.dtype == x.dtype and pre.is_contiguous() and y.is_contiguous()
    assert_close("pre", pre, x.double() @ w1.double().T)

    leaves = {"pre": pre} | ({} if bias is None else {"bias": bias})
    leaves |= {s: v for s, v in p.items() if isinstance(v, torch.Tensor)}
    leaves = {s: v.double().requires_grad_() for s, v in leaves.items()}
    z = leaves["pre"] + leaves.get("bias", 0.0)
    gate, up = z.chunk(2, -1) if record.gated else (z, 1.0)
    true_y = record.value(gate, p | {s: leaves[s] for s in leaves if s in p}) * up
    true_y.backward(dout.double() @ w2.double())
    true = {s: leaf.grad for s, leaf in leaves.items()}
    assert_close("y", y, true_y.detach())

    back = backward(record, dout, w2, saved, p, bias, *tiles.values())
    assert torch.equal(back.y_MF, y), "y of backward differs from y of forward"
    assert back.dpre_MW.dtype == x.dtype
    assert_close("dpre", back.dpre_MW, true["pre"])
    assert list(back.parameters) == [q.symbol for q in record.trainable]
    sums = {"bias": back.bias} if bias is not None else {}
    assert bias is not None or back.bias is None
    for symbol, value in (back.parameters | sums).items():
        assert value.dtype == torch.float32
        assert_close(symbol, value.reshape(true[symbol].shape), true[symbol], terms=float(y.numel()) ** 0.5)
    again = backward(record, dout, w2, saved, p, bias, *tiles.values())
    assert torch.equal(again.dpre_MW, back.dpre_MW) and (bias is None or torch.equal(again.bias, back.bias))
    assert all(torch.equal(again.parameters[s], v) for s, v in back.parameters.items()), "sums differ in a second run"


# --- the door ---


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_unfused(name, bias):
    record = activations.get(name)
    check("unfused", record, *inputs(record, SIZES["pointers"], torch.float32, bias))
    assert linear.unavailable_reason("unfused", record, torch.float32, torch.device("cpu")) is None


def test_unfused_where_the_cpu_has_a_fused_pass():
    """Enough elements for the compiled passes, which add the bias; that of backward gives y again too."""
    record = replace(activations.get("relu2"), of_output=None)
    x, w1, w2, dout, bias, _ = inputs(record, (256, 4, 264), torch.float32)
    saved, y, pre = linear.forward("unfused", record, x, w1, {}, bias)
    z = pre + bias
    torch.testing.assert_close(y, z.relu() ** 2)
    back = linear.backward("unfused", record, dout, w2, saved, {}, bias)
    torch.testing.assert_close(back.y_MF, z.relu() ** 2)
    torch.testing.assert_close(back.dpre_MW, dout @ w2 * 2 * z.relu())
    torch.testing.assert_close(back.bias, back.dpre_MW.sum(0), rtol=1e-5, atol=1e-4)


def test_unfused_rounds_to_bf16_where_fused_rounds():
    """pre and y have the bits of one product and one activation, each rounded once."""
    record = activations.get("xielu")
    x, w1, _, _, bias, p = inputs(record, (16, 32, 24), torch.bfloat16)
    saved, y, pre = linear.forward("unfused", record, x, w1, p, bias)
    assert saved is pre and torch.equal(pre, x @ w1.T)
    wide = record.value(pre.float() + bias.float(), p)
    assert torch.equal(y, wide.to(torch.bfloat16))


@pytest.mark.parametrize("name", [name for name in activations.names() if activations.get(name).of_output])
def test_the_output_alone_tells_value_and_slope(name):
    """In fp64 as the record's own; rounded to bf16, y is off by up to 2^-8, its root by half of that."""
    record = activations.get(name)
    z = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    p = {q.symbol: q.init for q in record.parameters}
    y, slope = record.value(z, p), record.slopes(z, p)[0]
    torch.testing.assert_close(record.of_output.value(y, p), y, rtol=0, atol=0)
    torch.testing.assert_close(record.of_output.slopes(y, p)[0], slope)
    x, w1, w2, dout, bias, p = inputs(record, (16, 32, 24), torch.bfloat16)
    saved, y, pre = linear.forward("unfused", record, x, w1, p, bias)
    assert saved is y and not linear.saves_output(record, torch.float16)
    back = linear.backward("unfused", record, dout, w2, saved, p, bias)
    exact = (dout @ w2).double() * record.slopes(pre.double() + bias.double(), p)[0]
    assert back.y_MF is y and ((back.dpre_MW - exact).abs() <= 2**-7 * exact.abs()).all()
    assert ((back.bias - exact.sum(0)).abs() <= 2**-8 * exact.abs().sum(0)).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(2, 3, 8)}, r"x \(2, 3, 8\) and w1 \(12, 8\) are not matrices that share"),
        ({"x": torch.zeros(3, 9)}, r"x \(3, 9\) and w1 \(12, 8\)"),
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "x is torch.float64 on cpu, w1 torch.float32"),
        ({"w1": torch.zeros(11, 8)}, "swiglu is gated: 11 columns"),
        ({"bias": torch.zeros(6)}, r"bias has shape \(6,\), not \(12,\)"),
        ({"backend": "cublas"}, "linear backend 'cublas' is not one of unfused, triton, quack"),
    ],
)
def test_refusals(change, words):
    given = {"backend": "unfused", "x": torch.zeros(3, 8), "w1": torch.zeros(12, 8), "bias": None} | change
    with pytest.raises(ValueError, match=words):
        linear.forward(given["backend"], activations.get("swiglu"), given["x"], given["w1"], {}, given["bias"])


def test_a_pre_activation_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"what was saved has shape \(3, 6\), not \(3, 12\)"):
        linear.backward(
            "unfused", activations.get("swiglu"), torch.zeros(3, 8), torch.zeros(8, 6), torch.zeros(3, 6), {}
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "record, dtype, words",
    [
        (activations.get("xielu"), torch.bfloat16, "not on an NVIDIA GPU"),
        (activations.get("xielu"), torch.float32, "tensor cores would round torch.float32"),
        (activations.get("xielu", eps=-1e-6), torch.bfloat16, "eager code"),
    ],
)
def test_why_triton_cannot_serve(record, dtype, words):
    assert words in linear.unavailable_reason("triton", record, dtype, torch.device("cpu"))


def test_tiles_follow_from_the_operands(monkeypatch):
    """TMA reads rows that begin at multiples of 16 bytes; sums of a bias' gradient need registers."""
    from megatron_xact.kernels import triton_gemm as gemm

    monkeypatch.setattr(gemm, "_is_hopper", lambda device: True)
    record, fit = activations.get("xielu"), torch.empty(32, 64, dtype=torch.float16)
    odd_rows, odd_start = fit.new_empty(32, 60), fit.new_empty(32 * 64 + 1)[1:].view(32, 64)
    for direction in linear.DIRECTIONS:
        assert all(tile.tma for tile in gemm.candidates(direction, record, fit, fit, fit))
        for other in (odd_rows, odd_start, fit[:0]):
            assert not any(tile.tma for tile in gemm.candidates(direction, record, fit, other, fit))
    with_bias = gemm.candidates(gemm.BACKWARD, record, fit, fit, fit, bias=True)
    assert with_bias and all(tile.n < 256 and tile.per_multiprocessor == 1 for tile in with_bias)
    one_row = fit.as_strided((1, 64), (3, 1))
    assert gemm._described(one_row, (1, 64)).strides == [64, 1]


# --- the kernels, in the interpreter ---


def small_tile(way, parts):
    from megatron_xact.kernels.triton_gemm import Tile

    return Tile(32, 32, 16, parts, 4, 1, tma=way == "tma")


@contextmanager
def poison():
    """Whatever is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype, bias", [("fp32", True), ("fp16", False)], ids=["fp32-bias", "fp16-plain"])
@pytest.mark.parametrize("way", SIZES)
@pytest.mark.parametrize("name", NAMES)
@in_interpreter
def test_kernels(name, way, dtype, bias):
    from megatron_xact.kernels import triton_gemm

    record = activations.get(name)
    tile = small_tile(way, parts=2 if bias else 4)
    with poison():
        check(triton_gemm, record, *inputs(record, SIZES[way], DTYPES[dtype], bias), tile=tile)


@pytest.mark.parametrize("way, bias", [("tma", True), ("pointers", False)], ids=["tma-bias", "pointers-plain"])
@in_interpreter
def test_kernels_that_save_the_output(way, bias):
    from megatron_xact.kernels import triton_gemm

    with pytest.MonkeyPatch.context() as patch, poison():
        patch.setattr(triton_gemm, "candidates", lambda *args, **options: [small_tile(way, parts=2)])
        check("triton", activations.get("relu2"), *inputs(activations.get("relu2"), SIZES[way], torch.float32, bias))


@in_interpreter
def test_named_tiles():
    """Each is launched, and computes what the others do; the sums of alpha's gradient are added in its own order."""
    from megatron_xact.kernels import triton_gemm

    record, launched, options = activations.get("xielu"), [], triton_gemm._options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_gemm, "_is_hopper", lambda device: True)
        patch.setattr(triton_gemm, "_options", lambda a, p, tile: launched.append(str(tile)) or options(a, p, tile))
        x, w1, w2, dout, _, p = inputs(record, (130, 16, 264), torch.float32, bias=False)
        there = linear.tiles("triton", "forward", record, x, w1, x.new_empty(130, 264))
        pre = x @ w1.T
        back = linear.tiles("triton", "backward", record, dout, w2, pre)
        assert len(there) > 3 and len(back) > 2 and len({*there}) == len(there) and len({*back}) == len(back)
        forward = [linear.forward("triton", record, x, w1, p, tile=tile) for tile in [*there, "gone", None]]
        backward = [linear.backward("triton", record, dout, w2, pre, p, tile=tile) for tile in [*back, "gone", None]]
    assert launched == [*there, there[0], there[0], *back, back[0], back[0]]
    for found in forward:
        assert_close("y", found.y_MF, record.value(pre.double(), p))
    sums = torch.stack([found.parameters[record.trainable[0].symbol] for found in backward])
    for found in backward[1:]:
        torch.testing.assert_close(found.dpre_MW, backward[0].dpre_MW)
    torch.testing.assert_close(sums, sums[:1].expand_as(sums), rtol=1e-5, atol=1e-4)
    assert sums[-1] == sums[-2] == sums[0] and len({*sums.tolist()}) > 1


@in_interpreter
def test_tiles_are_measured():
    """Those that the interpreter can run: all, but for one that is refused here."""
    from megatron_xact.kernels import mlp_timing, triton_gemm

    options, shape = triton_gemm._options, mlp_timing.Shape(24, 16, 40, torch.float16, bias=True)
    refused, kept = triton_gemm.AMPERE["forward", False]

    def refusing(activation, p, tile):
        if tile == refused:
            raise RuntimeError("out of resources")
        return options(activation, p, tile)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_gemm, "_options", refusing)
        patch.setattr(mlp_timing, "ROUNDS", 1)
        found = mlp_timing.measure(activations.get("xielu"), shape, torch.device("cpu"), ["triton"], repeats=1)
    assert found.seconds.keys() == {"unfused", "triton"}
    assert found.failed == {f"triton forward {refused}": "failed: out of resources"}
    (back,) = triton_gemm.AMPERE["backward", False]
    assert mlp_timing.fastest("triton", found.tiles["triton"]) == ("triton", str(kept), str(back))


# --- their machine code ---


def compile_tile(name, direction, tile, arch, dtype="bf16", bias=False, divisible=True, by_output=False, **changes):
    """by_output: as for an activation that saves its output. changes: of compile-time arguments and options that the
    launcher would give."""
    from compiled import compiled, parameters

    from megatron_xact.kernels import triton_gemm
    from megatron_xact.kernels import triton_gemm_hopper as hopper
    from megatron_xact.kernels import triton_gemm_pointer as pointer

    record = activations.get(name)
    if by_output and direction == triton_gemm.BACKWARD:
        record = record.of_output
    p = {q.symbol: torch.ones(1) if q.trainable else q.init for q in record.parameters}
    constants = triton_gemm._options(record, p, tile) | changes
    module = hopper if tile.tma else pointer
    kernel = module.forward_kernel if direction == triton_gemm.FORWARD else module.backward_kernel
    data = f"*{dtype}"

    def described(*sizes):
        return f"tensordesc<{dtype}{list(sizes)}>"

    part = described(tile.m, tile.n // tile.parts)
    half = part if record.gated else None
    forward_weight = described(1 + record.gated, tile.n, tile.k)
    weight = forward_weight if direction == triton_gemm.FORWARD else described(tile.k, tile.n)
    given = {
        "x": described(tile.m, tile.k), "dout": described(tile.m, tile.k),
        "w": weight, "pre": part, "pre_up": half, "dpre": part, "dpre_up": half, "y": part,
        **dict.fromkeys(["x_ptr", "dout_ptr", "w_ptr", "pre_ptr", "dpre_ptr", "y_ptr"], data),
        "bias_ptr": data if bias else None, "dbias_ptr": "*fp32" if bias else None, "dp_ptr": "*fp32",
        "rows": "i32", "columns": "i32", "hidden": "i32",
    }  # fmt: skip
    if by_output:
        given |= dict.fromkeys(("pre", "pre_ptr") if direction == triton_gemm.FORWARD else ("y", "y_ptr"))
    elements = tile.m * tile.n // (32 * tile.warps)
    return compiled(kernel, given | parameters(constants["LEARNED"]), constants, arch, elements, divisible)


# per multiprocessor: bytes that one program may have, bytes of all with 1 KiB more each
SHARED_BYTES = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024)}
REGISTERS = 65536
SPECIAL_FUNCTIONS = {"relu2": 0, "xielu": 1, "xelu": 1}  # MUFU instructions per element of y; the others have 2


def violations(binary, name, direction, tile, arch):
    """What the machine code does that it must not, one phrase each."""
    record = activations.get(name)
    found = []
    if binary.stack_bytes or binary.count("LDL") or binary.count("STL"):
        found.append(f"spills: stack {binary.stack_bytes} B, {binary.count('LDL')} LDL, {binary.count('STL')} STL")
    of_one, of_all = SHARED_BYTES[arch]
    programs = tile.per_multiprocessor
    registers = -(-binary.registers // 8) * 8 * 32 * tile.warps
    if binary.shared_bytes > of_one or programs * (binary.shared_bytes + 1024) > of_all:
        found.append(f"{programs} x {binary.shared_bytes} B of shared memory do not fit")
    if programs * registers > REGISTERS:
        found.append(f"{programs} x {registers} registers do not fit")
    special = binary.count("MUFU") - SPECIAL_FUNCTIONS.get(name, 2) * binary.elements
    if not 0 <= special <= 16:  # a few divide for the tile's coordinates
        found.append(f"special functions: {binary.count('MUFU') / binary.elements} per element")
    if not binary.count("HGMMA" if arch == 90 else "HMMA"):
        found.append("no tensor cores")
    if arch == 90 and binary.count("WARPGROUP.ARRIVE") > binary.count("HGMMA") // 4:  # four make a TILE_K of 64
        found.append("instructions of a product wait for each other")
    if binary.count("F2F."):
        found.append(f"{binary.count('F2F.')} roundings one by one")
    if tile.tma and not (binary.count("UTMALDG") and binary.count("UTMASTG")):
        found.append("no TMA")
    learned, backward = len(record.trainable), direction == "backward"
    per_matrix = 0 if tile.tma else binary.elements // 8  # of 16 bytes, as wide as y
    for opcode, wide, narrow in (
        ("LDG.", per_matrix * (1 + record.gated) * backward, learned),
        ("STG", per_matrix * (2 + record.gated), learned * backward),
        ("LDGSTS", None, 0),
    ):
        is_wide = sum(n for o, n in binary.instructions.items() if o.startswith(opcode) and ".128" in o)
        is_narrow = binary.count(opcode) - is_wide
        if is_narrow != narrow or wide not in (None, is_wide):
            found.append(f"{opcode}: {is_wide} of 128 bits and {is_narrow} narrower")
    return found


def shipped():
    """Every tile for one ungated and one gated activation, and the tightest kernel for costly functions."""
    from megatron_xact.kernels.triton_gemm import AMPERE, BACKWARD, HOPPER

    for arch, table in ((90, HOPPER), (80, AMPERE)):
        for (direction, gated), tiles in table.items():
            for tile in tiles:
                yield "xsilu_glu2" if gated else "xielu", direction, tile, arch
    for name in ("relu2", "xielu_neg_xsilu", "xgelu", "xatlu", "xelu", "swiglu", "xgelu_glu1"):
        yield name, BACKWARD, HOPPER[BACKWARD, activations.get(name).gated][-1], 90


@pytest.mark.parametrize("name, direction, tile, arch", list(shipped()), ids=lambda value: str(value).replace(" ", "-"))
def test_machine_code(name, direction, tile, arch):
    assert violations(compile_tile(name, direction, tile, arch), name, direction, tile, arch) == []


@pytest.mark.parametrize("name", ["xielu", "xsilu_glu2"])
def test_machine_code_with_a_bias(name):
    from megatron_xact.kernels.triton_gemm import BACKWARD, HOPPER, with_sums_of_bias

    (tile,) = with_sums_of_bias(HOPPER[BACKWARD, activations.get(name).gated])
    binary = compile_tile(name, BACKWARD, tile, 90, bias=True)
    assert binary.stack_bytes == binary.count("LDL") == binary.count("STL") == 0


def that_save_the_output():
    from megatron_xact.kernels.triton_gemm import AMPERE, BACKWARD, FORWARD, HOPPER, with_sums_of_bias

    for direction, table, arch in ((FORWARD, HOPPER, 90), (BACKWARD, HOPPER, 90), (BACKWARD, AMPERE, 80)):
        yield direction, table[direction, False][0], arch, False
    yield BACKWARD, with_sums_of_bias(HOPPER[BACKWARD, False])[0], 90, True


@pytest.mark.parametrize(
    "direction, tile, arch, bias", list(that_save_the_output()), ids=lambda value: str(value).replace(" ", "-")
)
def test_machine_code_that_saves_the_output(direction, tile, arch, bias):
    """One matrix as wide as y is stored, where the others store two."""
    binary = compile_tile("relu2", direction, tile, arch, bias=bias, by_output=True)
    assert binary.stack_bytes == binary.count("LDL") == binary.count("STL") == 0
    stored = binary.count("UTMASTG") if tile.tma else binary.count("STG")
    assert stored == (tile.parts if tile.tma else binary.elements // 8)
    assert 0 <= binary.count("MUFU") - binary.elements * (direction == "backward") <= 16


# Planted regressions: what each must be called


def first(direction, arch=90):
    from megatron_xact.kernels.triton_gemm import AMPERE, HOPPER

    return "xielu", direction, (HOPPER if arch == 90 else AMPERE)[direction, False][0], arch


def found_in(case, divisible=True, **changes):
    return " | ".join(violations(compile_tile(*case, divisible=divisible, **changes), *case))


def test_spills_are_noticed():
    assert "spills: stack" in found_in(first("backward", 80), maxnreg=96)


def test_roundings_one_by_one_are_noticed():
    assert "128 roundings one by one" in found_in(first("forward"), INTERPRETED=True)


def test_a_missing_tensor_core_and_an_extra_special_function_are_noticed():
    from megatron_xact.kernels.device_functions import xielu
    from megatron_xact.kernels.triton_gemm import Tile

    case = ("relu2", "forward", Tile(64, 64, 16, 2, 4, 2, tma=False), 80)
    found = found_in(case, dtype="fp32", FUNCTION=xielu, INTERPRETED=True)
    assert "no tensor cores" in found and "special functions: " in found


def test_products_that_wait_for_each_other_are_noticed():
    case = first("forward")
    binary = compile_tile(*case)
    waiting = binary.instructions | {"WARPGROUP.ARRIVE": binary.count("HGMMA")}
    assert "wait for each other" in " | ".join(violations(replace(binary, instructions=waiting), *case))


def test_narrow_accesses_are_noticed():
    found = found_in(first("forward", 80), divisible=False)
    assert "STG: 0 of 128 bits" in found


def test_programs_that_do_not_fit_side_by_side_are_noticed():
    from megatron_xact.kernels.triton_gemm import Tile

    found = found_in(("xielu", "forward", Tile(128, 256, 64, 2, 8, 3, per_multiprocessor=2), 90), maxnreg=None)
    assert "B of shared memory do not fit" in found and "registers do not fit" in found
