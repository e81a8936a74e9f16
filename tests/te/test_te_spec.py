"""The layer spec with TransformerEngine's own modules and operations, as far as that goes without a GPU."""

import pytest


@pytest.fixture(scope="module")
def built(programs) -> dict:
    return programs["spec"].result()


def test_the_spec_puts_our_activation_between_te_linears(built):
    te = built["te"]
    assert te["classes"] == {
        "linear_fc1": "TELayerNormColumnParallelLinear",
        "linear_fc2": "TERowParallelLinear",
        "activation_func": "QuantizingActivation",
    }
    assert te["final_norm"] == "RMSNorm"
    assert te["alpha_dtypes"] == ["torch.float32"]
    assert "TransformerEngine layer" in built["stdout"]


def test_megatrons_flag_for_te_operations_makes_the_activation_one(built):
    assert built["operations"]["classes"] == built["te"]["classes"] | {"activation_func": "ActivationOperation"}
    assert built["operations"]["alpha_dtypes"] == ["torch.float32"]


def test_checkpoints_of_te_and_local_layers_have_the_same_tensors(built):
    assert built["te"]["checkpoint"] == built["local"]["checkpoint"]
    assert built["operations"]["checkpoint"] == built["local"]["checkpoint"]
    assert built["te"]["checkpoint"]["decoder.layers.mlp.activation_func.alpha_p"] == [2, 1]  # as in existing ones


@pytest.mark.parametrize("way", ["apart", "joint"])
def test_megatrons_mlp_of_te_operations_computes_the_formula(built, way):
    run = built["run"][way]
    middle = ["LinearActivationLinear"] if way == "joint" else ["BasicLinear", "ActivationOperation", "BasicLinear"]
    assert run["ops"] == ["RMSNorm", *middle]
    assert set(run["errors"]) == {"y", "x", "norm", "w1", "w2", "alpha_p", "alpha_n"}
    assert max(run["errors"].values()) < 0.02, run["errors"]  # bf16 rounds by 2^-8, a few times over
    assert run["bias"] is None


def test_hooks_on_the_activation_of_te_operations_see_its_output(built):
    for way in ("apart", "joint"):
        # once in each of two passes, and not by Megatron with nothing to look at
        assert built["run"][way]["hooked"] == [[8, 2, 128]] * 2


def test_te_operations_wait_for_parameters_by_hooks_that_ddp_adds_after_the_first_step(built):
    for way in ("apart", "joint"):
        assert built["run"][way]["awaited"] == sorted(built["operations"]["classes"].values())


def test_recomputed_te_operations_with_biases_have_the_same_gradients(built):
    assert "linear_fc2.bias" in built["recomputed"] and set(built["recomputed"].values()) == {0.0}


# --- mlp = "auto" -----------------------------------------------------------------------------------------------------
FIRST, LAST = ["RMSNorm"], ["AllReduce"]
APART = [*FIRST, "BasicLinear", "ActivationOperation", "BasicLinear", *LAST]
JOINED = [*FIRST, "LinearActivationLinear", *LAST]


@pytest.fixture(params=(0, 1), ids=("rank 0", "rank 1"))
def chosen(built, request) -> dict:
    """Of each rank: all go the way that the first has measured to be the fastest, whatever is in their own caches."""
    return built["chosen"][request.param]


def test_auto_joins_where_a_fused_backend_is_the_fastest(chosen):
    assert chosen["evaluated first"] == [None, APART]
    assert chosen["fused"] == ["triton", JOINED]
    assert chosen["difference"] < 2e-3 and chosen["gradients"]  # fp16 rounds by 2^-11
    assert chosen["launched"] == chosen["planted"]  # the first rank's fastest tiles, none of which is the default
    assert chosen["other tokens"] == ["triton", JOINED]  # it stays


def test_auto_leaves_te_its_linears_where_they_are_the_fastest(chosen):
    assert chosen["unfused"] == ["unfused", APART]


def test_auto_leaves_fp8_and_overlapped_communication_to_te(chosen):
    assert chosen["fp8"] == chosen["tp_comm_overlap"] == ["unfused", APART]


def test_a_named_backend_that_cannot_run_is_an_error_in_te_too(chosen):
    assert chosen["named quack"].startswith("mlp = 'quack' in [xact] cannot run here: it is not installed")
    assert "cannot run here: TransformerEngine's layers have FP8 of their own" in chosen["named fp8"]
