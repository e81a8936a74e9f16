"""launch/slurm.sbatch on a real SLURM cluster of two nodes: a killed rank, the signal before a time limit, an array.

And `xact study fp8-gate --slurm`, whose two jobs go through it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from cluster import ROOT, Cluster, why_not
from training import MARKS, STEPS, TP2, Trainings, trainings

from megatron_xact import cli

pytestmark = [*MARKS, pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
DP2 = ("--use-distributed-optimizer",)

# The interpreter that slurm.sbatch is told to use: ranks, and nothing else, run the command with faults.
PYTHON = """#!/bin/sh
if [ -n "$XACT_ATTEMPT" ] && [ "$1 $2" = "-m megatron_xact" ]; then
    shift 2
    set -- "{root}/tests/distributed/hooked.py" "$@"
fi
exec "{python}" "$@"
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Trainings:
    return trainings(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "progress.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


def test_killed_then_preempted_and_requeued_it_ends_as_if_nothing_had_happened(cluster, runs, tmp_path):
    """Two nodes, two ranks each, TP2 x DP2. kill -9 of a rank on the second node; SIGUSR1 to all ranks; requeue."""
    python = tmp_path / "python"
    python.write_text(PYTHON.format(root=ROOT, python=sys.executable))
    python.chmod(0o755)
    run = tmp_path / "run"
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=2", "launch/slurm.sbatch",
        str(runs.config), "--quiet", "--save", str(run), "--load", str(run), *TP2, *DP2,
        PYTHON=str(python), XACT_TEST_FAULTS="kill:5:3 scancel:9:0",
    )  # fmt: skip
    alone = tmp_path / "alone"  # meanwhile, the same without SLURM and faults
    runs.server.run(str(runs.config), "--quiet", "--save", str(alone), *TP2, *DP2, ranks=4)
    ended = cluster.wait(job, 400.0)
    said = cluster.output(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), f"{ended}\n{said[-6000:]}"
    (failure,) = map(json.loads, (run / "failures.jsonl").read_text().splitlines())
    assert (failure["kind"], failure["rank"], failure["host"], failure["step"]) == ("killed", 3, "n2", 5)
    (told,) = [line for line in said.splitlines() if line.startswith("xact: error:")]
    assert "rank 3 on n2, after step 5" in told and "restart 1 of 3 from step 4" in told
    assert "xact: saved at step 10 after SIGUSR1" in said and f"job {job} is requeued" in said
    assert losses(run) == losses(alone) and set(losses(run)) == set(range(1, STEPS + 1))
    steps = [json.loads(line)["step"] for line in (run / "progress.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 6), *range(5, STEPS + 1)]  # step 5 again after the kill; none again after the signal


def test_an_array_trains_a_line_of_a_file_each_and_a_bad_line_says_so(cluster, runs, tmp_path):
    names = ("xielu", "relu2")
    tasks = [f"{runs.config} --quiet --save {tmp_path}/{name} --set activation.name={name}" for name in names]
    (tmp_path / "runs.txt").write_text("\n".join(["# two activations", tasks[0], "", tasks[1]]) + "\n")
    short = ("--train-iters", "6", "--lr-wsd-decay-iters", "2")
    job = cluster.submit("--array=1-3", "launch/slurm.sbatch", "--runs", str(tmp_path / "runs.txt"), *short)
    numbers = [f"{job}_{task}" for task in (1, 2, 3)]
    states = [cluster.wait(number, 300.0)["JobState"] for number in numbers]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"], cluster.output(numbers[0])[-3000:]
    xielu, relu2 = losses(tmp_path / "xielu"), losses(tmp_path / "relu2")
    assert set(xielu) == set(relu2) == set(range(1, 7)) and xielu[1] != relu2[1]
    assert "has no line 3" in cluster.output(numbers[2])


def test_a_cancelled_job_does_not_come_back(cluster, runs, tmp_path):
    run = tmp_path / "run"
    job = cluster.submit("launch/slurm.sbatch", str(runs.config), "--quiet", "--save", str(run),
                         "--eval-interval", "4", "--eval-iters", "100000")  # fmt: skip
    cluster.until(lambda: (run / "progress.jsonl").exists() and 4 in losses(run), 120.0, lambda: cluster.output(job))
    cluster.cancel(job)
    assert cluster.wait(job, 60.0)["JobState"] == "CANCELLED"
    said = cluster.output(job)
    assert json.loads((run / "requeue").read_text()) == {"signal": "SIGTERM", "step": 4}, said[-3000:]
    assert "requeued" not in said


def test_an_fp8_gate_is_submitted_told_of_and_judged(cluster, runs, tmp_path, monkeypatch, capfd):
    """The same command again and again; of two jobs side by side, one is cancelled and submitted again."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    out = tmp_path / "gate"

    def gate() -> tuple[int, str]:
        words = ["study", "fp8-gate", str(runs.config), "--out", str(out), "--set", "xact.mlp=fp8", "--threshold", "1"]
        code = cli.main([*words, "--slurm", "--sbatch-options=--time=10"])
        return code, capfd.readouterr().out

    code, told = gate()
    job = re.match(r"gate-pair: job (\d+), 2 runs\n", told)[1]
    cluster.cancel(f"{job}_2")
    cluster.until(lambda: f"{job}_2" not in cluster.queue(), 60.0)
    again, told = gate()
    other = re.search(r"gate-pair: job (\d+), 1 run\n", told)[1]
    assert code == again == 75 and int(other) > int(job) and "1 ended early" in told
    while_there, told = gate()
    assert while_there == 75 and "submitted" not in told and told.count("job") == 2
    ended = [cluster.wait(task, 300.0) for task in (f"{job}_1", f"{other}_2")]
    assert [e["JobState"] for e in ended] == ["COMPLETED", "COMPLETED"], cluster.output(f"{other}_2")[-3000:]
    code, told = gate()
    assert code == 0 and "FP8 gate: PASS" in told
    fp8, bf16 = losses(out / "fp8"), losses(out / "bf16")
    assert set(fp8) == set(bf16) == set(range(1, STEPS + 1)) and 0 < abs(fp8[1] - bf16[1]) < 0.02
    gap = sum(fp8[s] - bf16[s] for s in range(STEPS - 9, STEPS + 1)) / 10  # of twelve records, in five stretches
    assert json.loads((out / "gate.json").read_text())["gap"]["value"] == pytest.approx(gap, abs=1e-5)
