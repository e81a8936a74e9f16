"""`xact study fp8-gate`: pairs with a planted gap and planted layers, verdicts, refusals, one pair that trains."""

import importlib.util
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from small_plans import stand_in, started
from warm import warm

from megatron_xact import cli, study_command
from megatron_xact.studies import fp8_gate, gate
from megatron_xact.studies.outside import Asked, Outside

ROOT = Path(__file__).parents[2]
LAYERS = 6
STEPS = 1000


def asked(steps: int = STEPS, **changes) -> Asked:
    return Asked(**{"text": f"steps = {steps}\n", "fp8": True, "steps": steps, "log_interval": 1,
                    "statistics_interval": 50, "save_interval": 10} | changes)  # fmt: skip


def correlated(rng: np.random.Generator, n: int, phi: float, sd: float) -> np.ndarray:
    """AR(1) [n], stationary from its start."""
    shocks = rng.normal(size=n) * math.sqrt(1 - phi**2)
    values = [rng.normal()]
    for shock in shocks[1:]:
        values.append(phi * values[-1] + shock)
    return sd * np.array(values)


def planted(folder: Path, gap: float, *, sd: float = 0.002, phi: float = 0.5, steps: int = STEPS,
            bad: int | None = None, grown: int | None = None, nan_from: int | None = None) -> None:  # fmt: skip
    """Two finished runs whose losses differ by `gap`; layer `bad` loses much in e4m3, the amax of `grown` grows."""
    rng = np.random.default_rng(0)
    batch = 6 * np.arange(1, steps + 1) ** -0.1 + rng.normal(0, 0.1, steps)
    losses = {"bf16": batch, "fp8": batch + gap + correlated(rng, steps, phi, sd)}
    if nan_from:
        losses["fp8"][nan_from - 1 :] = math.nan
    for name, values in losses.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(values, 1)]
        (folder / name / "progress.jsonl").write_text("\n".join(lines) + "\n")
        (folder / name / "report.json").write_text(json.dumps({"step": steps, "validation_loss": float(values[-1])}))
        with open(folder / name / "statistics.jsonl", "w") as file:
            for step in range(0, steps, 50):
                layers = {}
                for layer in range(1, LAYERS + 1):
                    suffers = name == "fp8" and layer == bad
                    factor = 20 if name == "fp8" and layer == grown else 2
                    amax = 5 * factor ** (step / (steps - 50))
                    values = {"postact_max": amax, "postact_fp8_error": 0.08 if suffers else 0.026,
                              "postact_fp8_flushed": 0.31 if suffers else 0.0}  # fmt: skip
                    gone = name == "fp8" and nan_from and step >= nan_from
                    layers[layer] = dict.fromkeys(values) if gone else values
                file.write(json.dumps({"step": step, "statistics": layers}) + "\n")


def judged(folder: Path, capsys, threshold: float = 0.01, window: int | None = None) -> tuple[int, dict, str]:
    """Exit code, gate.json and what was printed; nothing is trained."""
    code = fp8_gate.run(fp8_gate.pair_of(asked(), folder), threshold, window, pretrain=["false"])
    return code, json.loads((folder / "gate.json").read_text()), capsys.readouterr().out


# -- the gap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, phi", [(100, 0.0), (100, 0.7), (400, 0.9)])
def test_the_interval_covers_the_planted_gap(n, phi):
    rng = np.random.default_rng(1)
    found = [gate.gap(0.01 + correlated(rng, n, phi, 0.003)) for _ in range(300)]
    assert np.mean([e.low <= 0.01 <= e.high for e in found]) >= 0.9
    # About 1.3 times as wide as if the correlation were known, which is the price of t with four degrees of freedom.
    width = np.median([e.high - e.low for e in found]) / 2
    sd = 0.003 * math.sqrt((1 + phi) / (1 - phi) / n)
    assert 1.1 < width / (1.96 * sd) < 1.4


