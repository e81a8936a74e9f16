"""What clusters do, under torchrun: ranks killed, stopped, signalled; NaN; a node's launcher with another one.

Each run is the real command with real ranks; a start costs about 12 s of imports, so faults follow one another in the
same run, and those that need no launcher are tried on forks of one process (warm.py). Everything must end at the losses
of the run that nothing happened to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from training import MARKS, ROOT, STEPS, TP2, Run, Trainings, copy_of, trainings

from megatron_xact.pretraining import exits, report
from megatron_xact.pretraining.launchers import Plan, free_port
from megatron_xact.pretraining.status import latest_step

pytestmark = MARKS
HOOKED = [str(Path(__file__).with_name("hooked.py")), "pretrain"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Trainings:
    return trainings(tmp_path_factory.getbasetemp()).start("tp2")


def words(runs: Trainings, folder: Path, *more: str) -> list[str]:
    saving = ["--save", str(folder), "--load", str(folder), "--data-cache-path", f"{folder}-cache"]
    return [str(runs.config), "--quiet", *saving, *more]


def _heed_interrupts() -> None:
    """Shells start what they put into the background with Ctrl-C ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Supervised:
    """A supervisor under way, as `xact pretrain` and the launch scripts start it, with everything below it."""

    def __init__(self, plan: Plan, *options: str, faults: str = ""):
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        environment |= {"XACT_TEST_FAULTS": faults, "XACT_TEST_SUPERVISOR": (mark := os.urandom(8).hex())}
        self.mark = f"XACT_TEST_SUPERVISOR={mark}".encode()
        self.output = Path(plan.run).with_name(f"output-{mark}.txt")
        command = [sys.executable, "-m", "megatron_xact.pretraining.supervisor", plan.dump(), *options]
        with open(self.output, "w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=out, preexec_fn=_heed_interrupts
            )

    def wait(self, code: int, timeout: float = 240.0) -> str:
        """What was printed, once it has ended with this exit code and nothing of it is left running."""
        try:
            ended = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            ended = None
        left = [process.cmdline() for process in self.processes()]
        for process in self.processes():
            process.kill()
        said = self.output.read_text()
        assert ended == code, f"exit code {ended}\n{said[-6000:]}"
        assert not left, left
        return said

    def processes(self) -> list[psutil.Process]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (entry / "environ").read_bytes():
                    found.append(psutil.Process(int(entry.name)))
            except (OSError, psutil.Error):
                continue
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]

    def wait_for_ranks(self, number: int) -> None:
        """Until so many ranks have begun to import."""
        self.until(lambda: sum("RANK" in process.environ() for process in self.processes()) >= number, 0.05)

    def until(self, true: Callable[[], bool], between: float) -> None:
        """`true`, asked again after so many seconds."""
        deadline = time.monotonic() + 120.0
        while not true():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output.read_text()[-6000:]
            time.sleep(between)


