"""The layer spec with TransformerEngine's own modules, as far as that goes without a GPU: which modules, which keys."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TE = ("transformer-engine==2.20.2", "onnx==1.23.2", "onnxscript==0.7.2", "onnx-ir==1.1.0", "einops", "ml-dtypes")


@pytest.fixture(scope="session")
def te_folder() -> Path:
    """TE's pure-Python wheel, without its CUDA libraries, beside the environment and not in it."""
    folder = Path(sys.prefix) / "te-python"
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--upgrade", "--target", folder, *TE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"TransformerEngine's Python wheel cannot be had here: {done.stderr.strip().splitlines()[-1]}")
        (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def built(te_folder) -> dict:
    program = [sys.executable, "-O", HERE / "te_without_gpu.py", te_folder]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stdout": done.stdout}


def test_the_spec_puts_our_activation_between_te_linears(built):
    te = built["te"]
    assert te["classes"] == {
        "linear_fc1": "TELayerNormColumnParallelLinear",
        "linear_fc2": "TERowParallelLinear",
        "activation_func": "TrainableActivation",
    }
    assert te["final_norm"] == "RMSNorm"
    assert te["alpha_dtypes"] == ["torch.float32"]
    assert "TransformerEngine layer" in built["stdout"]


def test_checkpoints_of_te_and_local_layers_have_the_same_tensors(built):
    assert built["te"]["checkpoint"] == built["local"]["checkpoint"]
    assert built["te"]["checkpoint"]["decoder.layers.mlp.activation_func.alpha_p"] == [2, 1]  # as in existing ones
