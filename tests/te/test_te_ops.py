"""Our operations in TransformerEngine's Python layer, in every version supported: parity, fusion, FP8, tensor parallel.

Matrix products and TE's own quantization are torch here (extension.py); everything between is TE's and ours.
"""

import pytest
from te_programs import NEWEST, VERSIONS

APART = ["BasicLinear", "ActivationOperation", "BasicLinear"]


@pytest.fixture(scope="module", params=VERSIONS)
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def found(programs, version) -> dict:
    return programs[version].result()


@pytest.fixture(scope="module")
def joins(version) -> bool:
    return version != "2.13.0"


def test_the_operation_keeps_names_and_precision(found):
    assert found["operation"] == {
        "names": ["alpha_p", "alpha_n"],
        "dtypes": ["torch.float32"],  # after .bfloat16()
        "state": ["alpha_n", "alpha_p"],  # no extra state: checkpoints of other layers have none
        "hooked": 2,  # called by itself, and in a sequence
    }


def test_parity_with_autograd(found, joins):
    assert len(found["parity"]) == 12
    for label, run in found["parity"].items():
        assert max(run["errors"].values()) < 1e-5, (label, run)
        apart = [*APART[:1], *["Bias"] * ("bias" in label), *APART[1:]]
        assert run["ops"] == (["LinearActivationLinear"] if "joint" in label and joins else apart)


def test_bf16_rounds_no_more_than_the_separate_operations(found):
    for way in ("apart", "joint"):
        assert max(found["bf16"][way].values()) < 0.02
        dtypes = dict(line.split() for line in found["bf16"][f"{way} dtypes"])
        assert dtypes.pop("alpha_p") == dtypes.pop("alpha_n") == "float32"
        assert set(dtypes.values()) == {"bfloat16"}


def test_only_input_and_pre_activation_are_saved(found, joins):
    """Of ReLU^2, the output in place of the latter."""
    hidden, ffn = 256, 128
    for name in ("xielu", "relu2"):
        assert found["saved"][f"{name} apart"] == hidden + 2 * ffn
        assert found["saved"][f"{name} joint"] == hidden + (1 if joins else 2) * ffn


def test_main_grad_is_added_to_or_overwritten_as_by_te(found):
    for label, run in found["bookkeeping"].items():
        adds = "add" in label
        for weight in ("w1", "w2"):
            assert run[weight]["error"] < 1e-5, (label, run)
            assert (run[weight]["flag"], run[weight]["dummy"]) == (adds, adds)
        assert run["alpha"] < 1e-5


def test_what_needs_no_gradient_gets_none(found):
    everything = {"x", "w1", "w2", "alpha_p", "alpha_n"}
    frozen = {
        "input without": {"x"}, "w1 frozen": {"w1"}, "w2 frozen": {"w2"}, "input and w1": {"x", "w1"},
    }  # fmt: skip
    for way in ("apart", "joint"):
        for label, without in frozen.items():
            assert set(found["partial"][f"{way} {label}"]) == everything - without, (way, label)


def test_which_mlps_are_joined(found):
    patterns, joined = found["patterns"], ["LinearActivationLinear"]
    assert patterns["plain"] == patterns["bias"] == joined
    assert patterns["two"] == [*joined, "Identity", *joined]
    assert patterns["shared"] == [*joined, "ActivationOperation", "BasicLinear"]  # its first layer is taken
    assert patterns["not asked"] == APART
    assert patterns["GELU"] == ["BasicLinear", "GELU", "BasicLinear"]
    assert patterns["cut"] == APART[:2]
    assert patterns["no lines"] == []


def test_what_excludes_joining_is_said_once(found):
    patterns = found["patterns"]
    assert patterns["userbuffers"] == 2 * APART
    assert patterns["recipe"] == patterns["row"] == patterns["dtypes"] == APART
    reasons = ("overlaps", "FP8", "reduces over ranks", "float32 and torch.bfloat16")
    said = [line for line in patterns["said"] if "needs TransformerEngine" not in line]
    assert len(said) == len(reasons)
    assert all(reason in line for reason, line in zip(reasons, said, strict=True))


def test_a_backend_that_is_named_and_cannot_run_is_an_error(found):
    assert "'triton' cannot run here" in found["patterns"]["triton"]
    assert "'nonsense' is not one of" in found["patterns"]["nonsense"]


# --- FP8 --------------------------------------------------------------------------------------------------------------


