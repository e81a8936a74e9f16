"""`xact study run` with real processes that train nothing, its job arrays, `collect`, and one study that trains."""

import errno
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from small_plans import finish, plan, stand_in, started

from megatron_xact import cli
from megatron_xact.pretraining import exits
from megatron_xact.studies import running, slurm, state
from megatron_xact.studies.collecting import best_factor, collect, table_of
from megatron_xact.studies.ladder import cells
from megatron_xact.studies.reading import read
from megatron_xact.studies.recipe import Size

ROOT = Path(__file__).parents[2]
ONE = {"sizes": {"a": Size(2, 32, 2, 96)}, "seeds": (1,), "tokens_per_parameter": (5, 10)}
TRUNKS = ["runs/a-swiglu-s1", "runs/a-xielu-s1"]


def run(study, folder, behaviour=None, **settings):
    return running.run(study, folder, pretrain=stand_in(folder, behaviour or {}), **settings)


# -- on this machine --------------------------------------------------------------------------------------------------


def test_everything_is_trained_once_trunks_first(tmp_path, capfd):
    study = plan(tmp_path, **ONE)
    assert run(study, tmp_path, jobs=2) == 0
    (branch,) = {c.folder.split("/", 2)[2] for c in cells(study.trunks) if c.is_branch}
    assert sorted(started(tmp_path)) == sorted([*TRUNKS, *(f"{t}/{branch}" for t in TRUNKS)])
    assert all(state.is_finished(c, tmp_path) for c in cells(study.trunks))
    told = capfd.readouterr()
    assert "4 of 4 runs finished, 0 failed" in told.out
    assert told.err.count(": finished") == 4
    assert run(study, tmp_path) == 0  # nothing is started again
    assert len(started(tmp_path)) == 4


def test_a_half_trained_cell_is_not_finished(tmp_path):
    study = plan(tmp_path, **ONE)
    finish(tmp_path / TRUNKS[0], study.trunks[0].budgets[-1].steps - 1)
    finish(tmp_path / TRUNKS[1], study.trunks[1].budgets[-1].steps)
    assert run(study, tmp_path) == 0
    assert started(tmp_path)[0] == TRUNKS[0] and TRUNKS[1] not in started(tmp_path)
    assert len(started(tmp_path)) == 3


def test_failures_are_retried_bounded_and_named(tmp_path, capfd):
    study = plan(tmp_path, **ONE)
    assert run(study, tmp_path, {"a-swiglu-s1": [1] * 5, "a-xielu-s1": [1, 0]}, retries=2) == 1
    count = started(tmp_path)
    assert (count.count(TRUNKS[0]), count.count(TRUNKS[1])) == (3, 2)
    assert len(count) == 6  # and the one cooldown whose trunk is there
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("failed")]
    assert len(lines) == 2
    assert "a-swiglu-s1 at" in lines[0] and "exit code 1: error: that was planned" in lines[0]
    assert "it follows a-swiglu-s1 at" in lines[1]
    assert run(study, tmp_path) == 0  # the next command does what is left
    assert len(started(tmp_path)) == 8


def test_what_would_fail_again_is_not_retried(tmp_path):
    study = plan(tmp_path, **ONE)
    assert run(study, tmp_path, {"a-swiglu-s1": [2], "a-xielu-s1": [76]}) == 1
    assert sorted(started(tmp_path)) == TRUNKS


def test_exit_codes_are_those_of_pretraining():
    mine = (running.USER_ERROR, running.SAVED, running.NAN, running.TAKEN, running.INTERRUPTED)
    assert mine == (exits.USER_ERROR, exits.PREEMPTED, exits.NAN, exits.TAKEN, exits.INTERRUPTED)


