"""`xact study plan`, `run` and `fp8-gate`: their arguments and what they print."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_xact.argument_types import natural, positive
from megatron_xact.studies.outside import Outside

PLAN_EPILOG = """\
  xact study plan configs/studies/tiny.toml                          # writes runs/tiny, prints the ladder
  xact study plan configs/studies/small.toml --gpu h100              # and the hours on one H100
  xact study plan configs/studies/tiny.toml --measure                # the hours from a few steps of every model here

The same plan again changes nothing; a different one is never written over it. STUDY.toml: configs/studies/."""

RUN_EPILOG = """\
  xact study run runs/tiny --jobs 2                    # on this machine, two runs at a time
  xact study run runs/small --jobs 4                   # GPUs are shared out: on a machine of eight, two for each run
  xact study run runs/small --slurm --sbatch-options "--gpus-per-node=8 --time=12:00:00"

Finished cells are skipped and interrupted ones go on, so the same command again does what is left. Under --slurm it
first tells how far the runs are, and submits none that is queued or running. Then:
  xact study collect runs/tiny --out runs/tiny/runs.csv"""

GATE_EPILOG = """\
  xact study fp8-gate my_fp8.toml --out runs/gate
  xact study fp8-gate my_fp8.toml --out runs/gate --set schedule.train-iters=2000    # a shorter look
  xact study fp8-gate my_fp8.toml --out runs/gate --window 500 --threshold 0.02      # trained already: judged anew
  xact study fp8-gate my_fp8.toml --out runs/gate --slurm --sbatch-options "--gpus-per-node=8 --time=12:00:00"

CONFIG asks for FP8: mlp = "fp8" in [xact], or Megatron's fp8-format. It is trained twice, one run after the other, as
it is and with fp8.enabled=false: from the same seed, on the same data in the same order. Finished runs are not repeated
and interrupted ones go on, so the same command does what is left. Under --slurm both are jobs, side by side; the same
command then tells how far they are, submits again one that has failed, and judges when both have ended. Until then its
exit code is 75.

PASS (exit code 0): over the last tenth of the steps the loss of FP8 is on average at most 0.01 nat above that of BF16.
FAIL (exit code 1): it is more, or FP8 diverged. Then the layers are named whose post-activations lose most in FP8, or
whose largest values grew most. The 95 % interval of the difference says whether the runs were long enough to be sure.

DIR gets gate.json (every number), gate.png, config.toml (what was trained), fp8/ and bf16/ (the runs) and logs/."""


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = PLAN_EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", type=Path, metavar="STUDY.toml")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the study (default: runs/NAME)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--tokens-per-second", type=positive(float), metavar="N",
                       help="of the largest size; hours from that, others by FLOPs")  # fmt: skip
    speed.add_argument("--gpu", metavar="KIND", help="a100-40gb, a100, h100, h200: hours as `xact plan` expects them")
    speed.add_argument("--measure", action="store_true", help="train every model a few steps here; hours from that")
    parser.add_argument("--gpus", type=positive(int), default=1, metavar="N", help="per run, with --gpu (default: 1)")
    parser.add_argument("--noise", type=positive(float), default=0.002, metavar="NAT",
                        help="sd of a run's loss, for the expected interval (default: 0.002)")  # fmt: skip
    parser.add_argument("--multiplier", type=positive(float), default=1.05, metavar="M",
                        help="compute multiplier to find, see compare; same use (default: %(default)s)")  # fmt: skip


def plan(args: argparse.Namespace, outside: Outside) -> int:
    from megatron_xact.studies import expectation, measuring, planning, recipe
    from megatron_xact.whole import write_text

    study = recipe.read(args.study)
    made = planning.make(study, outside)
    folder = args.out or Path("runs") / made.name
    texts = planning.files(study, made, folder)
    lines, speed = [], None
    if args.tokens_per_second:
        speed = expectation.by_flops(made, args.tokens_per_second)
    elif args.gpu:  # before anything is written: it refuses GPUs that no batch divides over
        speed = expectation.Speed(
            f"{args.gpus} x {args.gpu} per run as `xact plan` expects, without starts",
            {(t.size, t.activation): outside.speed(
                study.base, [(study.source, planning.config_of(study, t, folder))], args.gpu, args.gpus
            ) for t in made.trunks},
        )  # fmt: skip
    print(planning.text(made))
    new = planning.write(texts, folder)
    if args.measure:
        speed = measuring.measure(made, folder)
    if speed:
        lines.append(expectation.hours_text(made, speed))
    if len(study.recipe.activations) > 1:
        lines.append(expectation.precision_text(made, args.noise, args.multiplier))
    print("\n".join(lines))
    write_text(folder / "expected.json", json.dumps({"expected": lines}, indent=1) + "\n")
    print(f"{'wrote' if new else 'unchanged'}: {folder} ({len(made.trunks)} configs); xact study run {folder}")
    return 0


def run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = RUN_EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a planned study")
    parser.add_argument("--jobs", type=positive(int), default=1, metavar="N",
                        help="runs at a time (default: 1); of an array under --slurm (default: all)")  # fmt: skip
    _running_arguments(parser)


def _running_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc-per-node", type=positive(int), metavar="N",
                        help="processes of each run (default: what its config needs)")  # fmt: skip
    parser.add_argument("--retries", type=natural, default=2, metavar="N", help="of a failed run (default: 2)")
    parser.add_argument("--slurm", action="store_true", help="as job arrays; where there is no sbatch, print them")
    parser.add_argument("--sbatch-options", default="", metavar="WORDS",
                        help="for every array, in one string; a single one: --sbatch-options=--time=60")  # fmt: skip


def run(args: argparse.Namespace, outside: Outside) -> int:
    from megatron_xact.studies import planning, running, slurm

    study = planning.load(args.folder)
    if args.slurm:
        slurm.submit(study, args.folder, args.nproc_per_node, args.jobs, args.sbatch_options)
        return 0
    return running.run(study, args.folder, args.jobs, args.nproc_per_node, args.retries)


def gate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = GATE_EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file that `xact pretrain` could train")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of both runs and the verdict")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE",
                        help="override one key of the config in both runs; may be repeated")  # fmt: skip
    parser.add_argument("--threshold", type=positive(float), default=0.01, metavar="NAT",
                        help="largest gap that passes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--window", type=positive(int), metavar="STEPS",
                        help="at the end, that the gap is the mean of (default: a tenth of all)")  # fmt: skip
    _running_arguments(parser)


def gate(args: argparse.Namespace, outside: Outside) -> int:
    from megatron_xact.studies import fp8_gate

    pair = fp8_gate.pair_of(fp8_gate.asked_for(args.config, args.set, outside), args.out)
    if args.slurm:
        return fp8_gate.submit(pair, args.threshold, args.window, args.nproc_per_node, args.sbatch_options)
    return fp8_gate.run(pair, args.threshold, args.window, args.nproc_per_node, args.retries)
