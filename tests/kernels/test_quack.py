"""The QuACK backend without a GPU: its epilogues against fp64, its machine code for Hopper, and what it refuses.

Three proofs, each of something that the others leave open. The device functions with another vocabulary are held to
the same bounds as in Triton's interpreter, wherever torch is. With QuACK installed, the epilogues are traced by CuTe as
for a GPU, compiled for this CPU and held to them too; and the whole kernels are compiled for sm_90a, where what they
spill, multiply and evaluate is counted. Whether QuACK's matrix products around them are right only a GPU can tell:
tools/gpu_suite.py.
"""

import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import quack_without_gpu
import torch
from accuracy import NAMES, excess, parameters, sample, truth
from compiled import BACKWARD, FORWARD
from test_machine_code import SPECIAL_FUNCTIONS

from megatron_xact import activations
from megatron_xact.kernels import linear, quack_gemm
from megatron_xact.kernels.device_functions import MAX_PARAMETERS, device_function
from megatron_xact.kernels.quack_functions import translated

UNGATED = [name for name in activations.names() if not activations.get(name).gated]
needs_quack = pytest.mark.skipif(
    importlib.util.find_spec("quack") is None, reason='QuACK is not installed: pip install -e ".[quack]" (290 MB)'
)
KEYS = ("f", "slope")


def assert_within_bounds(record, p, z, ours, dtype=torch.bfloat16):
    """ours: fp32 by "f", "slope" and symbol, at z (fp32)."""
    true = truth(record, z, p)
    for key, value in ours.items():
        worst, at = excess(record, key, z, p, value, true[key], dtype)
        assert worst <= 1, f"{record.name} {key}: {worst:.2f} x the bound, at {at!r}"


# --- the translation ---


class TorchVocabulary:
    """The words of `quack_functions.CuteVocabulary`, for torch tensors."""

    constexpr = object
    PropagateNan = SimpleNamespace(ALL=True)
    math = SimpleNamespace(rsqrt=torch.rsqrt)
    where, exp2, abs = map(staticmethod, (torch.where, torch.exp2, torch.abs))

    @staticmethod
    def maximum(x, y, propagate_nan):
        return x.clamp(min=y)

    @staticmethod
    def minimum(x, y, propagate_nan):
        return x.clamp(max=y)


@pytest.mark.parametrize("name", NAMES)
def test_device_functions_in_another_vocabulary(name):
    record = activations.get(name)
    function = translated(TorchVocabulary())[device_function(record).__name__]
    z, p = sample(torch.bfloat16).float(), parameters(record, moved=True)
    values = [p[q.symbol] for q in record.parameters] + [0.0] * (MAX_PARAMETERS - len(record.parameters))
    keys = (*KEYS, *(q.symbol for q in record.parameters))
    assert_within_bounds(record, p, z, dict(zip(keys, function(z, *values), strict=False)))


def test_a_word_that_the_vocabulary_lacks_is_named():
    function = translated(SimpleNamespace(exp2=torch.exp2, abs=torch.abs))["silu"]
    with pytest.raises(AttributeError, match="math|where"):
        function(torch.ones(1), 0.0, 0.0, 0.0)


# --- what it refuses ---


def test_what_cannot_be_served_is_told():
    xielu, cpu, gpu = activations.get("xielu"), torch.device("cpu"), torch.device("cuda", 0)

    def reason(activation=xielu, dtype=torch.bfloat16, device=cpu):
        return linear.unavailable_reason("quack", activation, dtype, device)

    assert "not on an NVIDIA GPU" in reason()
    assert "torch.float32 operands" in reason(dtype=torch.float32)
    assert "eager code" in reason(activations.get("xielu", eps=-1e-6))
    if not torch.cuda.is_available() or importlib.util.find_spec("quack") is None:
        assert reason(device=gpu) is not None


def test_sizes_that_tma_cannot_address_are_refused():
    record = activations.get("swiglu")
    x, w1 = torch.empty(4, 12, dtype=torch.bfloat16), torch.empty(32, 12, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="hidden size that is a multiple of 8, not 12"):
        quack_gemm.forward(record, x, w1, {})
    with pytest.raises(ValueError, match="ffn size on this rank that is a multiple of 8, not 12"):
        quack_gemm.forward(record, x[:, :8], w1[:24, :8], {})


