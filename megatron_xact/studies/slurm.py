"""`xact study run --slurm`: trunks as one job array, each smaller budget as another that follows task by task.

Line k of every list belongs to trunk k, and arrays name the lines that are not finished: a cooldown's task waits for
the task of its own trunk (aftercorr), or for nothing where that is finished. What is submitted is a script, which can
be read and run by hand.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from megatron_xact.studies import state
from megatron_xact.studies.ladder import Cell
from megatron_xact.studies.planning import Plan
from megatron_xact.studies.table import write_text

LAUNCHER = "launch/slurm.sbatch"


def submit(plan: Plan, folder: Path, per_node: int | None, limit: int, options: str) -> int:
    """Writes the script and runs it where there is sbatch. The exit code is its own."""
    texts = script(plan, folder, per_node, limit, options)
    if texts is None:
        print(f"all cells of {folder} are finished")
        return 0
    for path, text in texts.items():
        write_text(path, text)
    path = folder / "slurm" / "submit.sh"
    if shutil.which("sbatch") is None:
        print(texts[path], end="")
        print(f"# there is no sbatch here; where there is: bash {path}")
        return 0
    if not Path(LAUNCHER).is_file():
        raise ValueError(f"submit from the repository's root: there is no {LAUNCHER} here")
    return subprocess.run(["bash", str(path)]).returncode


def script(plan: Plan, folder: Path, per_node: int | None, limit: int, options: str) -> dict[Path, str] | None:
    """Files by path: a list of runs for every array, and submit.sh. None: nothing is left to run."""
    place = folder / "slurm"
    ranks = [] if per_node is None else ["--nproc-per-node", str(per_node)]
    throttle = f"%{limit}" if limit > 1 else ""
    texts: dict[Path, str] = {}
    lines = ["#!/usr/bin/env bash", f"# What is left of the study {plan.name}. Run it in the repository's root.",
             "set -euo pipefail"]  # fmt: skip

    def array(name: str, runs: Path, numbers: list[int], extra: str = "") -> None:
        words = ["sbatch", "--parsable", f"--array={_ranges(numbers)}{throttle}", f"--job-name={plan.name}-{name}",
                 *shlex.split(options)]  # fmt: skip
        command = shlex.join(words) + extra + " " + shlex.join([LAUNCHER, *ranks, "--runs", str(runs)])
        lines.extend([f"job=$({command})", f'echo "{plan.name}-{name}: job $job, {len(numbers)} runs"'])

    def write(name: str, those: list[Cell]) -> Path:
        path = place / f"{name}.txt"
        texts[path] = "".join(shlex.join(state.words(c, folder)) + "\n" for c in those)
        return path

    own = [Cell(t, t.budgets[-1]) for t in plan.trunks]
    open_trunks = [k for k, c in enumerate(own, 1) if not state.is_finished(c, folder)]
    if open_trunks:
        array("trunks", write("trunks", own), open_trunks)
        lines.append("trunks=${job%%;*}")  # --parsable adds the cluster's name where there are several
    for i in range(len(plan.trunks[0].budgets) - 1):
        those = [Cell(t, t.budgets[i]) for t in plan.trunks]
        left = [k for k, c in enumerate(those, 1) if not state.is_finished(c, folder)]
        runs = write(f"budget{i + 1}", those)
        if waiting := [k for k in left if k in open_trunks]:
            array(f"budget{i + 1}", runs, waiting, " --dependency=aftercorr:$trunks --kill-on-invalid-dep=yes")
        if free := [k for k in left if k not in open_trunks]:
            array(f"budget{i + 1}-ready", runs, free)
    if len(lines) == 3:
        return None
    return texts | {place / "submit.sh": "\n".join(lines) + "\n"}


def _ranges(numbers: list[int]) -> str:
    """1-3,7"""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