def test_a_folder_that_a_left_behind_run_has_taken_is_waited_for(tmp_path, capfd, monkeypatch):
    """However often it must be asked, it is no failure, and other runs go on meanwhile."""
    monkeypatch.setattr(running, "ASK_AGAIN", 0.3)
    study = plan(tmp_path, **ONE)
    assert run(study, tmp_path, {"a-swiglu-s1": [79] * 4}, retries=0) == 0
    starts = started(tmp_path)
    assert (starts.count(TRUNKS[0]), starts.count(TRUNKS[1])) == (5, 1) and starts[:2] == TRUNKS
    assert capfd.readouterr().err.count("waiting for a run at work in its folder") == 1


def test_a_killed_command_lets_its_runs_save(tmp_path):
    study = plan(tmp_path, **ONE)
    command = stand_in(tmp_path, {"a-swiglu-s1": ["wait"]})
    script = "from pathlib import Path; from megatron_xact.studies import planning, running\n"
    script += f"p = Path({str(tmp_path)!r}); running.run(planning.load(p), p, pretrain={command!r})"
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (tmp_path / TRUNKS[0] / "waiting").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while not (tmp_path / TRUNKS[0] / "saved").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run(study, tmp_path, {}) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_save_and_the_same_command_goes_on(tmp_path, number):
    study = plan(tmp_path, **ONE)
    command = stand_in(tmp_path, {"a-swiglu-s1": ["wait"], "a-xielu-s1": ["wait"]})
    script = "import sys; from pathlib import Path; from megatron_xact.studies import planning, running\n"
    script += f"p = Path({str(tmp_path)!r}); sys.exit(running.run(planning.load(p), p, 2, pretrain={command!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not all((tmp_path / t / "waiting").exists() for t in TRUNKS):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        with pytest.raises(ValueError, match="another `xact study` is at work"):
            run(study, tmp_path)
        process.send_signal(number)
        assert process.wait(60) == 130
        told = process.stderr.read()
    assert all((tmp_path / t / "saved").exists() for t in TRUNKS)
    assert told.count("saved after a signal") == 2 and "the same command goes on" in told
    assert running.run(study, tmp_path, pretrain=command) == 0
    assert len(started(tmp_path)) == 6


def test_a_folder_where_nothing_can_be_locked_is_taken_all_the_same(tmp_path, monkeypatch):
    """As on Lustre mounted without flock."""

    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert run(plan(tmp_path, **ONE), tmp_path, jobs=2) == 0


def test_threads_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))  # a job's, of more
    assert running.environment(2, 2)["OMP_NUM_THREADS"] == "2"
    assert running.environment(16, 1)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    "jobs, processes, expected",
    [(2, None, ["4,5", "6,7"]), (2, 1, ["4", "5"]), (4, 2, ["4,5", "6,7"]), (1, None, ["4,5,6,7"])],
)
def test_gpus_are_shared_out(tmp_path, monkeypatch, jobs, processes, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    study = plan(tmp_path, **ONE | {"seeds": (1, 2)})
    command = [sys.executable, str(tmp_path / "note.py"), *stand_in(tmp_path, {})]
    # Both wait for `jobs` notes, so that they do run at a time.
    (tmp_path / "note.py").write_text(
        "import os, pathlib, subprocess, sys, time\n"
        f"notes = pathlib.Path({str(tmp_path)!r}) / 'gpus'\nnotes.mkdir(exist_ok=True)\n"
        "(notes / str(os.getpid())).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        f"while len(list(notes.iterdir())) < {jobs}: time.sleep(0.02)\n"
        "sys.exit(subprocess.run(sys.argv[1:]).returncode)\n"
    )
    assert running.run(study, tmp_path, jobs, processes, pretrain=command) == 0
    assert sorted({note.read_text() for note in (tmp_path / "gpus").iterdir()}) == expected


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ValueError, match="--nproc-per-node 2 is more than the 1 GPUs"):
        running.run(plan(tmp_path, **ONE), tmp_path, 1, 2)


