"""How a run can end: the exit codes of `xact pretrain`, of every rank of it, and of the launchers.

A launcher does not ask srun or torchrun what happened: torchrun exits with 1 after any signal, srun with the code of
one task. Whether a run is to go on is told by `RUN/requeue`, which rank 0 writes after a complete save. After a signal
a rank that has a launcher therefore ends with 0; its supervisor, and a rank alone, with 75.
"""

from __future__ import annotations

FINISHED = 0  # trained to the end, or as far as asked (exit-interval, exit-duration-in-mins)
FAILED = 1  # an error in the program, or a failure that restarts did not cure
USER_ERROR = 2  # told in one line; nothing was started, and a restart would not help
PREEMPTED = 75  # a signal ended the run in order; the same command goes on (EX_TEMPFAIL of sysexits.h)
NAN = 76  # the loss or a gradient is NaN or infinite
HANG = 77  # no step was completed within hang-timeout
REPLICAS = 78  # replicated parameters differ between tensor-parallel ranks
TAKEN = 79  # a run is at work in the folder: nothing was started; once that has ended, the same command goes on
INTERRUPTED = 130  # Ctrl-C

OF_KIND = {"nan": NAN, "hang": HANG, "replicas": REPLICAS, "user": USER_ERROR}


def of_kind(kind: str) -> int:
    """The exit code for a failure of this kind (see failures.py)."""
    return OF_KIND.get(kind, FAILED)
