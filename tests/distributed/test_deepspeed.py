"""`engine = "deepspeed"`: the curves of Megatron's own optimizer, alphas too, and checkpoints that are Megatron's."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from test_pretrain import BF16, FP32
from training import MARKS, SAVED, STEPS, Trainings, deviations, execute, trainings

pytestmark = [
    *MARKS,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (the deepspeed extra)"),
]

CURVES = [
    ("zero1 tp2", "one", FP32),
    ("zero2 dp2", "one", FP32),
    ("zero3 tp2 dp2", "one", FP32),
    ("zero2 gated dp2", "gated", FP32),
    ("zero3 bf16 dp2", "bf16", BF16),
    # What another engine, stage and sharding has saved: the optimizer's state goes on where it was.
    ("zero2 dp2@8 to zero3 tp2", "one", FP32),
    ("zero2 policy tp2", "policy", (FP32[0], 10 * FP32[1])),  # alphas move ten times as far, and so does rounding
]
RESUMED = {"zero3 bf16 dp2@8": "zero3 bf16 dp2", "zero1 offload@8": "zero1 offload"}
OTHERS = {*RESUMED, "zero3 tp2 dp2@8 by megatron"}
NAMES = {name for curve in CURVES for name in curve[:2]} | OTHERS


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Trainings:
    return trainings(tmp_path_factory.getbasetemp()).start(*sorted(NAMES))


@pytest.mark.parametrize("name, reference, tolerance", CURVES, ids=[name for name, _, _ in CURVES])
def test_zero_has_the_curves_of_megatrons_optimizer(runs, name, reference, tolerance):
    loss, alpha = deviations(runs[name], runs[reference])
    print(f"{name}: losses {loss:.2e}, alphas {alpha:.2e}")
    first = SAVED[1] if "@8" in name else 0
    assert list(runs[name].losses) == list(range(first + 1, STEPS + 1))
    assert loss <= tolerance[0] and alpha <= tolerance[1]


def test_the_policy_moves_alphas_by_far_more_than_is_tolerated(runs):
    loss, alpha = deviations(runs["policy"], runs["one"])
    assert alpha > 1000 * FP32[1]


@pytest.mark.parametrize("name", sorted(RESUMED))
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(runs, name):
    """Also its fp32 masters are, of which a bf16 model cannot tell the last bits."""
    assert deviations(runs[name], runs[RESUMED[name]]) == (0.0, 0.0)


def test_megatron_goes_on_from_the_weights(runs):
    """The loss of its first step is before its first update."""
    theirs, ours = runs["zero3 tp2 dp2"].losses[9], runs["zero3 tp2 dp2@8 by megatron"].losses[9]
    assert ours == pytest.approx(theirs, abs=FP32[0])


def test_a_checkpoint_holds_the_model_that_megatrons_own_holds(runs):
    def model_of(name: str) -> dict:
        from torch.distributed.checkpoint import FileSystemReader

        metadata = FileSystemReader(runs[name].folder / f"iter_{STEPS:07d}").read_metadata().state_dict_metadata
        tensors = {key: value for key, value in metadata.items() if hasattr(value, "size")}
        kept = {key: value for key, value in tensors.items() if key.startswith(("decoder.", "embedding.", "output"))}
        return {key: (tuple(value.size), value.properties.dtype) for key, value in kept.items()}

    assert model_of("zero3 tp2 dp2") == model_of("one") != {}


def test_a_checkpoint_exports(runs, tmp_path):
    """`xact export` compares the export's logits, in transformers, with those of the Megatron model."""
    words = ["export", str(runs["zero3 tp2 dp2"].folder), str(tmp_path / "hf")]
    done = execute([sys.executable, "-m", "megatron_xact", *words])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf" / "model.safetensors").is_file()