def test_a_folder_without_a_study_is_refused(tmp_path, capsys):
    assert cli.main(["study", "run", str(tmp_path)]) == 2
    assert "is not the folder of a study: no study.json" in capsys.readouterr().err
    (tmp_path / "study.json").write_text('{"format": 1}')
    assert cli.main(["study", "run", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


# -- job arrays -------------------------------------------------------------------------------------------------------


def test_arrays_follow_their_trunks_and_shrink(tmp_path, jobs):
    folder = tmp_path / "study"
    study = plan(folder, **ONE | {"seeds": (1, 2), "tokens_per_parameter": (5, 10, 20)})  # 4 trunks, 8 cooldowns
    slurm.submit(study, folder, 8, 3, "--time=1:00:00")
    lists = folder / "slurm"
    out = f"--output={folder}/logs/%x-%A_%a.out"
    tail = f"launch/slurm.sbatch --nproc-per-node 8 --runs {lists}"
    wait = "--dependency=aftercorr:41 --kill-on-invalid-dep=yes"
    assert jobs.submitted() == [
        f"--parsable --array=1-4%3 --job-name=test-trunks {out} --time=1:00:00 {tail}/trunks.txt",
        f"--parsable --array=1-4%3 --job-name=test-budget1 {out} --time=1:00:00 {wait} {tail}/budget1.txt",
        f"--parsable --array=1-4%3 --job-name=test-budget2 {out} --time=1:00:00 {wait} {tail}/budget2.txt",
    ]
    # Line k of every list is a run of trunk k, in words that `xact pretrain` takes.
    for name in ("trunks", "budget1", "budget2"):
        lines = [shlex.split(line) for line in (lists / f"{name}.txt").read_text().splitlines()]
        assert [line[0] for line in lines] == [str(folder / "configs" / f"{t.name}.toml") for t in study.trunks]
        for words in lines:
            args = cli.parse(["pretrain", *words])
            assert (args.branch_from is None) == (name == "trunks") and "--save" in args.overrides

    # None is there any more. One trunk and another one's first cooldown have finished: what is left is submitted.
    finish(folder / "runs" / study.trunks[1].name, study.trunks[1].budgets[-1].steps)
    first = next(c for c in cells(study.trunks) if c.is_branch and c.trunk is study.trunks[1])
    finish(folder / first.folder, first.budget.steps)
    slurm.submit(study, folder, None, 1, "")
    wait = "--dependency=aftercorr:44 --kill-on-invalid-dep=yes"
    assert [line.replace(f" {out}", "").split(" launch/")[0] for line in jobs.submitted()[3:]] == [
        "--parsable --array=1,3-4 --job-name=test-trunks",
        f"--parsable --array=1,3-4 --job-name=test-budget1 {wait}",
        f"--parsable --array=1,3-4 --job-name=test-budget2 {wait}",
        "--parsable --array=2 --job-name=test-budget2",
    ]
    for cell in cells(study.trunks):
        finish(folder / cell.folder, cell.budget.steps)
    slurm.submit(study, folder, None, 1, "")
    assert len(jobs.submitted()) == 7


def test_what_is_queued_or_running_is_told_and_not_submitted_again(tmp_path, jobs, capfd):
    study = plan(tmp_path, **ONE | {"seeds": (1, 2)})  # 4 trunks, 4 cooldowns
    slurm.submit(study, tmp_path, None, 1, "")
    told = capfd.readouterr().out
    assert told == "test-trunks: job 41, 4 runs\ntest-budget1: job 42, 4 runs\n"
    # Trunk 1 has finished, 2 is at work, 3 waits, 4 has failed; their cooldowns: queued, cancelled, queued, gone.
    jobs.there("41 2 RUNNING None", "41 3 PENDING Resources", "42 1 PENDING Priority", "42 3 PENDING Dependency")
    trunks = [tmp_path / "runs" / t.name for t in study.trunks]
    steps = study.trunks[0].budgets[-1].steps
    finish(trunks[0], steps)
    trunks[1].mkdir(parents=True)
    records = [{"step": s, "time": 1e9 + 10 * s + (3600 if s > 4 else 0)} for s in range(1, 11)]  # an hour lay between
    (trunks[1] / "progress.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    log = tmp_path / "logs/test-trunks-41_4.out"
    log.write_text("xact: error: rank 0 on n1, after step 5: it was planned; stopped\nsome more\n")
    with pytest.raises(ValueError, match="SLURM has 4 run.s. of .* queued or at work, job 41_2 for one: --slurm tells"):
        run(study, tmp_path)
    slurm.submit(study, tmp_path, None, 1, "")
    lines = capfd.readouterr().out.splitlines()
    left = timedelta(seconds=10 * (steps - 10))
    assert lines[0].strip().startswith(f"{study.trunks[1].name} at ") and lines[0].endswith(
        f"{10 / steps:4.0%} of {steps:,} steps, ETA {left}; job 41_2"
    )
    assert "job 41_4: error: rank 0 on n1, after step 5: it was planned; stopped; " in lines[1] and str(log) in lines[1]
    assert [line.split(":")[0].strip() for line in lines[2:5]] == [
        "pending (Resources)", "pending (Priority)", "pending (Dependency)"
    ]  # fmt: skip
    assert lines[5:] == [
        "test: 1 of 8 runs finished, 1 running, 3 queued, 3 ended early",
        "test-trunks: job 43, 1 run", "test-budget1: job 44, 1 run", "test-budget1: job 45, 1 run",
    ]  # fmt: skip
    again = [line.split(" launch/")[0] for line in jobs.submitted()[2:]]
    assert [re.search(r"--array=\S+", line)[0] for line in again] == ["--array=4", "--array=2", "--array=4"]
    assert [re.findall(r"aftercorr:(\d+)", line) for line in again] == [[], ["41"], ["43"]]
    jobs.there("41 2 RUNNING None", "41 3 PENDING Resources", "42 1 PENDING Priority", "42 3 PENDING Dependency",
               "43 4 RUNNING None", "44 2 PENDING Dependency", "45 4 PENDING Dependency")  # fmt: skip
    slurm.submit(study, tmp_path, None, 1, "")
    assert len(jobs.submitted()) == 5
    assert capfd.readouterr().out.endswith("test: 1 of 8 runs finished, 2 running, 5 queued\n")


def test_nothing_is_submitted_while_squeue_does_not_answer_or_sbatch_refuses(tmp_path, jobs):
    study = plan(tmp_path, **ONE)
    jobs.fail("sbatch", "sbatch: error: invalid partition")
    with pytest.raises(ValueError, match="sbatch refused a job of .*submit.sh, see above"):
        slurm.submit(study, tmp_path, None, 1, "")
    jobs.work("sbatch")
    slurm.submit(study, tmp_path, None, 1, "")
    jobs.fail("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(ValueError, match="squeue does not tell whether runs .* none is started: .* Unable to contact"):
        slurm.submit(study, tmp_path, None, 1, "")
    assert len(jobs.submitted()) == 2


def test_without_sbatch_the_script_is_printed(tmp_path, monkeypatch, capsys):
    study = plan(tmp_path, **ONE)
    monkeypatch.setenv("PATH", str(tmp_path))
    slurm.submit(study, tmp_path, None, 1, "")
    told = capsys.readouterr().out
    assert told.startswith((tmp_path / "slurm" / "submit.sh").read_text()) and "no sbatch here" in told


# -- collect ----------------------------------------------------------------------------------------------------------

CONFIG = '[data]\ntrain-data-path = ["{0}/text"]\nvalid-data-path = ["{0}/valid"]\ntokenizer-model = "{1}"\n'


def trained(folder, loss_of, **changes):
    """A plan whose cells have losses; alphas and speed as report.json has them."""
    study = plan(folder, **ONE | changes)
    for c in cells(study.trunks):
        alphas = {str(layer): {"alpha_p": 0.1 * layer} for layer in (1, 2, 10)} if c.trunk.activation == "xielu" else {}
        finish(folder / c.folder, c.budget.steps, loss_of(c), alphas=alphas, tokens_per_second=1000.0)
        (folder / c.folder / "config.toml").write_text(CONFIG.format("corpus", "mine"))
    return study


def test_rows_of_finished_cells(tmp_path):
    study = trained(tmp_path / "study", lambda c: 3.0 + c.is_branch)
    (tmp_path / "study" / cells(study.trunks)[-1].folder / "report.json").unlink()
    rows, told = collect(tmp_path / "study", tmp_path)
    assert len(rows) == 3 and "3 of 4 cells" in told[0] and "missing: a-xielu-s1 at" in told[1]
    row = next(r for r in rows if r.activation == "xielu")
    trunk = study.trunks[1]
    assert (row.size, row.seed, row.loss, row.tokens) == ("a", 1, 3.0, trunk.budgets[-1].steps * 8 * 64)
    assert (row.params, row.batch, row.lr, row.trunk) == (trunk.params, 512, 3e-3, "a-xielu-s1")
    assert (row.run, row.step_time_s) == ("study/runs/a-xielu-s1", 0.512)
    assert json.loads(row.alphas) == {"alpha_p": pytest.approx([0.1, 0.2, 1.0])}
    assert (row.tokenizer, row.data) == ("mine", "corpus/text corpus/valid")
    pair = [r for r in rows if r.activation == "swiglu"]
    assert {r.trunk for r in pair} == {"a-swiglu-s1"} and pair[0].alphas == ""


def test_the_table_of_a_study_with_few_tokens(tmp_path):
    """No unit is in doubt in a study's own folder, nor in the table that was made of it."""
    few = {"tokens_per_parameter": (0.5, 1), "batch": 4 * 64, "warmup": 0.1}
    trained(tmp_path / "study", lambda c: 5.0, **few)
    assert cli.main(["study", "collect", str(tmp_path / "study"), "--out", str(tmp_path / "runs.csv")]) == 0
    table = read(tmp_path / "runs.csv")
    assert len(table) == 4 and max(table.array("tokens")) < 1e5


def test_studies_of_two_tokenizers_are_refused(tmp_path):
    trained(tmp_path, lambda c: 3.0)
    (tmp_path / TRUNKS[0] / "config.toml").write_text(CONFIG.format("corpus", "another"))
    with pytest.raises(ValueError, match="mixes tokenizer"):
        table_of([tmp_path], tmp_path)


@pytest.mark.parametrize("loss", [None, float("nan")])
def test_a_cell_without_a_loss_is_named(tmp_path, loss):
    trained(tmp_path, lambda c: loss if c.trunk.activation == "xielu" else 3.0)
    with pytest.raises(ValueError, match="a-xielu-s1 at .* has no validation loss"):
        collect(tmp_path, tmp_path)


def test_measured_step_times_come_before_those_of_runs_beside_each_other(tmp_path):
    study = trained(tmp_path, lambda c: 3.0)
    rows, told = collect(tmp_path, tmp_path)
    assert told[-1] == "step times: of the runs themselves"
    speeds = {size: {name: 512.0 for name in ("swiglu", "xielu")} for size in {t.size for t in study.trunks}}
    (tmp_path / state.SPEEDS).write_text(json.dumps(speeds))
    measured, told = collect(tmp_path, tmp_path)
    assert told[-1] == "step times: as xact study plan --measure found them"
    assert [r.step_time_s for r in measured] == [r.batch / 512.0 for r in rows] != [r.step_time_s for r in rows]
    (tmp_path / state.SPEEDS).write_text("{")
    with pytest.raises(ValueError, match="speeds.json is damaged: delete it"):
        collect(tmp_path, tmp_path)


def test_nothing_finished_is_refused(tmp_path):
    plan(tmp_path, **ONE)
    with pytest.raises(ValueError, match="no cell of .* is finished: xact study run"):
        collect(tmp_path, tmp_path)


def test_of_a_sweep_the_best_rate_is_kept(tmp_path):
    best = {"swiglu": 1.0, "xielu": 2.0}
    study = trained(tmp_path, lambda c: 3 + (c.trunk.factor - best[c.trunk.activation]) ** 2, sweep=(0.5, 1, 2))
    rows, told = collect(tmp_path, tmp_path)
    assert len(cells(study.trunks)) == 12 and len(rows) == 4
    assert {(r.activation, r.lr) for r in rows} == {("swiglu", 3e-3), ("xielu", 6e-3)}
    assert "swiglu a: 1x of 0.5x, 1x, 2x" in told[1] and not told[1].endswith("widen it")
    assert told[2].endswith("widen it")


def test_the_best_rate_is_that_of_the_smoothed_losses():
    assert best_factor([0.25, 0.5, 1, 2, 4], [3.2, 3.049, 3.05, 3.05, 3.2]) == 1  # 0.5 is least by luck
    assert best_factor([1, 2], [3.0, 2.9]) == 2
    assert best_factor([0.5, 1, 2], [3.0, 2.9, 2.7]) == 2  # no minimum inside


# -- a study that trains ----------------------------------------------------------------------------------------------

MINI = """
base = "{root}/configs/llama.toml"
[study]
activations = ["xielu"]
seeds = [1]
tokens = [105000, 210000]
learning-rate = 3e-3
batch = 10240
warmup = 0.5
validation-tokens = 2000
[study.sizes]
mini = {{layers = 2, hidden = 32, heads = 2, ffn = 96}}
[model]
seq-length = 64
max-position-embeddings = 64
[data]
train-data-path = ["{data}/train_text_document"]
valid-data-path = ["{data}/validation_text_document"]
tokenizer-type = "HuggingFaceTokenizer"
tokenizer-model = "{data}/tokenizer"
num-workers = 0
[schedule]
micro-batch-size = 32
[logging]
log-interval = 1
[xact]
telemetry-interval = 5
statistics-interval = 0
"""


@pytest.mark.distributed
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None,
    reason="this trains on the CPU platform, where TransformerEngine's optimizer cannot run",
)
def test_a_study_from_recipe_to_table(tmp_path, capsys):
    from megatron_xact.pretraining.data.preprocess import prepare

    made = prepare(tmp_path / "data", source="stdlib", vocab_size=512, max_bytes=300_000)
    (tmp_path / "mini.toml").write_text(MINI.format(root=ROOT, data=tmp_path / "data"))
    study, table = str(tmp_path / "study"), tmp_path / "runs.csv"
    assert cli.main(["study", "plan", str(tmp_path / "mini.toml"), "--out", study]) == 0
    code = cli.main(["study", "run", study])
    assert code == 0, "\n".join(log.read_text() for log in (tmp_path / "study/logs").iterdir())
    assert cli.main(["study", "collect", study, "--out", str(table)]) == 0
    assert "2 of 2 cells are finished" in capsys.readouterr().out
    short, long = read(table).runs
    assert (short.trunk, long.trunk) == ("mini-xielu-s1",) * 2
    assert short.tokens == pytest.approx(105e3, rel=0.08) and long.tokens == pytest.approx(210e3, rel=0.08)
    assert 3 < long.loss < short.loss < 6.3  # ln 512 = 6.24
    assert long.tokenizer == made.tokenizer_sha256[:12]
    # The cooldown left the trunk: from its step, with its loss so far.
    (branch,) = (tmp_path / "study/runs/mini-xielu-s1/branches").iterdir()
    first = json.loads((branch / "progress.jsonl").read_text().splitlines()[0])
    trunk = [json.loads(line) for line in (tmp_path / "study/runs/mini-xielu-s1/progress.jsonl").open()]
    there = next(r for r in trunk if r["step"] == first["step"])
    assert first["step"] == int(branch.name.removeprefix("step-").split("+")[0]) + 1
    assert first["loss"] == pytest.approx(there["loss"], rel=1e-6)
