"""`xact study fp8-gate`: one config trained in FP8 and in BF16, and whether FP8 may be used for it.

    DIR/config.toml       what is trained; the twin is the same command with --set fp8.enabled=false
    DIR/fp8, DIR/bf16     the runs, folders like any other run's; DIR/logs: what they printed
    DIR/gate.json         the verdict and every number
    DIR/gate.png          the losses, their difference, the layers

FP8 goes first, since it is the one that may fail: where it is refused or diverges, no BF16 run is paid for.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from megatron_xact import __version__
from megatron_xact.studies import gate_plot, numbers, words
from megatron_xact.studies.gate import Gate, Layer, judge
from megatron_xact.studies.outside import Asked, Outside
from megatron_xact.studies.running import INTERRUPTED, NAN, PRETRAIN, Task, train
from megatron_xact.studies.state import Run
from megatron_xact.studies.table import write_text

RECORDS = 200  # of the loss, at least, where there are as many steps: ten times what a window needs
MEASUREMENTS = 20  # of the layers, at least
ROUNDING = 0.026  # error of e4m3 where nothing is flushed to 0


def run(asked: Asked, folder: Path, threshold: float, window: int | None = None, processes: int | None = None,
        retries: int = 2, pretrain: Sequence[str] = PRETRAIN) -> int:  # fmt: skip
    """Trains what is left, judges, writes and tells. The exit code: 0: FP8 passes; 1: it does not; 130: interrupted.

    pretrain: the command before a run's words. ValueError: there is no verdict, and why.
    """
    keep(asked.text, folder / "config.toml")
    fp8, bf16 = (Task(run_of(name, folder, asked)) for name in ("fp8", "bf16"))
    bf16.after = fp8
    if train([fp8, bf16], folder, 1, processes, retries, pretrain) == INTERRUPTED:
        return INTERRUPTED
    diverged = fp8.state == "failed" and fp8.code == NAN
    for task in () if diverged else (fp8, bf16):
        if task.state == "failed":
            raise ValueError(f"no verdict, since the {task.run.name} run failed: {task.reason}; see {task.run.log}")
    found = judge(fp8.run.folder, bf16.run.folder, threshold, window, diverged)
    verdict = _verdict(found)
    write_text(folder / "gate.json", json.dumps(_numbers(found, verdict, asked), indent=1) + "\n")
    gate_plot.draw(found, folder / "gate.png")
    print(words.lines(f"FP8 gate: {'PASS' if found.passed else 'FAIL'}", _told(found, verdict, bf16)))
    print(f"wrote {folder / 'gate.json'} and gate.png")
    return 0 if found.passed else 1


def asked_for(config: Path, sets: list[str], outside: Outside) -> Asked:
    """What both runs record often enough to be judged. ValueError: the config asks for no FP8."""
    asked = outside.asked(config, sets)
    if not asked.fp8:
        raise ValueError(
            f"{config} asks for no FP8, so there is nothing to compare: set mlp = \"fp8\" in [xact] (--set "
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


def keep(text: str, path: Path) -> None:
    """What is trained lies beside the runs, so that a later command cannot go on with something else."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path.parent} has runs of another config than this: choose another --out, or delete it "
                         f"(theirs: {path})")  # fmt: skip
    write_text(path, text)


def run_of(name: str, folder: Path, asked: Asked) -> Run:
    save = str(folder / name)
    twin = ("--set", "fp8.enabled=false") if name == "bf16" else ()
    given = (str(folder / "config.toml"), "--quiet", "--save", save, "--load", save, *twin)
    return Run(name=name, folder=folder / name, words=given, log=folder / "logs" / f"{name}.log", last=asked.steps)


# -- told -------------------------------------------------------------------------------------------------------------


def _verdict(gate: Gate) -> str:
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


def _told(gate: Gate, verdict: str, bf16: Task) -> list[tuple[str, str]]:
    told = [("verdict", verdict)]
    if bf16.state != "finished":
        command = shlex.join(["xact", "pretrain", *bf16.run.words])
        told.append(("BF16", f"was not trained; whether it diverges by itself tells {command}"))
    if gate.validation_gap is not None:
        told.append(("validation", f"FP8 - BF16 = {gate.validation_gap:+.4f} nat at the end"))
    if gate.passed:
        return told
    if not gate.layers:
        told.append(("layers", "no statistics were recorded, so none can be named"))
    if worst := gate.worst("error"):
        told.append(("worst error", f"of post-activations in e4m3 at step {gate.measured[1]:,}; rounding alone costs "
                                    f"{_percent(ROUNDING)}"))  # fmt: skip
        told += [("", error_of(layer)) for layer in worst]
    if worst := gate.worst("growth"):
        told.append(("worst growth", f"of the largest |post-activation| since step {gate.measured[0]:,}"))
        told += [("", growth_of(layer)) for layer in worst]
    told.append(("to try", 'smooth = true in [fp8] (with mlp = "fp8"): a scale for every channel'))
    told.append(("", "first-last-layers-bf16 = true, with num-layers-at-start-in-bf16 and num-layers-at-end-in-bf16"))
    told.append(("", "fp8.enabled=false: train in BF16"))
    return told


def error_of(layer: Layer) -> str:
    return f"layer {layer.number}: {_percent(layer.error)}, {_percent(layer.flushed)} flushed to zero"


def growth_of(layer: Layer) -> str:
    beside = "" if math.isnan(layer.growth_bf16) else f" (BF16: x{layer.growth_bf16:.3g})"
    return f"layer {layer.number}: x{layer.growth:.3g}{beside}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _numbers(gate: Gate, verdict: str, asked: Asked) -> dict:
    window = gate.window
    return numbers.rounded({
        "passed": gate.passed,
        "settled": gate.settled,
        "verdict": verdict,
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
        | {name: _version(name) for name in ("torch", "megatron-core", "transformer-engine")},
    })  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
