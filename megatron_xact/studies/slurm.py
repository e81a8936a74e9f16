"""Runs as SLURM jobs, for `xact study run --slurm` and `fp8-gate --slurm`: arrays that may follow one another.

    DIR/slurm/NAME.txt     an array's runs; its task k trains line k
    DIR/slurm/submit.sh    submits what is left; it can be read, and run by hand
    DIR/slurm/jobs         JOB NAME TASKS of every array that was submitted; squeue knows which of them are still there
    DIR/logs/              what the jobs print, unless --sbatch-options says otherwise

A run that is finished, queued or at work is not submitted; any other one is, and goes on from its last checkpoint.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_xact.studies.ladder import Cell
from megatron_xact.studies.planning import Plan
from megatron_xact.studies.progress import duration, listed, row
from megatron_xact.studies.state import Run, alone, last_word, run_of
from megatron_xact.whole import write_text

LAUNCHER = "launch/slurm.sbatch"
SPEAKERS = ("xact: ", "slurm.sbatch: ", "slurmstepd: ")  # whose last line in a job's log tells why it ended


@dataclass(frozen=True)
class Array:
    name: str  # a word: it names files and a variable of the script
    runs: Sequence[Run]
    after: Array | None = None  # each task waits for the task of the same number there

    @property
    def unfinished(self) -> list[int]:
        """Numbers of tasks, from 1."""
        return [k for k, run in enumerate(self.runs, 1) if not run.is_finished]


@dataclass(frozen=True)
class Job:
    number: str  # of its array
    task: str  # NUMBER_TASK, as scancel wants it
    state: str  # as squeue calls it: running, pending, completing, ...
    reason: str  # why it waits


def submit(plan: Plan, folder: Path, per_node: int | None, limit: int, options: str) -> None:
    """`submit_arrays` for a study: trunks, and every smaller budget as an array of cooldowns that follow them."""
    if not submit_arrays(plan.name, arrays(plan, folder), folder, per_node, limit, options):
        print(f"all runs of {folder} are finished")


def arrays(plan: Plan, folder: Path) -> list[Array]:
    def of_budget(name: str, i: int, after: Array | None = None) -> Array:
        return Array(name, [run_of(Cell(t, t.budgets[i]), folder) for t in plan.trunks], after)

    trunks = of_budget("trunks", -1)
    return [trunks, *(of_budget(f"budget{i + 1}", i, trunks) for i in range(len(plan.trunks[0].budgets) - 1))]


def submit_arrays(title: str, those: Sequence[Array], folder: Path, per_node: int | None = None, limit: int = 1,
                  options: str = "") -> bool:  # fmt: skip
    """Tells how far the runs are; writes the script for what is left and runs it where there is sbatch.

    limit: tasks of an array at a time; 1: all. False: all runs are finished. ValueError: sbatch or squeue fails.
    """
    if not any(array.unfinished for array in those):
        return False
    with alone(folder):
        there = under_way(folder)
        print("".join(f"{line}\n" for line in told(title, those, folder, there)), end="", flush=True)
        texts = script(title, those, folder, there, per_node, limit, options)
        for path, text in texts.items():
            write_text(path, text)
        if not texts:
            return True
        path = folder / "slurm" / "submit.sh"
        if shutil.which("sbatch") is None:
            print(f"{texts[path]}# there is no sbatch here; where there is: bash {path}")
            return True
        if not Path(LAUNCHER).is_file():
            raise ValueError(f"submit from the repository's root: there is no {LAUNCHER} here")
        if subprocess.run(["bash", str(path)]).returncode:
            raise ValueError(f"sbatch refused a job of {path}, see above; the same command submits what is missing")
    return True


def script(title: str, those: Sequence[Array], folder: Path, there: dict[tuple[str, int], Job], per_node: int | None,
           limit: int, options: str) -> dict[Path, str]:  # fmt: skip
    """Files by path: a list of runs for every array, and submit.sh; {}: nothing is to be submitted."""
    place, logs = folder / "slurm", folder / "logs"
    ranks = [] if per_node is None else ["--nproc-per-node", str(per_node)]
    throttle = f"%{limit}" if limit > 1 else ""
    texts: dict[Path, str] = {}
    lines = ["#!/usr/bin/env bash", f"# What is left of {title}. Run it in the repository's root.",
             "set -euo pipefail", shlex.join(["mkdir", "-p", str(logs)])]  # fmt: skip
    for array in those:
        runs, name = place / f"{array.name}.txt", f"{title}-{array.name}"
        waiting: dict[str, list[int]] = {}  # for which job -> tasks
        for k in array.unfinished:
            if (array.name, k) not in there:
                waiting.setdefault(_followed(array, k, there), []).append(k)
        for job, tasks in waiting.items():
            texts[runs] = "".join(shlex.join(run.words) + "\n" for run in array.runs)
            words = ["sbatch", "--parsable", f"--array={_ranges(tasks)}{throttle}", f"--job-name={name}",
                     f"--output={logs}/%x-%A_%a.out", *shlex.split(options)]  # fmt: skip
            wait = f" --dependency=aftercorr:{job} --kill-on-invalid-dep=yes" if job else ""
            command = shlex.join(words) + wait + " " + shlex.join([LAUNCHER, *ranks, "--runs", str(runs)])
            noted = f'echo "$job {array.name} {",".join(map(str, tasks))}" >>{shlex.quote(str(place / "jobs"))}'
            count = "1 run" if len(tasks) == 1 else f"{len(tasks)} runs"
            lines += [f"job=$({command})", noted, f'echo {shlex.quote(name)}": job ${{job%%;*}}, {count}"']
        if waiting and any(other.after is array for other in those):
            lines.append(f"{array.name}=${{job%%;*}}")  # --parsable adds the cluster's name where there are several
    return texts | {place / "submit.sh": "\n".join(lines) + "\n"} if texts else {}


def _followed(array: Array, k: int, there: dict[tuple[str, int], Job]) -> str:
    """The job that a task waits for: one that is there, or a variable of the script; "": none."""
    if array.after is None or array.after.runs[k - 1].is_finished:
        return ""
    job = there.get((array.after.name, k))
    return job.number if job else f"${array.after.name}"


def _ranges(numbers: list[int]) -> str:
    """1-3,7"""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


# -- what became of them ----------------------------------------------------------------------------------------------


def _submitted(folder: Path) -> list[tuple[str, str, str, int]]:
    """(job, cluster or "", array, task) of all that was ever submitted, the latest last."""
    try:
        lines = (folder / "slurm" / "jobs").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for job, name, tasks in map(str.split, lines):
        number, _, cluster = job.partition(";")
        found += [(number, cluster, name, int(task)) for task in tasks.split(",")]
    return found


def under_way(folder: Path) -> dict[tuple[str, int], Job]:
    """Queued or at work, by (array, task); {} too where there is no squeue to ask. ValueError: it does not answer."""
    there: dict[tuple[str, int], Job] = {}
    if not (submitted := _submitted(folder)) or shutil.which("squeue") is None:
        return there
    for cluster in dict.fromkeys(cluster for _, cluster, _, _ in submitted):
        names = {number: name for number, where, name, _ in submitted if where == cluster}
        words = ["squeue", "--noheader", "--array", f"--jobs={','.join(names)}", "--format=%F %K %T %r"]
        words += [f"--clusters={cluster}"] if cluster else []
        asked = subprocess.run(words, capture_output=True, text=True)
        if asked.returncode and "Invalid job id" not in asked.stderr:  # which it says of one that has long ended
            raise ValueError(f"squeue does not tell whether runs of {folder} are queued, so none is started: "
                             f"{asked.stderr.strip()}")  # fmt: skip
        for line in asked.stdout.splitlines():
            number, task, state, reason = line.split(maxsplit=3)
            there[names[number], int(task)] = Job(number, f"{number}_{task}", state.lower(), reason)
    return there


def told(title: str, those: Sequence[Array], folder: Path, there: dict[tuple[str, int], Job]) -> list[str]:
    """How far the runs are; [] if none was ever submitted."""
    if not (latest := {(name, task): number for number, _, name, task in _submitted(folder)}):
        return []
    open_runs = {(a.name, k): a.runs[k - 1] for a in those for k in a.unfinished}
    width = max((len(open_runs[key].name) for key in there if key in open_runs), default=0)
    count = dict.fromkeys(("running", "queued", "ended early"), 0)
    lines, waiting = [], {}
    for key, run in open_runs.items():
        if (job := there.get(key)) and job.state == "running":
            count["running"] += 1
            left = run.seconds_left
            eta = "ETA not known yet" if left is None else f"ETA {duration(left)}"
            lines.append(f"{row(run, width)}, {eta}; job {job.task}")
        elif job:
            count["queued"] += 1
            why = "" if job.reason == "None" else f" ({job.reason})"
            waiting.setdefault(job.state + why, []).append(f"{run.name}, job {job.task}")
        elif key in latest:
            count["ended early"] += 1
            task = f"{latest[key]}_{key[1]}"
            log = folder / "logs" / f"{title}-{key[0]}-{task}.out"
            if log.is_file():  # else it never began, e.g. since what it waited for failed
                why = last_word(log, SPEAKERS).removeprefix("xact: ") or "ended without a word"
                lines.append(f"  {run.name}, job {task}: {why}; {log}")
    lines += [f"  {what}: {listed(runs, '; ')}" for what, runs in waiting.items()]
    total = sum(len(array.runs) for array in those)
    summary = [f"{total - len(open_runs)} of {total} runs finished", *(f"{n} {what}" for what, n in count.items() if n)]
    return [*lines, f"{title}: {', '.join(summary)}"]
