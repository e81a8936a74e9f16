"""The commands that start the ranks of one attempt: torchrun, or srun with a task per rank or a torchrun per node."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_xact.pretraining import signals

KINDS = ("torchrun", "srun", "srun-torchrun")


@dataclass
class Plan:
    """What a launcher must know of a run."""

    words: list[str]  # the command line of every rank, after `xact pretrain`
    run: str | None  # the run's folder (save)
    nodes: int = 1
    per_node: int = 1  # ranks on each
    signal: str = signals.DEFAULT
    max_restarts: int = 3
    on_failure: str = "restart"
    on_nan: str = "stop"
    program: list[str] = field(default_factory=lambda: ["-m", "megatron_xact", "pretrain"])

    @property
    def folder(self) -> Path | None:
        return Path(self.run) if self.run is not None else None

    @property
    def ranks(self) -> range:
        return range(self.nodes * self.per_node)

    def dump(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Launcher:
    kind: str = "torchrun"  # on this node, with those of other nodes; or, from a batch script, on all nodes: "srun", a
    #                         task per rank; "srun-torchrun", a torchrun per node
    rendezvous: str | None = None  # HOST:PORT where the torchruns of several nodes meet; None: SLURM's first node
    wrap: tuple[str, ...] = ()  # words before Python, e.g. apptainer exec IMAGE
    srun: tuple[str, ...] = ()  # further flags of srun, e.g. --container-image=...
    python: str = sys.executable

    def command(self, plan: Plan, attempt: str) -> tuple[list[str], dict[str, str]]:
        """The command of an attempt, and what it adds to the environment."""
        if self.kind == "torchrun":
            return self._torchrun(plan, attempt, self.rendezvous), {}
        address, port = _meeting_point()
        if self.kind == "srun-torchrun":
            return [*self._srun(plan, 1), *self._torchrun(plan, attempt, f"{address}:{port}")], {}
        words = [*self._srun(plan, plan.per_node), *self.wrap, self.python, *plan.program, *plan.words]
        return words, {"XACT_LAUNCHER": "srun", "MASTER_ADDR": address, "MASTER_PORT": str(port)}

    def _srun(self, plan: Plan, tasks: int) -> list[str]:
        cores = int(os.environ.get("SLURM_CPUS_ON_NODE", "0")) // tasks
        words = ["srun", f"--nodes={plan.nodes}", f"--ntasks={plan.nodes * tasks}", f"--ntasks-per-node={tasks}"]
        words += [f"--cpus-per-task={cores}"] if cores else []  # not inherited from sbatch since SLURM 22.05
        # Without it the other ranks would wait for a dead one, in a collective, until the time limit.
        return [*words, "--kill-on-bad-exit=1", *self.srun]

    def _torchrun(self, plan: Plan, attempt: str, rendezvous: str | None) -> list[str]:
        if plan.nodes > 1:
            # A rendezvous of its own per attempt: agents of an earlier one cannot join by mistake.
            where = ["--nnodes", str(plan.nodes), "--rdzv-backend", "c10d", "--rdzv-id", attempt]
            where += ["--rdzv-endpoint", rendezvous]
        else:
            where = ["--standalone"]
        agent = ["-m", "megatron_xact.pretraining.agent", *where, "--nproc-per-node", str(plan.per_node)]
        agent += ["--max-restarts", "0"]
        return [*self.wrap, self.python, *agent, *plan.program, *plan.words]


def _meeting_point() -> tuple[str, int]:
    """(address, port) of rank 0: this SLURM job's first node, where its batch script runs, and a port free now.

    MASTER_ADDR and MASTER_PORT say otherwise where names do not resolve, or only some ports are open between nodes.
    """
    address = os.environ.get("MASTER_ADDR")
    if not address:
        words = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        address = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[0]
    return address, int(os.environ.get("MASTER_PORT") or free_port())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def adopt_slurm_rank() -> None:
    """In a task that srun started: its place among the ranks, under the names that torch and Megatron look for."""
    if os.environ.get("XACT_LAUNCHER") == "srun" and "RANK" not in os.environ:
        theirs = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
        os.environ.update({ours: os.environ[name] for ours, name in theirs.items()})
        if os.environ.get("CUDA_VISIBLE_DEVICES") and "," not in os.environ["CUDA_VISIBLE_DEVICES"]:
            os.environ["LOCAL_RANK"] = "0"  # Megatron's GPU; this task sees its own alone (sbatch --gpus-per-task)
