"""Why an attempt failed: which rank, on which host, at which step, for what reason; one line and one JSON record.

kind       what happened                                                         what is done about it
killed     a rank ended without a word: kill -9, out of memory, its node lost;   on-failure
           or a worker of its data loader did
hang       no step was completed within hang-timeout                             on-failure
network    a collective failed or NCCL aborted the rank (mostly because another  on-failure
           had failed), or a file system or host could not be reached
device     an error of the GPU or its driver                                     on-failure
node       a node's launcher is not heard of any more                            on-failure
launcher   srun or torchrun ended before any rank began                          stop: it would again
nan        the loss or a gradient is NaN or infinite                             on-nan
replicas   replicated parameters differ between tensor-parallel ranks            stop: they would again
error      any other exception: a bug, or no memory left                         stop: it would come again
"""

from __future__ import annotations

import errno
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_xact.pretraining.files import why_not
from megatron_xact.pretraining.status import Status, crash, crash_path

ON_FAILURE = ("killed", "hang", "network", "device", "node")
FILE = "failures.jsonl"

# By their words: gloo and NCCL raise RuntimeError or its subclasses, the driver torch.AcceleratorError.
_NETWORK = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "NCCL error",
    "ncclRemoteError", "ncclSystemError", "ncclInternalError", "Timed out waiting", "Watchdog caught collective",
    "Gloo connectFullMesh failed", "DistNetworkError", "DistStoreError",
)  # fmt: skip
# What a file system or a host answers that cannot be reached for a while; a user's mistake is answered otherwise.
_UNREACHABLE = (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ESHUTDOWN, errno.ENOTCONN, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
)  # fmt: skip
_DEVICE = ("CUDA error", "CUDA driver error", "cuBLAS error", "CUBLAS_STATUS", "uncorrectable ECC", "AcceleratorError")
_WORKER_GONE = re.compile("DataLoader worker .* (is killed by signal|exited unexpectedly)")  # torch's words


@dataclass(frozen=True)
class Failure:
    kind: str
    rank: int | None  # None: no single rank is to blame
    host: str
    step: int  # completed steps by then; -1: before the first
    reason: str

    def line(self) -> str:
        who = f"rank {self.rank} on {self.host}" if self.rank is not None else self.host
        when = f"after step {self.step}" if self.step >= 0 else "before its first step"
        return f"{who}, {when}: {self.reason}" if who else self.reason


def of_exception(error: BaseException) -> tuple[str, str]:
    """(kind, reason in one line) of what ended a rank."""
    while type(error) is RuntimeError and error.__cause__ is not None and not _WORKER_GONE.match(str(error)):
        error = error.__cause__
    text = str(error).strip()
    if "\nOriginal Traceback" in text:  # torch's, of a data loader's worker: the last line is what the worker said
        reason = text = text.splitlines()[-1]
    else:
        text = " ".join(text.split())
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if type(error).__name__ == "ReplicaMismatch":
        return "replicas", text
    if found := re.search(r"Unexpected result (.*?) \(message='(.*?)'\)", text):  # Megatron's, of losses and gradients
        return "nan", f"{found[2]}: {found[1]}"
    if is_unreachable(error):
        return "network", why_not(error)
    if _WORKER_GONE.match(text):
        return "killed", text.rstrip(".")
    if "out of memory" in text:
        return "error", reason
    if any(words in reason for words in _DEVICE):
        return "device", reason
    if any(words in reason for words in _NETWORK):
        return "network", reason
    return "error", reason


def is_unreachable(error: BaseException) -> bool:
    """Is it a file system's or a host's that could not be reached: nobody's mistake, and gone another time?"""
    return isinstance(error, OSError) and error.errno in _UNREACHABLE


def of_megatrons_exit(code: int) -> tuple[str, str]:
    """(kind, reason) of an exit code that Megatron's loop ends with by itself (core/rerun_state_machine.py)."""
    if code in (16, 17):
        return "nan", "Megatron's rerun machine refused the result of this step; it tells more in the log"
    return "error", f"Megatron's loop ended with exit code {code}"


def add_crashes(folder: Path, statuses: dict[int, Status]) -> None:
    """The last words of ranks that a fatal signal of their own ended."""
    for status in statuses.values():
        if status.kind is None and (what := crash(folder, status.rank)) is not None:
            stacks = f"(stacks in {crash_path(folder, status.rank)})"
            if what == "Aborted":
                reason = "aborted, as NCCL does where the network, a GPU or another rank has failed"
                status.kind, status.reason = "network", f"{reason} {stacks}"
            else:
                status.kind, status.reason = "killed", f"ended by itself: {what} {stacks}"


def root_cause(statuses: dict[int, Status], ranks: range) -> Failure:
    """The first cause among what the ranks said, and did not say, when an attempt has failed.

    A rank that told of an error of its own comes first; then the verdict on a hang; then a rank that ended without a
    word; a broken connection is mostly the consequence of another rank's end.
    """
    if not statuses:
        return Failure("launcher", None, "", -1, "the ranks' launcher ended before any rank began, see what it said")
    told = sorted((s for s in statuses.values() if s.kind not in (None, "done")), key=lambda s: s.time)
    # Ranks go in step, and a rank that is gone has not written its last one.
    step = max((s.step for s in statuses.values()), default=-1)
    for kinds in (("nan", "replicas", "error", "device", "killed"), ("hang",), ("user",)):
        for status in (s for s in told if s.kind in kinds):
            culprit = statuses.get(status.culprit, status)
            return Failure(status.kind, culprit.rank, culprit.host, step, status.reason)
    # The launcher signals ranks that outlive a failure, so one that got no signal failed first.
    silent = sorted((s for s in statuses.values() if s.kind is None), key=lambda s: (s.signal is not None, s.time))
    if silent:
        reason = "ended without a word (kill -9, out of memory, or its node was lost)"
        return Failure("killed", silent[0].rank, silent[0].host, step, reason)
    if told:
        return Failure(told[0].kind, told[0].rank, told[0].host, step, told[0].reason)
    missing = [rank for rank in ranks if rank not in statuses]
    if missing:
        return Failure("killed", missing[0], "an unknown host", step, "ended without a word while it was starting")
    return Failure("launcher", None, "", step, "the ranks' launcher failed after all of them had ended well")


def record(run: Path, failure: Failure, attempt: str, decision: str) -> None:
    """Append the failure, and what was decided, to RUN/failures.jsonl."""
    entry = {"time": time.time(), "attempt": attempt, **asdict(failure), "decision": decision}
    with open(run / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
