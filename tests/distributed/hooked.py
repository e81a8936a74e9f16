"""`xact pretrain` with faults: on each rank, before each step's update, what XACT_TEST_FAULTS says, each thing once.

XACT_TEST_FAULTS="kill:5:1 stop:9:0 scancel:10:0"    what, after how many steps, on which rank
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_xact import cli
from megatron_xact.pretraining import signals


def fault(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "scancel":  # to all tasks of the job, as before the time limit
        subprocess.run(["scancel", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)
        deadline = time.monotonic() + 60.0
        while signals.received() is None and time.monotonic() < deadline:
            time.sleep(0.05)


if __name__ == "__main__":
    from megatron.training import get_args

    from megatron_xact.pretraining.monitor import Monitor

    stock = Monitor.finalize_model_grads

    def hooked(self, *args, **kwargs):
        here = f":{get_args().curr_iteration}:{get_args().rank}"
        for entry in os.environ.get("XACT_TEST_FAULTS", "").split():
            done = Path(get_args().save) / f"{entry}.done"
            if entry.endswith(here) and not done.exists():
                done.touch()
                fault(entry.split(":")[0])
        stock(self, *args, **kwargs)

    Monitor.finalize_model_grads = hooked
    sys.exit(cli.main(sys.argv[1:]))