def test_what_the_batches_share_cancels_and_only_the_window_counts(tmp_path):
    planted(tmp_path, 0.02)
    path = tmp_path / "fp8/progress.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[:900]:
        line["loss"] += 1.0
    # Half a line, and a resumed run right behind it that repeats steps.
    path.write_text("".join(json.dumps(r) + "\n" for r in lines[:905]) + '{"step": 906, "lo')
    with open(path, "a") as file:
        file.writelines(json.dumps(r) + "\n" for r in lines[900:])
    found = gate.judge(tmp_path / "fp8", tmp_path / "bf16", 0.01)
    assert (found.window[0], found.window[-1], len(found.window)) == (901, 1000, 100)
    assert found.gap.value == pytest.approx(0.02, abs=1e-3) and found.gap.high - found.gap.low < 3e-3
    wide = gate.judge(tmp_path / "fp8", tmp_path / "bf16", 0.01, window=200)
    assert wide.gap.value == pytest.approx(0.52, abs=1e-3)


def test_a_short_run_has_a_window_of_twenty_records_and_a_tiny_one_no_interval(tmp_path):
    planted(tmp_path / "short", 0.0, steps=100)
    found = gate.judge(tmp_path / "short/fp8", tmp_path / "short/bf16", 0.01)
    assert len(found.window) == 20 and found.passed and found.settled
    planted(tmp_path / "tiny", 0.0, steps=8)
    found = gate.judge(tmp_path / "tiny/fp8", tmp_path / "tiny/bf16", 0.01)
    assert len(found.window) == 8 and found.passed and not found.settled


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_small_gap_passes_and_names_nobody(tmp_path, capsys):
    planted(tmp_path, 0.003, bad=2)
    code, told, text = judged(tmp_path, capsys)
    assert code == 0 and told["passed"] and told["settled"] and told["validation_gap"] == pytest.approx(0.003, abs=0.01)
    assert "FP8 gate: PASS" in text and "layer" not in text and "not settled" not in text
    assert told["worst_error"][0] == 2  # there always
    assert (tmp_path / "gate.png").stat().st_size > 10_000
    assert told["versions"]["torch"]


def test_a_large_gap_fails_and_names_the_planted_layers(tmp_path, capsys):
    planted(tmp_path, 0.03, bad=4, grown=5)
    code, told, text = judged(tmp_path, capsys)
    assert code == 1 and not told["passed"] and told["settled"]
    assert told["gap"]["low"] < 0.03 < told["gap"]["high"]
    assert (told["worst_error"][0], told["worst_growth"][0]) == (4, 5)
    lines = [line.strip() for line in text.splitlines()]
    assert next(line for line in lines if line.startswith("layer")) == "layer 4: 8 %, 31 % flushed to zero"
    growth = 20 ** (1 - 50 / 950)  # over the second of three first records, their median
    assert f"layer 5: x{growth:.3g} (BF16: x{2 ** (1 - 50 / 950):.3g})" in lines
    for word in ("smooth = true", "first-last-layers-bf16", "fp8.enabled=false"):
        assert word in text
    lost = gate.Layer(1, error=1.0, flushed=0.999, growth=1.0, error_bf16=0.0, growth_bf16=1.0)
    assert fp8_gate.error_of(lost) == "layer 1: 100 %, 100 % flushed to zero"


def test_an_interval_around_the_threshold_is_not_settled(tmp_path, capsys):
    planted(tmp_path, 0.0104, sd=0.02, phi=0.8)
    code, told, text = judged(tmp_path, capsys)
    assert told["gap"]["low"] < 0.01 < told["gap"]["high"] and not told["settled"]
    assert code == (0 if told["gap"]["value"] <= 0.01 else 1)
    assert "not settled" in text and "train longer" in text


def test_the_threshold_and_window_are_the_callers(tmp_path, capsys):
    planted(tmp_path, 0.03)
    code, told, text = judged(tmp_path, capsys, threshold=0.05, window=300)
    assert code == 0 and told["window"] == {"first": 701, "last": 1000, "records": 300}


