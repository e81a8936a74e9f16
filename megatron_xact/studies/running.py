"""Runs of a study on this machine: each as a process of `xact pretrain`, several at a time.

Where a run stands is read from its folder, so that a broken-off study goes on wherever it was. A run that fails is
started again, from its last checkpoint, a bounded number of times; one whose config or data are refused, or whose loss
is NaN, would fail again and is not. Ctrl-C and SIGTERM let the runs save and end, and so does the death of this
command; a run that an earlier one has left behind is waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron_xact.studies import slurm
from megatron_xact.studies.ladder import cells
from megatron_xact.studies.planning import Plan
from megatron_xact.studies.progress import Display
from megatron_xact.studies.state import Run, alone, last_word, run_of

PRETRAIN = (sys.executable, "-m", "megatron_xact", "pretrain")
# Exit codes of pretraining/exits.py.
USER_ERROR, SAVED, NAN, TAKEN = 2, 75, 76, 79
HOPELESS = (USER_ERROR, NAN)
INTERRUPTED = 130
GRACE = 300.0  # seconds that runs have to save and end
ASK_AGAIN = 20.0  # seconds until it is seen whether a run that was left behind has ended
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl


@dataclass
class Task:
    run: Run
    state: str = "waiting"  # running, finished, failed
    after: Task | None = None  # waits for that one, e.g. for the trunk that it leaves
    attempts: int = 0
    code: int | None = None  # exit code of the last attempt
    reason: str = ""
    slot: int = 0  # of `jobs`; decides its GPUs
    held_until: float = 0.0  # time.monotonic(); its folder was taken
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def is_ready(self) -> bool:
        free = self.after is None or self.after.state == "finished"
        return self.state == "waiting" and free and time.monotonic() >= self.held_until

    @property
    def is_held(self) -> bool:
        return self.state == "waiting" and self.held_until > 0


def run(plan: Plan, folder: Path, jobs: int = 1, processes: int | None = None, retries: int = 2,
        pretrain: Sequence[str] = PRETRAIN) -> int:  # fmt: skip
    """`train` for every cell of a planned study."""
    tasks: list[Task] = []
    trunks: dict[str, Task] = {}
    for cell in cells(plan.trunks):  # trunks first
        tasks.append(Task(run_of(cell, folder), after=trunks.get(cell.trunk.name)))
        trunks.setdefault(cell.trunk.name, tasks[-1])
    return train(tasks, folder, jobs, processes, retries, pretrain)


def train(tasks: Sequence[Task], folder: Path, jobs: int = 1, processes: int | None = None, retries: int = 2,
          pretrain: Sequence[str] = PRETRAIN) -> int:  # fmt: skip
    """The exit code: 0 if all runs are finished, 1 if some failed, 130 if interrupted; the tasks tell more.

    processes: of each run; None: what its config needs. pretrain: the command before a run's words.
    """
    with alone(folder):
        if jobs_there := slurm.under_way(folder):
            first = next(iter(jobs_there.values()))
            raise ValueError(f"SLURM has {len(jobs_there)} run(s) of {folder} queued or at work, job {first.task} for "
                             "one: --slurm tells how far they are, and scancel ends them")  # fmt: skip
        return _Runs(tasks, folder, jobs, processes, retries, pretrain).run()


def environment(jobs: int, processes: int) -> dict[str, str]:
    """For a run: the cores that we may use shared out, and this package to be found wherever it lies."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    threads = max(1, len(os.sched_getaffinity(0)) // (jobs * processes))
    return {"OMP_NUM_THREADS": str(threads)} | os.environ | {"PYTHONPATH": path}


