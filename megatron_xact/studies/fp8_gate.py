"""`xact study fp8-gate`: one config trained in FP8 and in BF16, and whether FP8 may be used for it.

    DIR/config.toml       what is trained; the twin is the same command with --set fp8.enabled=false
    DIR/fp8, DIR/bf16     the runs, folders like any other run's; DIR/logs: what they printed
    DIR/gate.json         the verdict and every number
    DIR/gate.png          the losses, their difference, the layers

FP8 goes first, since it is the one that may fail: where it is refused or diverges, no BF16 run is paid for. Under SLURM
both are jobs, side by side. What has ended is judged from its folder, so that looking again trains nothing.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_xact import __version__, installed
from megatron_xact.studies import gate_plot, numbers, slurm, words
from megatron_xact.studies.gate import Gate, Layer, judge
from megatron_xact.studies.outside import Asked, Outside
from megatron_xact.studies.running import INTERRUPTED, PRETRAIN, SAVED, Task, train
from megatron_xact.studies.state import Run
from megatron_xact.whole import write_text

RECORDS = 200  # of the loss, at least, where there are as many steps: ten times what a window needs
MEASUREMENTS = 20  # of the layers, at least
ARRAY = "pair"  # of the two jobs; the second is BF16's
ROUNDING = 0.026  # error of e4m3 where nothing is flushed to 0


@dataclass(frozen=True)
class Pair:
    folder: Path
    asked: Asked
    fp8: Run
    bf16: Run

    def has_ended(self) -> bool:
        """As far as a verdict needs it. ValueError: there will be none, since BF16 is no measure."""
        if self.bf16.diverged:
            raise ValueError(f"no verdict, since BF16 diverges by itself: {self.bf16.diverged}; to train it again, "
                             f"delete {self.bf16.folder}")  # fmt: skip
        return bool(self.fp8.diverged) or (self.fp8.is_finished and self.bf16.is_finished)


def run(pair: Pair, threshold: float, window: int | None = None, processes: int | None = None, retries: int = 2,
        pretrain: Sequence[str] = PRETRAIN) -> int:  # fmt: skip
    """Trains what is left, and judges. The exit code: that of `verdict`, or 130: interrupted.

    pretrain: the command before a run's words. ValueError: there is no verdict, and why.
    """
    if not pair.has_ended():
        fp8 = Task(pair.fp8)
        bf16 = Task(pair.bf16, after=fp8)
        if train([fp8, bf16], pair.folder, 1, processes, retries, pretrain) == INTERRUPTED:
            return INTERRUPTED
        for task in () if pair.fp8.diverged else (fp8, bf16):
            if task.state == "failed":
                raise ValueError(f"no verdict, since the {task.run.name} run failed: {task.reason}; see {task.run.log}")
    return verdict(pair, threshold, window)


def submit(pair: Pair, threshold: float, window: int | None = None, per_node: int | None = None,
           options: str = "") -> int:  # fmt: skip
    """Submits what is left to SLURM, or judges. The exit code: that of `verdict`, or 75: the runs have not ended."""
    title, array = pair.folder.resolve().name, slurm.Array(ARRAY, (pair.fp8, pair.bf16))
    if pair.has_ended() or not slurm.submit_arrays(title, [array], pair.folder, per_node, options=options):
        return verdict(pair, threshold, window)
    print("no verdict yet: the same command tells how far the runs are, and judges when both have ended")
    return SAVED


def verdict(pair: Pair, threshold: float, window: int | None = None) -> int:
    """Of runs that have ended: written, drawn and told. The exit code: 0: FP8 passes; 1: it does not."""
    found = judge(pair.fp8.folder, pair.bf16.folder, threshold, window, bool(pair.fp8.diverged))
    sentence = _sentence(found)
    write_text(pair.folder / "gate.json", json.dumps(_numbers(found, sentence, pair.asked), indent=1) + "\n")
    gate_plot.draw(found, pair.folder / "gate.png")
    print(words.lines(f"FP8 gate: {'PASS' if found.passed else 'FAIL'}", _told(found, sentence, pair)))
    print(f"wrote {pair.folder / 'gate.json'} and gate.png")
    return 0 if found.passed else 1


def asked_for(config: Path, sets: list[str], outside: Outside) -> Asked:
    """What both runs record often enough to be judged. ValueError: the config asks for no FP8."""
    asked = outside.asked(config, sets)
    if not asked.fp8:
        raise ValueError(
            f'{config} asks for no FP8, so there is nothing to compare: set mlp = "fp8" in [xact] (--set '
            "xact.mlp=fp8) or Megatron's fp8-format, and leave enabled in [fp8] at true"
        )
    if asked.steps is None:
        raise ValueError(f"{config} counts samples; the gate compares step by step: set train-iters, not train-samples")
    often = min(asked.log_interval, max(1, asked.steps // RECORDS))
    measured = min(asked.statistics_interval or asked.steps, max(1, asked.steps // MEASUREMENTS))
    intervals = [f"logging.log-interval={often}", f"xact.statistics-interval={measured}"]
    if asked.save_interval is None:
        intervals.append(f"checkpoint.save-interval={asked.steps}")
    return outside.asked(config, [*sets, *intervals])


def pair_of(asked: Asked, folder: Path) -> Pair:
    """What is trained then lies beside the runs, so that a later command cannot go on with something else."""
    path = folder / "config.toml"
    if path.exists() and path.read_text(encoding="utf-8") != asked.text:
        raise ValueError(f"{folder} has runs of another config than this: choose another --out, or delete it "
                         f"(theirs: {path})")  # fmt: skip
    write_text(path, asked.text)

    def run_of(name: str, *twin: str) -> Run:
        save = str(folder / name)
        given = (str(path), "--quiet", "--save", save, "--load", save, *twin)
        return Run(name=name, folder=folder / name, words=given, log=folder / "logs" / f"{name}.log", last=asked.steps)

    return Pair(folder, asked, run_of("fp8"), run_of("bf16", "--set", "fp8.enabled=false"))


# -- told -------------------------------------------------------------------------------------------------------------


def _sentence(gate: Gate) -> str:
    if gate.gap is None:
        return f"FP8 diverged: its loss or gradient is NaN or infinite after step {gate.diverged:,}"
    gap, first, last = gate.gap, *gate.window[[0, -1]]
    sign = "<=" if gate.passed else ">"
    told = (f"FP8 - BF16 = {words.interval(gap, '+.4f')} nat {sign} {gate.threshold:g}, mean of {len(gate.window)} "
            f"records, steps {first:,} to {last:,}")  # fmt: skip
    if gate.settled:
        return told
    few = math.isinf(gap.high)
    why = "too few records for an interval" if few else "the interval holds the threshold"
    return f"{told}; not settled, {why}: train longer, or choose a longer --window"


def _told(gate: Gate, sentence: str, pair: Pair) -> list[tuple[str, str]]:
    told = [("verdict", sentence)]
    if not pair.bf16.is_finished:
        job = slurm.under_way(pair.folder).get((ARRAY, 2))
        by_hand = shlex.join(["xact", "pretrain", *pair.bf16.words])
        how = f"this command once job {job.task} has ended" if job else by_hand
        told.append(("BF16", f"was not trained to its end; whether it diverges by itself tells {how}"))
    if pair.fp8.diverged:
        told.append(("again", f"to train FP8 again, delete {pair.fp8.folder}"))
    if gate.validation_gap is not None:
        told.append(("validation", f"FP8 - BF16 = {gate.validation_gap:+.4f} nat at the end"))
    if gate.passed:
        return told
    if not gate.layers:
        told.append(("layers", "no statistics were recorded, so none can be named"))
    if worst := gate.worst("error"):
        told.append(("worst error", f"of post-activations in e4m3 at step {gate.measured[1]:,}; rounding alone costs "
                                    f"{words.percent(ROUNDING)}"))  # fmt: skip
        told += [("", error_of(layer)) for layer in worst]
    if worst := gate.worst("growth"):
        told.append(("worst growth", f"of the largest |post-activation| since step {gate.measured[0]:,}"))
        told += [("", growth_of(layer)) for layer in worst]
    told.append(("to try", 'smooth = true in [fp8] (with mlp = "fp8"): a scale for every channel'))
    told.append(("", "first-last-layers-bf16 = true, with num-layers-at-start-in-bf16 and num-layers-at-end-in-bf16"))
    told.append(("", "fp8.enabled=false: train in BF16"))
    return told


def error_of(layer: Layer) -> str:
    return f"layer {layer.number}: {words.percent(layer.error)}, {words.percent(layer.flushed)} flushed to zero"


def growth_of(layer: Layer) -> str:
    beside = "" if math.isnan(layer.growth_bf16) else f" (BF16: x{layer.growth_bf16:.3g})"
    return f"layer {layer.number}: x{layer.growth:.3g}{beside}"


def _numbers(gate: Gate, sentence: str, asked: Asked) -> dict:
    window = gate.window
    return numbers.rounded({
        "passed": gate.passed,
        "settled": gate.settled,
        "verdict": sentence,
        "threshold": gate.threshold,
        "gap": gate.gap and {"value": gate.gap.value, "low": gate.gap.low, "high": gate.gap.high},
        "window": {"first": window[0], "last": window[-1], "records": len(window)} if len(window) else None,
        "validation_gap": gate.validation_gap,
        "diverged_after_step": gate.diverged,
        "steps": asked.steps,
        "layers": [vars(layer) for layer in gate.layers],
        "layers_measured_at_steps": gate.measured,
        "worst_error": [layer.number for layer in gate.worst("error")],
        "worst_growth": [layer.number for layer in gate.worst("growth")],
        "versions": {"megatron-xact": __version__, "python": platform.python_version()}
        | {name: installed.version(name) for name in ("torch", "megatron-core", "transformer-engine")},
    })  # fmt: skip