@pytest.mark.parametrize("statistics", [True, False])
def test_a_loss_that_is_not_finite_fails_at_its_step(tmp_path, capsys, statistics):
    planted(tmp_path, 0.0, nan_from=701, bad=3)
    if not statistics:
        (tmp_path / "fp8/statistics.jsonl").unlink()
    code, told, text = judged(tmp_path, capsys)
    assert code == 1 and told["diverged_after_step"] == 700 and told["gap"] is None
    assert "FP8 diverged: its loss or gradient is NaN or infinite after step 700" in text
    assert told["layers_measured_at_steps"] == ([0, 700] if statistics else None)
    assert ("layer 3: 8 %" in text) is statistics and ("none can be named" in text) is not statistics


def test_records_from_before_there_were_fp8_statistics(tmp_path, capsys):
    planted(tmp_path, 0.03, grown=2)
    for name in ("fp8", "bf16"):
        path = tmp_path / name / "statistics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            for values in record["statistics"].values():
                del values["postact_fp8_error"], values["postact_fp8_flushed"]
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    code, told, text = judged(tmp_path, capsys)
    assert code == 1 and told["worst_growth"][0] == 2 and told["worst_error"] == []
    assert "worst growth" in text and "worst error" not in text


# -- the runs ---------------------------------------------------------------------------------------------------------


def trained(folder: Path, behaviour: dict, **settings) -> int:
    """With runs that only keep their promises about files, in a folder without records."""
    folder.mkdir(exist_ok=True)
    pair = fp8_gate.pair_of(asked(20), folder)
    return fp8_gate.run(pair, 0.01, pretrain=stand_in(folder, behaviour), **settings)


def test_fp8_first_and_nothing_twice(tmp_path, capsys):
    assert trained(tmp_path, {}) == 0
    assert trained(tmp_path, {}) == 0
    assert started(tmp_path) == ["fp8", "bf16"]
    assert (tmp_path / "config.toml").read_text() == asked(20).text
    assert "2 of 2 runs finished" in capsys.readouterr().out


def test_a_diverged_fp8_run_fails_without_a_bf16_run(tmp_path, capsys):
    planted(tmp_path, 0.0, steps=7)
    (tmp_path / "bf16/progress.jsonl").unlink()
    assert trained(tmp_path, {"fp8": [76]}) == 1
    assert started(tmp_path) == ["fp8"]
    told = capsys.readouterr().out
    assert "FP8 diverged: its loss or gradient is NaN or infinite after step 7" in told
    assert f"by itself tells xact pretrain {tmp_path}/config.toml" in told and "fp8.enabled=false" in told
    assert trained(tmp_path, {}) == 1  # looked at again
    assert started(tmp_path) == ["fp8"] and f"to train FP8 again, delete {tmp_path}/fp8" in capsys.readouterr().out


def test_a_bf16_run_that_diverges_is_not_trained_again(tmp_path):
    with pytest.raises(ValueError, match="no verdict, since the bf16 run failed: exit code 76"):
        trained(tmp_path, {"bf16": [76]})
    with pytest.raises(ValueError, match="BF16 diverges by itself: a planned NaN; to train it again, delete .*/bf16"):
        trained(tmp_path, {})
    assert started(tmp_path) == ["fp8", "bf16"]


@pytest.mark.parametrize("name, codes, count", [("fp8", [2], 1), ("fp8", [1, 1], 2), ("bf16", [2], 2)])
def test_no_verdict_where_a_run_fails_for_another_reason(tmp_path, name, codes, count):
    with pytest.raises(ValueError, match=f"no verdict, since the {name} run failed: exit code {codes[0]}: error: that"):
        trained(tmp_path, {name: codes}, retries=1)
    assert len(started(tmp_path)) == count
    assert not (tmp_path / "gate.json").exists()


def test_another_config_is_not_trained_into_the_same_folder(tmp_path):
    trained(tmp_path, {})
    with pytest.raises(ValueError, match="has runs of another config than this: choose another --out"):
        fp8_gate.pair_of(asked(30), tmp_path)