def gpus() -> list[str]:
    """Of this machine, as CUDA_VISIBLE_DEVICES names them; [] without any."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name]
    found = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i in range(len(list(found.iterdir())))] if found.is_dir() else []


def gpus_of(slot: int, all_gpus: Sequence[str], jobs: int, processes: int | None) -> list[str]:
    """Those of the run in this slot: an equal share, or as many as it has processes. Runs share them if they must.

    ValueError: one run would need more than there are.
    """
    count = processes or max(1, len(all_gpus) // jobs)
    if count > len(all_gpus):
        raise ValueError(f"--nproc-per-node {count} is more than the {len(all_gpus)} GPUs of this machine")
    return [all_gpus[(slot * count + i) % len(all_gpus)] for i in range(count)]


class _Runs:
    def __init__(self, tasks: Sequence[Task], folder: Path, jobs: int, processes: int | None, retries: int,
                 pretrain: Sequence[str]):  # fmt: skip
        self.tasks, self.jobs, self.retries, self.pretrain = tasks, jobs, retries, list(pretrain)
        self.own = ["--nproc-per-node", str(processes)] if processes else []
        self.environment = environment(jobs, processes or 1)
        self.gpus = [gpus_of(slot, found, jobs, processes) for slot in range(jobs)] if (found := gpus()) else None
        for task in tasks:
            if task.run.is_finished:
                task.state = "finished"
        self.display = Display(folder, self.tasks)
        self.asked: int | None = None  # the signal that ends it
        self.asked_again = False

    def run(self) -> int:
        known = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        self.display.begin()
        try:
            while self.asked is None and self._start_and_poll():
                self.display.show()
                time.sleep(0.2)
            if self.asked is not None:
                self._end()
        finally:
            for task in self.tasks:
                if task.process is not None:  # left only by an error of ours
                    _kill(task.process)
            for number, handler in known.items():
                signal.signal(number, handler)
        self.display.close()
        return self._verdict()

    def _ask(self, number: int, frame: object) -> None:
        self.asked_again = self.asked is not None
        self.asked = number

    def _start_and_poll(self) -> bool:
        """Whether something is left to wait for."""
        for task in self.tasks:
            if task.state == "running":
                self._poll(task)
        for task in self.tasks:
            if task.after is not None and task.after.state == "failed" and task.state == "waiting":
                task.state, task.reason = "failed", f"it follows {task.after.run.name}, which failed"
        for task in filter(lambda t: t.is_ready, self.tasks):
            if self._running() < self.jobs:
                self._start(task)
        return self._running() > 0 or any(t.is_held for t in self.tasks)

    def _running(self) -> int:
        return sum(t.state == "running" for t in self.tasks)

    def _start(self, task: Task) -> None:
        task.attempts += 1
        task.slot = min(set(range(self.jobs)) - {t.slot for t in self.tasks if t.state == "running"})
        mine = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[task.slot])} if self.gpus else {}
        task.run.log.parent.mkdir(exist_ok=True)
        with open(task.run.log, "a", encoding="utf-8") as log:
            task.process = subprocess.Popen(
                [*self.pretrain, *task.run.words, *self.own],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment | mine,
                start_new_session=True,  # Ctrl-C reaches us alone; we let them save
                preexec_fn=_ended_with_us(),
            )  # fmt: skip
        task.state = "running"
        if not task.held_until:
            self.display.say(task, "started" if task.attempts == 1 else f"started again ({task.attempts - 1})")

    def _poll(self, task: Task) -> None:
        assert task.process is not None
        if (code := task.process.poll()) is None:
            return
        task.process, task.code = None, code
        if code == TAKEN and self.asked is None:
            if not task.held_until:
                self.display.say(task, "waiting for a run at work in its folder, which an earlier command left behind")
            task.state, task.attempts, task.held_until = "waiting", task.attempts - 1, time.monotonic() + ASK_AGAIN
            return
        task.held_until = 0.0
        if code == 0 and task.run.is_finished:
            task.state = "finished"
            self.display.say(task, "finished")
            return
        task.reason = _reason(code, task.run.log)
        if self.asked is not None or (code not in HOPELESS and task.attempts <= self.retries):
            task.state = "waiting"
        else:
            task.state = "failed"
        self.display.say(task, task.reason if task.state == "waiting" else f"failed: {task.reason}")

    def _end(self) -> None:
        """Lets what runs save and end; a second signal, or GRACE, kills it."""
        until = time.monotonic() + GRACE
        for task in self.tasks:
            if task.process is not None:
                task.process.send_signal(signal.SIGTERM)
        self.display.note(f"interrupted: {self._running()} run(s) save and end; once more to kill them")
        while self._running():
            for task in self.tasks:
                if task.process is not None and (self.asked_again or time.monotonic() > until):
                    _kill(task.process)
                if task.state == "running":
                    self._poll(task)
            time.sleep(0.1)

    def _verdict(self) -> int:
        failed = [t for t in self.tasks if t.state == "failed"]
        finished = sum(t.state == "finished" for t in self.tasks)
        print(f"{finished} of {len(self.tasks)} runs finished, {len(failed)} failed")
        for task in failed:
            print(f"failed       {task.run.name}: {task.reason}" + (f"; {task.run.log}" if task.attempts else ""))
        if self.asked is not None:
            print("xact: interrupted; the same command goes on", file=sys.stderr)
            return INTERRUPTED
        return 1 if failed else 0


def _ended_with_us() -> partial | None:
    """For a new process to call: SIGTERM to it, which saves, once this one has died, were it by kill -9. On Linux."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl and partial(prctl, _END_WITH_PARENT, signal.SIGTERM)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _reason(code: int, log: Path) -> str:
    """The run's own last word, if it has one."""
    if code == 0:
        return "ended without having reached its last step"
    if code == SAVED:
        return "saved after a signal"
    told = last_word(log)
    what = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{what}: {told.removeprefix('xact: ')}" if told and code > 0 else what
