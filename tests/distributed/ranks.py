"""Run a function on several gloo ranks of this machine, with Megatron on the CPU platform, and get its results back.

Ranks are forks of one server per pytest process, which has imported Megatron on the CPU platform (`imported`); the
first call waits for those 8 s. A test module starts its ranks once, in a module-scoped fixture: its rank function runs
every case and returns a table, from which the tests read. A module with a rank function imports Megatron inside that
function, because pytest imports it where the CPU platform is not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

_ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parent),  # where the server finds `imported`
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # the CPU platform refuses to start where it sees a GPU
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time; the message holds the tracebacks."""


def run_ranks(
    function: Callable[..., Any], world: int, *args, timeout: float = 400.0, environment: dict[str, str] | None = None
) -> list[Any]:
    """function(*args) on ranks 0..world-1 of one process group -> their return values, by rank.

    `function` is a module-level one. `environment`: variables that have to be there before anything is imported; such
    ranks are no forks. RankFailed, and no process left behind, if a rank fails or `timeout` s pass.
    """
    with tempfile.TemporaryDirectory() as name, processes(environment) as context:
        folder = Path(name)
        ranks = [context.Process(target=_rank, args=(rank, world, folder, function, args)) for rank in range(world)]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, folder, time.monotonic() + timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
            for process in ranks:
                if process.pid is not None:
                    process.join()
        return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world)]


@contextlib.contextmanager
def processes(environment: dict[str, str] | None = None) -> Iterator[BaseContext]:
    """Starts processes without a GPU: forks of the server, or with an `environment` of their own, new ones."""
    if environment:
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["imported"])
    with mock.patch.dict(os.environ, _ENVIRONMENT | (environment or {})):
        yield context


def _wait(ranks: list, folder: Path, deadline: float) -> None:
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            time.sleep(1.0)  # others may fail by themselves, in their own words
            break
        if time.monotonic() > deadline:
            for process in ranks:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGUSR1)  # every thread's stack goes to the rank's `stacks` file
            time.sleep(1.0)
            raise RankFailed("out of time; the ranks were here:\n" + _told(folder, "stacks"))
        time.sleep(0.05)
    if any(process.exitcode for process in ranks):
        codes = ", ".join(f"rank {rank}: {process.exitcode}" for rank, process in enumerate(ranks))
        raise RankFailed(f"exit codes (None: still ran) {codes}\n" + _told(folder, "error"))


def _told(folder: Path, kind: str) -> str:
    """The ranks' files of this kind, oldest first: the first rank to fail is the cause, the others its consequence."""
    files = sorted(folder.glob(f"{kind}*"), key=lambda file: file.stat().st_mtime)
    return "\n".join(f"--- rank {file.name.removeprefix(kind)}\n{file.read_text()}" for file in files)


def _rank(rank: int, world: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    with open(folder / f"stacks{rank}", "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        try:
            import imported  # noqa: F401

            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
            )
            torch.save(function(*args), folder / f"result{rank}")
            torch.distributed.barrier()  # nobody leaves while another still needs its connections
        except BaseException:
            (folder / f"error{rank}").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)  # at once: tearing gloo down is no part of any test