@needs_quack
def test_installed_version_is_the_pinned_one():
    """Another one may compile other code: this file's counts are of that version."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for pin in project["optional-dependencies"]["quack"]:
        distribution, version = pin.split("==")
        assert importlib.metadata.version(distribution) == version


# --- epilogues, traced by CuTe and run on the CPU ---


def evaluate(*args):
    return quack_without_gpu.submit(quack_without_gpu.evaluate, *args).result()


@needs_quack
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", UNGATED)
def test_epilogues(name, bias):
    record = activations.get(name)
    p = parameters(record, moved=True)
    acc = sample(torch.float32)
    added = {"bias": torch.full_like(acc, 0.3)} if bias else {}
    out = evaluate(record, FORWARD, p, {"acc": acc} | added)
    pre = acc.to(torch.bfloat16).float()
    z = pre + added.get("bias", 0.0)
    assert torch.equal(out["D"], pre), "the pre-activation is not rounded as torch rounds"
    assert_within_bounds(record, p, z, {"f": out["y"]})

    dy = torch.where(torch.arange(len(acc)) % 2 == 0, 0.25, -2.0)  # powers of 2: products are exact
    back = evaluate(record, BACKWARD, p, {"acc": dy, "c": pre} | added)
    assert torch.equal(back["y"], out["y"])
    ours = {"slope": back["D"] / dy} | {q.symbol: back[f"dp{i}"][1] for i, q in enumerate(record.parameters)}
    assert_within_bounds(record, p, z, ours)
    sums = [name for name in back if name not in ("D", "y")]
    assert all(torch.equal(back[name][0], dy) for name in sums) and len(sums) == len(record.parameters) + bias
    if bias:
        assert torch.equal(back["dbias"][1] * dy, back["D"])


@needs_quack
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("glu1")])
def test_gated_epilogues(name, bias):
    record = activations.get(name)
    p = parameters(record, moved=True)
    gate = sample(torch.float32)
    up = torch.where(torch.arange(len(gate)) % 3 == 0, 4.0, -0.5)
    one, none = torch.full_like(gate, 0.3), torch.zeros_like(gate)
    out = evaluate(record, FORWARD, p, {"acc": (gate, up)} | ({"bias": (one, none)} if bias else {}))
    pre = gate.to(torch.bfloat16).float()
    z = pre + one * bias
    assert torch.equal(out["pre"], pre) and torch.equal(out["pre_up"], up)
    assert_within_bounds(record, p, z, {"f": out["y"] / up})

    dy = torch.where(torch.arange(len(gate)) % 2 == 0, 0.25, -2.0)
    inputs = {"acc": dy, "c": pre, "c_up": up} | ({"bias": one, "bias_up": none} if bias else {})
    back = evaluate(record, BACKWARD, p, inputs)
    assert torch.equal(back["y"], out["y"]) and torch.equal(back["dpre_up"] * up, out["y"] * dy)
    assert_within_bounds(record, p, z, {"slope": back["D"] / (dy * up), "a": back["dp0"][1]})
    assert torch.equal(back["dp0"][0], dy * up)
    if bias:
        assert torch.equal(back["dbias"][0] * back["dbias"][1], back["D"])
        assert torch.equal(back["dbias_up"][0] * back["dbias_up"][1], back["dpre_up"])


@needs_quack
@pytest.mark.parametrize("name", UNGATED)
def test_limits_are_those_of_the_record(name):
    record = activations.get(name)
    p = parameters(record, moved=True)
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    true = truth(record, x, p)
    out = evaluate(record, FORWARD, p, {"acc": x})
    assert torch.allclose(out["y"], true["f"].float(), equal_nan=True), f"{out['y']} is not {true['f']}"
    slope = evaluate(record, BACKWARD, p, {"acc": torch.ones_like(x), "c": x})["D"]
    assert torch.allclose(slope[3:].double(), true["slope"][3:]), f"slope at 0 is {slope[3:]}"


@needs_quack
def test_fp16_is_rounded_as_torch_rounds():
    acc = sample(torch.float32)
    out = quack_without_gpu.submit(
        quack_without_gpu.evaluate, activations.get("relu"), FORWARD, {}, {"acc": acc}, torch.float16
    ).result()
    assert torch.equal(out["D"], acc.half().float())


@needs_quack
def test_epilogues_that_save_the_output():
    record, acc = activations.get("relu2"), sample(torch.float32)
    (y,) = evaluate(record, FORWARD, {}, {"acc": acc}, torch.bfloat16, True).values()
    assert torch.equal(y, evaluate(record, FORWARD, {}, {"acc": acc})["y"])
    pre, dy = acc.to(torch.bfloat16).float(), torch.full_like(acc, 0.25)
    (dpre,) = evaluate(record.of_output, BACKWARD, {}, {"acc": dy, "c": y}, torch.bfloat16, True).values()
    within = pre.abs().clamp(max=2.0**60) == pre.abs()  # of which y is a number
    assert_within_bounds(record, {}, pre[within], {"slope": (dpre / dy)[within]})


# --- the identity of a kernel ---


@needs_quack
def test_no_two_epilogues_share_a_name_in_quacks_cache():
    requests = [
        (name, direction, bias, dtype, learned)
        for name, learned in [("xielu", (0, 1)), ("xielu", ()), ("xielu_cubic", (0, 1)), ("silu", ()), ("swiglu", ())]
        for direction in (FORWARD, BACKWARD)
        for bias in (False, True)
        for dtype in (torch.bfloat16, torch.float16)
    ]
    found = [quack_without_gpu.submit(quack_without_gpu.identity, *request) for request in requests]
    assert len({future.result() for future in found}) == len(requests)


# --- machine code for sm_90a ---

# gated ones apply the same functions to the gate; of these, two with a learned parameter
GATED = ["swiglu", "xsilu_glu2", "xgelu_glu2"]
# Of a thread per tile: reloads of registers that had been put aside, of 3000 (forward) to 8000 instructions. The sums
# over rows that a bias asks for hold more registers than the others.
MOST_RELOADS = {(FORWARD, False): 8, (FORWARD, True): 8, (BACKWARD, False): 16, (BACKWARD, True): 48}
LONG_POLYNOMIALS = ("xgelu", "xatlu")  # forward too reloads one and three registers


def kernel_of(name, direction, tile=None, bias=False, dtype=torch.bfloat16):
    """Arguments of `compile_kernel`; a tile of None is the default one."""
    return name, direction, tile, bias, dtype


KERNELS = [kernel_of(name, direction) for name in UNGATED + GATED for direction in (FORWARD, BACKWARD)]
for d in (FORWARD, BACKWARD):
    KERNELS += [kernel_of("xielu", d, bias=True), kernel_of("xsilu_glu2", d, bias=True)]
    KERNELS += [kernel_of("xielu", d, dtype=torch.float16)]
    KERNELS += [kernel_of("xielu", d, tuple(tile)) for tile in quack_gemm.TILES[d, False][1:]]
    KERNELS += [kernel_of("xsilu_glu2", d, tuple(tile)) for tile in quack_gemm.TILES[d, True][1:]]


def label(kernel):
    name, direction, tile, bias, dtype = kernel
    shape = str(quack_gemm.Tile(*tile)).replace(" ", "-") if tile else ""
    return "-".join(filter(None, (name, direction, shape, "bias" * bias, "fp16" * (dtype == torch.float16))))


@pytest.fixture(scope="module")
def binaries(request):
    """The kernels of the chosen tests, being compiled while the first of them are looked at."""
    ours = [item for item in request.session.items if getattr(item, "function", None) is test_machine_code]
    chosen = [item.callspec.params["kernel"] for item in ours]
    return {kernel: quack_without_gpu.submit(quack_without_gpu.compile_kernel, *kernel) for kernel in chosen}


@needs_quack
@pytest.mark.parametrize("kernel", KERNELS, ids=label)
def test_machine_code(kernel, binaries):
    name, direction, tile, bias, dtype = kernel
    binary = binaries[kernel].result()
    assert binary.count("HGMMA") and binary.count("UTMALDG") and binary.count("UTMASTG")
    clean = not tile and dtype == torch.bfloat16 and name not in LONG_POLYNOMIALS and direction == FORWARD
    reloads, loads, stores = 0 if clean else MOST_RELOADS[direction, bias], binary.count("LDL"), binary.count("STL")
    assert loads <= reloads and stores <= reloads, f"spills: {loads} LDL, {stores} STL, {binary.stack_bytes} B"
    special = SPECIAL_FUNCTIONS[name][direction == BACKWARD]
    assert binary.count("MUFU") == special * binary.elements
    assert not binary.count("F2F."), "x is rounded alone, not as half of a pair"


@needs_quack
def test_machine_code_that_saves_the_output():
    """One matrix as wide as y is stored, 16 columns at a time, where the others store two."""
    found = {
        direction: quack_without_gpu.submit(
            quack_without_gpu.compile_kernel, "relu2", direction, None, False, torch.bfloat16, True
        )
        for direction in (FORWARD, BACKWARD)
    }
    for direction, future in found.items():
        binary = future.result()
        assert binary.stack_bytes == binary.count("LDL") == binary.count("STL") == 0
        assert binary.count("MUFU") == binary.elements * (direction == BACKWARD)
        assert binary.count("UTMASTG") == binary.elements // 16


@needs_quack
def test_a_tile_that_spills_is_noticed():
    tile = (128, 192, True)
    assert tile not in quack_gemm.TILES[BACKWARD, False]
    binary = quack_without_gpu.submit(quack_without_gpu.compile_kernel, "xielu_neg_xsilu", BACKWARD, tile).result()
    assert binary.count("LDL") > MOST_RELOADS[BACKWARD, False]