def failures(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "progress.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


def test_a_stopped_rank_is_named_and_the_run_goes_on(runs, tmp_path):
    run = tmp_path / "run"
    plan = Plan(words(runs, run, *TP2, "--set", "launch.hang-timeout=6"), str(run), per_node=2, program=HOOKED)
    said = Supervised(plan, faults="stop:6:0").wait(exits.FINISHED)
    (failure,) = failures(run)
    assert (failure["kind"], failure["rank"], failure["host"]) == ("hang", 0, os.uname().nodename)
    assert failure["step"] == 6 and failure["decision"] == "restart 1 of 3 from step 4"
    told = [line for line in said.splitlines() if line.startswith("xact: error:")]
    assert len(told) == 1 and "rank 0 on" in told[0] and "not heard of any more" in told[0]
    stacks = (run / "logs" / "stacks-rank1.txt").read_text()
    assert "all_reduce" in stacks  # where the other rank waited
    assert "Traceback" not in said  # --quiet: those are in the ranks' logs
    assert losses(run) == runs["tp2"].losses


def test_signals_save_what_is_done_and_the_run_goes_on_bit_for_bit(runs, tmp_path):
    """They reach all processes of the ranks, as under torchrun and SLURM: data loaders' workers, checkpoint writers.

    One after a save; four within a second, from the middle of a save on; one while torch is imported, Ctrl-C there.
    """
    run, alone = tmp_path / "run", tmp_path / "alone"
    endless = [*TP2, "--num-workers", "2", "--save-interval", "20"]
    endless += ["--train-iters", "100000", "--eval-interval", "100000"]
    plan = Plan(words(runs, run, *endless), str(run), per_node=2)

    signalled = Supervised(plan)
    signalled.until(lambda: latest_step(run) == 20, 0.01)
    time.sleep(0.1)
    signalled.process.send_signal(signal.SIGTERM)
    said, first = signalled.wait(exits.PREEMPTED), latest_step(run)
    assert f"xact: saved at step {first} after SIGTERM" in said and first > 20
    assert json.loads((run / "requeue").read_text()) == {"signal": "SIGTERM", "step": first}

    signalled, next_one = Supervised(plan), run / f"iter_{first - first % 20 + 20:07d}"
    signalled.until(next_one.exists, 0.001)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        signalled.process.send_signal(number)
        time.sleep(0.2)
    said, last = signalled.wait(exits.PREEMPTED), latest_step(run)
    assert f"xact: saved at step {last} after SIGUSR1" in said and last > first
    assert not (run / "failures.jsonl").exists()
    steps = [json.loads(line)["step"] for line in (run / "progress.jsonl").read_text().splitlines()]
    assert steps == [*range(1, last + 1)]  # none twice
    runs.server.run(*words(runs, alone, *endless, "--exit-interval", str(last)), ranks=2)
    assert losses(run) == losses(alone)

    early = Supervised(plan)
    early.wait_for_ranks(2)
    early.process.send_signal(signal.SIGTERM)
    early.wait(exits.PREEMPTED)
    assert json.loads((run / "requeue").read_text())["step"] == last and len(losses(run)) == last

    interrupted = Supervised(plan)
    interrupted.wait_for_ranks(2)
    interrupted.process.send_signal(signal.SIGINT)
    told = interrupted.wait(exits.INTERRUPTED, 30.0).splitlines()[-1]
    assert told.startswith(f"xact: interrupted without saving: the same command goes on from step {last}, the last")


def test_launchers_of_two_nodes_start_again_together_after_a_kill(runs, tmp_path):
    run = tmp_path / "run"
    plan = Plan(words(runs, run, *TP2), str(run), nodes=2, per_node=1, program=HOOKED)
    meeting = ["--rendezvous", f"127.0.0.1:{free_port()}"]
    second = Supervised(plan, "--node-rank", "1", *meeting, faults="kill:5:1")
    first = Supervised(plan, *meeting, faults="kill:5:1")
    said = first.wait(exits.FINISHED)
    second.wait(exits.FINISHED, 30.0)
    (failure,) = failures(run)
    assert (failure["kind"], failure["rank"], failure["step"]) == ("killed", 1, 5)
    assert f"rank 1 on {os.uname().nodename}, after step 5: ended without a word" in said
    assert losses(run) == runs["tp2"].losses


def test_faults_that_a_rank_meets_by_itself(runs, tmp_path):
    """A signal in a long evaluation, a NaN, a stopped neighbour: without a launcher, ranks tell it themselves."""
    run = tmp_path / "run"
    ranks = runs.server
    # One rank alone is signalled, in an evaluation that would take hours.
    lives = ranks.start(*words(runs, run, *TP2, "--eval-interval", "2", "--eval-iters", "100000"), ranks=2)
    _until(lambda: (run / "progress.jsonl").exists() and 2 in losses(run), lives)
    time.sleep(0.5)
    os.kill(lives[1].pid, signal.SIGTERM)
    assert [life.wait() for life in lives] == [0, 0]
    assert json.loads((run / "requeue").read_text()) == {"signal": "SIGTERM", "step": 2}

    # The next one is stopped: the others are not, and say which it was.
    lives = ranks.start(
        *words(runs, run, *TP2, "--eval-interval", "4", "--eval-iters", "100000", "--set", "launch.hang-timeout=8"),
        ranks=2,
    )
    _until(lambda: 4 in losses(run), lives)
    os.kill(lives[0].pid, signal.SIGSTOP)
    assert lives[1].wait() == exits.HANG
    assert "xact: error: rank 0, no progress for" in lives[1].output
    lives[0].kill()
    ranks.run(*words(runs, run, *TP2), ranks=2)
    assert losses(run) == runs["tp2"].losses
    # Nor do the evaluations that were broken off, or were of another length, change what later ones are made of.
    validation, theirs = (each.scalars("lm loss validation") for each in (Run(run, 0, ""), runs["tp2"]))
    assert {step: validation[step] for step in theirs} == theirs and set(theirs) == {6, 12}

    diverged = tmp_path / "diverged"
    said = ranks.run(*words(runs, diverged, "--lr", "1e30", "--save-interval", "1"), code=exits.NAN)
    (failure,) = failures(diverged)
    assert (failure["kind"], failure["rank"], failure["decision"]) == ("nan", 0, "stopped")
    assert f"xact: error: rank 0 on {os.uname().nodename}, after step {failure['step']}: found " in said
    steps = sorted(path.name for path in diverged.glob("iter_*"))
    assert steps and len(steps) < STEPS - 1


def test_a_run_started_again_at_its_end_tells_what_it_told_before(runs, tmp_path):
    """Also where a signal has broken off the last evaluation: such a run is not finished."""
    run = copy_of(runs["tp2"], tmp_path / "run")
    told = report.figures(report.read(run))
    (run / "report.json").unlink()
    lives = runs.server.start(*words(runs, run, *TP2, "--eval-iters", "100000"), ranks=2)
    _until(lambda: (log := run / "logs" / "rank0.log").exists() and "Evaluating on" in log.read_text(), lives)
    os.kill(lives[1].pid, signal.SIGTERM)
    assert [life.wait() for life in lives] == [0, 0]
    assert json.loads((run / "requeue").read_text()) == {"signal": "SIGTERM", "step": STEPS}
    assert not (run / "report.json").exists()
    runs.server.run(*words(runs, run, *TP2), ranks=2)
    assert json.loads((run / "report.json").read_text())["step"] == STEPS
    assert report.figures(report.read(run)) == told
    assert [step for step, _ in report.read(run).alphas] == list(range(STEPS + 1))


def test_the_records_tell_what_megatron_measured(runs):
    """progress.jsonl beside Megatron's own TensorBoard scalars, and the model's FLOPs counted by hand."""
    run = runs["tp2"]
    records = {record["step"]: record for record in run.records("progress.jsonl")}
    norms = {step: record["grad_norm"] for step, record in records.items()}
    assert norms == pytest.approx(run.scalars("grad-norm"), rel=1e-6) and set(norms) == set(range(1, STEPS + 1))
    # Megatron logs the rate that its scheduler has just set, for the next step.
    rates, theirs = {step: record["learning_rate"] for step, record in records.items()}, run.scalars("learning-rate")
    assert [rates[step + 1] for step in range(1, STEPS)] == pytest.approx([theirs[step] for step in range(1, STEPS)])
    hidden, ffn, sequence, vocabulary, layers = 32, 64, 32, 512, 2
    attention = 4 * hidden * hidden + 2 * sequence * hidden / 2  # projections; scores and values, of half the square
    per_token = 6 * (layers * (attention + 2 * hidden * ffn) + hidden * vocabulary)
    assert records[1]["tokens_per_second"] is None
    for record in list(records.values())[1:]:
        assert record["model_flops_per_second"] == pytest.approx(per_token * record["tokens_per_second"], rel=1e-2)
        assert record["mfu"] is None  # no GPU
        assert 1e8 < record["memory_bytes"] < 1e10
    speeds = {step: record["tokens_per_second"] for step, record in records.items() if step > 1}
    assert run.scalars("tokens-per-second") == pytest.approx(speeds, rel=1e-2)


def _until(true, lives) -> None:
    deadline = time.monotonic() + 180.0
    while not true():
        assert time.monotonic() < deadline, "\n".join(life.output[-3000:] for life in lives)
        time.sleep(0.05)
