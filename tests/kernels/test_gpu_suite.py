"""tools/gpu_suite.py: says that there is no GPU; and its own logic, not the kernels, with tiny sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def suite(*words):
    return subprocess.run(
        [sys.executable, ROOT / "tools/gpu_suite.py", *words], capture_output=True, text=True, env=os.environ
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = suite()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("gpu_suite: torch sees no GPU here")


def test_its_logic_on_the_cpu(tmp_path):
    out = tmp_path / "result.json"
    done = suite("--device", "cpu", "--only", "accuracy", "sums", "huge", "determinism", "memory", "bandwidth",
                 "training", "fp8-gate", "fp8-mlp", "mlp", "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    status = {name: section["status"] for name, section in result["sections"].items()}
    ran = ["accuracy", "sums", "huge", "determinism", "bandwidth", "fp8-mlp", "mlp"]
    assert status == dict.fromkeys(ran, "ok") | dict.fromkeys(["memory", "training", "fp8-gate"], "skipped")
    assert result["machine"]["versions"]["torch"] and result["quick"]
    measured = result["sections"]["bandwidth"]["data"]["measurements"]
    assert {m["direction"] for m in measured} == {"forward", "backward"}
    one = next(m for m in measured if (m["activation"], m["direction"], m["columns"]) == ("xielu", "backward", 768))
    assert one["ideal_bytes"] == 64 * 768 * 6 and len(one["seconds"]) == 30
    mlps = result["sections"]["mlp"]["data"]
    assert set(mlps["mlp"][0]["seconds"]) == {"GEMMs alone", "unfused"} and set(mlps["absent"]) == {"triton", "quack"}


def test_a_missed_target_and_a_broken_section_are_failures(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    from tools import gpu_suite

    def misses(context, data):
        raise gpu_suite.Failure("3 > 2")

    def breaks(context, data):
        return 1 / 0

    monkeypatch.setattr(gpu_suite, "SECTIONS", {"misses": misses, "breaks": breaks, "works": lambda c, d: "fine"})
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--device", "cpu"])
    assert gpu_suite.main() == 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].startswith("misses        FAILED") and lines[0].endswith("3 > 2")
    assert "ZeroDivisionError: division by zero" in lines[1] and lines[2].startswith("works         ok")