def test_intervals_are_short_enough_to_judge_by():
    def sets_for(**changes):
        calls = []
        outside = Outside(None, None, None, lambda path, sets: calls.append(sets) or asked(**changes))
        fp8_gate.asked_for(Path("a.toml"), ["a.b=1"], outside)
        return calls[-1]

    def intervals(log, statistics):
        return ["a.b=1", f"logging.log-interval={log}", f"xact.statistics-interval={statistics}"]

    assert sets_for(steps=10_000, log_interval=100, statistics_interval=0) == intervals(50, 500)
    assert sets_for(steps=10_000, log_interval=10, statistics_interval=100) == intervals(10, 100)
    assert sets_for(steps=40, save_interval=None) == [*intervals(1, 2), "checkpoint.save-interval=40"]
    assert sets_for(steps=12, log_interval=100, statistics_interval=100) == intervals(1, 1)


# -- as jobs ----------------------------------------------------------------------------------------------------------


def submitted(folder: Path, **settings) -> int:
    return fp8_gate.submit(fp8_gate.pair_of(asked(), folder), 0.01, **settings)


def test_the_pair_is_submitted_once_told_of_and_judged(tmp_path, jobs, capfd):
    out = tmp_path / "gate"
    assert submitted(out, per_node=8, options="--nodes=2 --time=1:00:00") == 75
    assert jobs.submitted() == [
        f"--parsable --array=1-2 --job-name=gate-pair --output={out}/logs/%x-%A_%a.out --nodes=2 --time=1:00:00 "
        f"launch/slurm.sbatch --nproc-per-node 8 --runs {out}/slurm/pair.txt"
    ]
    fp8, bf16 = (shlex.split(line) for line in (out / "slurm/pair.txt").read_text().splitlines())
    assert bf16[-2:] == ["--set", "fp8.enabled=false"] and bf16[0] == fp8[0] == str(out / "config.toml")
    assert fp8[fp8.index("--save") + 1] == fp8[fp8.index("--load") + 1] == str(out / "fp8") != bf16[3]
    told = capfd.readouterr().out.splitlines()
    assert told[0] == "gate-pair: job 41, 2 runs" and "no verdict yet: the same command tells how far" in told[1]
    assert len(told) == 2

    # While they are there, nothing more is submitted, nor trained here.
    jobs.there("41 1 RUNNING None", "41 2 PENDING Resources")
    assert submitted(out) == 75
    told = capfd.readouterr().out.splitlines()
    assert told[0].split() == f"fp8 [ ] 0% of {STEPS:,} steps, ETA not known yet; job 41_1".split()
    assert told[1:3] == ["  pending (Resources): bf16, job 41_2", "gate: 0 of 2 runs finished, 1 running, 1 queued"]
    with pytest.raises(ValueError, match="SLURM has 2 run.s. of .* queued or at work, job 41_1"):
        judged(out, capfd)
    assert len(jobs.submitted()) == 1

    # One is finished, the other has failed and goes again; then both are finished, and judged without a job.
    planted(out, 0.003)
    (out / "bf16/report.json").unlink()
    (out / "logs/gate-pair-41_2.out").write_text("slurm.sbatch: error: no .venv/bin/python\n")
    jobs.there()
    assert submitted(out) == 75
    told = capfd.readouterr().out.splitlines()
    assert told[0].strip() == f"bf16, job 41_2: slurm.sbatch: error: no .venv/bin/python; {out}/logs/gate-pair-41_2.out"
    assert told[1:3] == ["gate: 1 of 2 runs finished, 1 ended early", "gate-pair: job 42, 1 run"]
    assert "--array=2 " in jobs.submitted()[1]
    planted(out, 0.003)
    for _ in range(2):
        assert submitted(out) == 0 and "FP8 gate: PASS" in capfd.readouterr().out
    assert judged(out, capfd)[0] == 0 and len(jobs.submitted()) == 2


