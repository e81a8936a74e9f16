"""A private SLURM cluster of two nodes, n1 and n2, on this host: its own daemons, ports, key and folder.

Debian's slurm-wlm runs several slurmd on one host. Nothing outside the folder is written, nothing of an installed
SLURM is used but its programs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[2]
NODES = ("n1", "n2")

CONF = """
ClusterName=xact
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
KillWait=20
JobRequeue=1
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmdParameters=config_overrides
TreeWidth=16
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None: it can."""
    if os.geteuid() != 0:
        return "a private SLURM cluster is started as root"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if find(name) is None]
    return f"not installed: {', '.join(missing)} (Debian: apt install slurm-wlm munge)" if missing else None


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """`start`, `submit`, `wait`, `stop`. Everything it starts has `mark` in its environment."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
            "XACT_TEST": self.mark,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MASTER_ADDR": "127.0.0.1",  # n1 is no name that this host's resolver knows
            "PYTHON": sys.executable,
        }

    def start(self) -> None:
        for name in ("etc", "state", "log", "run"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "run" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        conf = CONF.format(folder=self.folder, host=socket.gethostname(), ports=_free_ports(3))
        (self.folder / "etc" / "slurm.conf").write_text(conf)
        run = self.folder / "run"
        self._call(find("munged"), "--force", f"--key-file={key}", f"--socket={run}/munge.sock",
                   f"--pid-file={run}/munged.pid", f"--log-file={run}/munged.log",
                   f"--seed-file={run}/munged.seed")  # fmt: skip
        self._call(find("slurmctld"))
        for node in NODES:
            self._call(find("slurmd"), "-N", node)
        self.until(lambda: set(self._call("sinfo", "-h", "-o", "%T", check=False).split()) == {"idle"}, 60.0)

    def stop(self) -> None:
        """Everything it has started has ended then, in order or not."""
        for name in ("slurmd.n1", "slurmd.n2", "slurmctld", "munged"):
            with contextlib.suppress(OSError):
                os.kill(int((self.folder / "run" / f"{name}.pid").read_text()), signal.SIGTERM)
        time.sleep(1.0)
        deadline = time.monotonic() + 30.0
        while left := self._ours():
            assert time.monotonic() < deadline, left
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)

    def _ours(self) -> list[int]:
        """Anywhere in the bytes: slurmstepd writes its title over the beginning of its environment."""
        mark, found = f"XACT_TEST={self.mark}\0".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def submit(self, *words: str, **environment: str) -> int:
        """sbatch, from the repository's root; the job's number."""
        said = self._call("sbatch", f"--output={self.folder}/log/%j.out", *words, **environment)
        return int(re.search(r"Submitted batch job (\d+)", said)[1])

    def cancel(self, number: int | str) -> None:
        self._call("scancel", str(number))

    def queue(self) -> str:
        """The jobs, and tasks of arrays, that are queued, at work or just ending."""
        return self._call("squeue", "--noheader", "--array", "--format=%i")

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` tells of a job, or of an array's task, "number_task"."""
        said = self._call("scontrol", "show", "job", str(number))
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait(self, number: int | str, timeout: float) -> dict[str, str]:
        """The job once it has ended; a requeued one does not wait its two minutes."""

        def ended() -> bool:
            job = self.job(number)
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                time.sleep(2.0)  # in the same second, slurmd takes the new life's credential for the old one's
                self._call("scontrol", "update", f"jobid={number}", "StartTime=now", check=False)
            return job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        self.until(ended, timeout, lambda: self.output(number)[-6000:])
        return self.job(number)

    def output(self, number: int | str) -> str:
        file = Path(self.job(number)["StdOut"])
        return file.read_text(errors="replace") if file.exists() else ""

    def _call(self, *words: str, check: bool = True, **environment: str) -> str:
        done = subprocess.run(words, cwd=ROOT, env={**self.environment, **environment}, capture_output=True, text=True)
        assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def until(self, true, timeout: float, told=lambda: "") -> None:
        deadline = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < deadline, f"not after {timeout} s\n{told()}"
            time.sleep(0.3)


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
