"""Megatron-Bridge with our layer specs: the losses of `xact pretrain`, checkpoints, and refusals in one line.

Where Megatron-Bridge is installed (`pip install --no-deps megatron-bridge`, and what its import then asks for).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from training import MARKS, STEPS, Run, execute, trainings

BRIDGE = importlib.util.find_spec("megatron.bridge") is not None
pytestmark = [*MARKS, pytest.mark.skipif(not BRIDGE, reason="needs Megatron-Bridge (megatron-bridge)")]
PROGRAM = Path(__file__).with_name("bridge_program.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return trainings(tmp_path_factory.getbasetemp()).start("one", "gated", "bf16")


def bridge(runs, name: str, *words: str, ranks: int = 1) -> Run:
    folder = runs.folder / name
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = execute([*launcher, str(PROGRAM), str(folder), str(runs.folder / "data"), str(STEPS), *words])
    return Run(folder, done.returncode, done.stdout + done.stderr)


@pytest.mark.parametrize(
    "words, ranks, twin, tolerance",
    [((), 1, "one", 1e-6), (("gated",), 1, "gated", 1e-6), (("bf16", "tp2"), 2, "bf16", 1e-3)],
    ids=["one", "gated", "bf16-tp2"],
)
def test_trains_as_xact_pretrain_does_and_goes_on_from_its_checkpoint(runs, words, ranks, twin, tolerance):
    run = bridge(runs, f"bridge-{twin}", *words, ranks=ranks)
    assert run.code == 0, run.output[-6000:]
    assert "> megatron-xact: " in run.output
    losses = run.scalars("lm loss")
    assert losses == pytest.approx(runs[twin].losses, abs=tolerance) and len(losses) == STEPS
    again = bridge(runs, f"bridge-{twin}-again", *words, f"load={run.folder}", ranks=ranks)
    assert again.code == 0, again.output[-6000:]
    assert again.scalars("lm loss") == {step: loss for step, loss in losses.items() if step > 8}


@pytest.mark.parametrize(
    "words, told",
    [(("bf16", "bare"), "write `specs.into(cfg.model, 'xielu')`"), (("bf16", "plain"), "--use-distributed-optimizer")],
)
def test_refuses_what_would_die_at_the_first_save(runs, words, told):
    run = bridge(runs, "bridge-refused", *words)
    assert run.code != 0
    assert told in run.output.split("Unsupported: ")[-1].splitlines()[0]