def test_diverged_jobs_are_not_submitted_again(tmp_path, jobs, capfd):
    assert submitted(tmp_path) == 75
    planted(tmp_path, 0.0, steps=7)
    jobs.there("41 2 RUNNING None")
    restarted = {"kind": "nan", "reason": "not finite", "decision": "restart 1 of 3 from step 4"}
    given_up = restarted | {"decision": 'stopped (on-nan = "stop")'}
    failures = tmp_path / "fp8/failures.jsonl"
    failures.write_text(json.dumps(restarted) + "\n")
    assert submitted(tmp_path) == 75 and "--array=1 " in jobs.submitted()[1]
    jobs.there("41 2 RUNNING None")
    failures.write_text(json.dumps(restarted) + "\n" + json.dumps(given_up) + "\n")
    capfd.readouterr()
    assert submitted(tmp_path) == 1
    told = capfd.readouterr().out
    assert "FP8 diverged" in told and "by itself tells this command once job 41_2 has ended" in told
    (tmp_path / "bf16/failures.jsonl").write_text(json.dumps(given_up) + "\n")
    with pytest.raises(ValueError, match="no verdict, since BF16 diverges by itself: not finite; to train it again"):
        submitted(tmp_path)
    assert len(jobs.submitted()) == 2


# -- the command ------------------------------------------------------------------------------------------------------

CONFIG = """
base = "{root}/configs/llama.toml"
[model]
num-layers = 3
hidden-size = 32
ffn-hidden-size = 64
num-attention-heads = 4
seq-length = 32
max-position-embeddings = 32
[data]
mock-data = true
tokenizer-type = "NullTokenizer"
vocab-size = 511
num-workers = 0
[optimizer]
lr = 1e-2
[schedule]
micro-batch-size = 2
global-batch-size = 2
train-iters = 24
lr-warmup-iters = 2
lr-wsd-decay-iters = 4
eval-interval = 100
eval-iters = 1
[activation]
name = "xielu"
"""


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "asks for no FP8, so there is nothing to compare: set mlp"),
        (["--set", "xact.mlp=fp8", "--set", "fp8.enabled=false"], "asks for no FP8"),
        (["--set", "xact.mlp=fp8", "--set", "fp8.smoth=true"], "smoth"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_training(tmp_path, capsys, words, told):
    (tmp_path / "tiny.toml").write_text(CONFIG.format(root=ROOT))
    out = tmp_path / "out"
    assert cli.main(["study", "fp8-gate", str(tmp_path / "tiny.toml"), "--out", str(out), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and told in said and not out.exists()


@pytest.mark.distributed
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None,
    reason="this trains on the CPU platform, where TransformerEngine's optimizer cannot run",
)
def test_a_pair_that_trains(tmp_path, tmp_path_factory, capsys):
    """Each run by the words that the gate gives it, in a process that has imported all; then the gate itself."""
    (tmp_path / "tiny.toml").write_text(CONFIG.format(root=ROOT))
    out, sets = tmp_path / "pair", ["xact.mlp=fp8"]
    outside = Outside(None, None, None, study_command.asked_for)
    found = fp8_gate.asked_for(tmp_path / "tiny.toml", sets, outside)
    assert (found.steps, found.log_interval, found.statistics_interval, found.save_interval) == (24, 1, 1, 24)
    pair = fp8_gate.pair_of(found, out)
    server = warm(tmp_path_factory.getbasetemp())
    for run in (pair.fp8, pair.bf16):
        server.run(*run.words, "--data-cache-path", str(tmp_path / "cache"))
    words = ["study", "fp8-gate", str(tmp_path / "tiny.toml"), "--out", str(out), "--set", *sets]
    assert cli.main([*words, "--threshold", "0.5"]) == 0
    told = capsys.readouterr()
    assert "FP8 gate: PASS" in told.out and told.err == ""
    records = [map(json.loads, (out / name / "progress.jsonl").open()) for name in ("fp8", "bf16")]
    fp8, bf16 = ({r["step"]: r["loss"] for r in run} for run in records)
    # One start: the first losses differ by what FP8 does to the products, and by nothing else.
    assert len(fp8) == len(bf16) == 24 and 0 < abs(fp8[1] - bf16[1]) < 0.02
    told = json.loads((out / "gate.json").read_text())
    assert told["gap"]["value"] == pytest.approx(np.mean([fp8[s] - bf16[s] for s in range(5, 25)]), abs=1e-5)
    assert [layer["number"] for layer in told["layers"]] == [1, 2, 3]
    assert all(0.015 < layer["error"] < 0.1 and layer["growth_bf16"] > 0 for layer in told["layers"])