def test_in_fp8_the_casts_beside_the_activation_are_ours(found, version):
    """The copies that FP8 products read are all there, and TE quantizes neither the activation's output nor its input's
    gradient; results are those of separate casts up to FP8's rounding (e5m2, of gradients: a step is an eighth)."""
    runs = dict(found["fp8"])
    refused = runs.pop("blockwise refused", None)
    assert (refused is None) == (version == NEWEST)  # TE's operations learned blocks later
    assert len(runs) == (6 if refused is None else 4)
    for label, run in runs.items():
        width = 256 if "glu" in label else 128
        theirs, ours = run["quantized"]["apart"], run["quantized"]["one pass"]
        assert len(theirs) == 6 and len(ours) == 4
        for shape in ([64, 2, 128], [64, 2, width]):  # y, dx of the activation
            theirs.remove(shape)
        assert theirs == ours
        assert max(run["apart"].values()) < 0.1, (label, run["apart"])
        exact = {key: value for key, value in run["exact"].items() if "alpha" not in key}  # whose sums cancel
        assert max(exact.values()) < 0.15, (label, exact)


def test_delayed_scaling_hears_of_the_largest_value(found):
    for activation in ("xielu", "xsilu_glu2"):
        amax = found["fp8"][f"delayed {activation}"]["amax"]
        assert amax["one pass"] == pytest.approx(amax["apart"], rel=2**-8)  # apart, it is of values rounded to bf16
        assert amax["one pass"] != amax["apart"]


def test_a_backward_pass_in_16_bits_gets_16_bit_inputs(found, version):
    if version == "2.13.0":
        assert found["override"] == {}  # no recipe has it
    else:
        assert found["override"] == dict.fromkeys(
            ("high_precision", "dequantized"), {"same": True, "quantized": 4}  # x, w1, y, w2; no gradient
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["delayed", "current", "current, powers of two", "blockwise"])
def test_quantized_tensors_say_the_same_in_te(found, kind):
    tensor = found["tensors"][kind]
    family = "Float8Blockwise" if kind == "blockwise" else "Float8"
    suffix = "QTensor" if kind == "blockwise" else "Tensor"
    assert tensor["can"] is True
    assert tensor["class"] == f"{family}{suffix}" and tensor["internal class"] == f"{family}{suffix}Storage"
    assert tensor["shape"] == [3, 60, 256] and tensor["dtype"] == "torch.bfloat16"
    readings = [tensor[key] for key in ("rows", "columns", "internal rows", "internal columns")]
    readings += [tensor["TE reads"], tensor["TE reads columns"]] if kind == "blockwise" else []
    assert max(readings) < 2**-4  # half a step of e4m3


def test_a_delayed_quantizers_amax_is_raised_and_never_lowered(found):
    assert found["tensors"]["amax"] == found["tensors"]["largest"] > 0.25


def test_factors_are_as_the_quantizer_asks(found):
    tensors = found["tensors"]
    powers, others = tensors["blockwise"]["powers of two"]
    assert powers == 1.0 and others < 0.1
    assert tensors["floor"] == pytest.approx(1e-3)  # amax_epsilon, for an amax below it


def test_gpus_that_multiply_any_layout_get_no_transposed_copy(found):
    assert found["tensors"]["on Blackwell"] == [False, True]


def test_other_quantizers_are_left_to_te(found):
    assert found["tensors"]["refused"] == dict.fromkeys(
        (
            "2D blocks", "epsilon", "none", "unknown", "amax over ranks", "kernels = reference", "eps",
            "columns of no whole block",
        ), False
    )  # fmt: skip


def test_between_te_modules_fc2_gets_its_input_in_fp8_where_it_can(found):
    between = found["between"]
    assert between["TrainableActivation"] == "Tensor"
    assert between["QuantizingActivation"] == between["FP8"] == "Float8Tensor"
    assert max(between["y"]) < 2**-4 and between["same gradients"]
    assert between["delayed"] == between["recomputed"] == "Float8Tensor"
    for reason in (
        "first step", "no FP8", "other recipe", "own settings", "saves its input", "delayed, recomputed", "debugged",
        "offloaded", "nothing", "sharded",
    ):  # fmt: skip
        assert between[reason] == "Tensor", reason


def test_first_and_last_layers_in_bf16_by_megatrons_option(found):
    assert found["bf16 layers"] == ["Tensor", "Float8Tensor", "Float8Tensor", "Tensor"]


# --- tensor parallel --------------------------------------------------------------------------------------------------


def test_two_ranks_compute_what_one_does(found, joins):
    assert len(found["tensor parallel"]) == 8
    for label, run in found["tensor parallel"].items():
        assert max(run["errors"].values()) < 1e-5, (label, run)
        assert run["alphas"], label  # the same on both ranks
        middle = ["LinearActivationLinear"] if "joint" in label and joins else [*APART[:1], "Bias", *APART[1:]]
        assert run["ops"] == [*middle, "ReduceScatter" if "sequence" in label else "AllReduce"]
