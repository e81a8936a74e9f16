"""`xact pretrain` for the price of a fork: one process imports torch and Megatron, each life is a fork of it.

Imports cost 10 s, a life of the tiny model 1 s; so one can be killed twenty times in a test. A life is one rank of the
real command with the real trainer, in a process group of its own, with RANK set as srun would; only pictures, which
take 5 s, are made on demand. `serve` is what the importing process runs; it answers lines of JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Life:
    """One rank under way. Its outputs go to `log` together."""

    pid: int
    log: Path
    server: Warm

    def wait(self, timeout: float = 180.0) -> int:
        """Its exit code, negative for a signal; AssertionError, with all ended, if it takes longer."""
        return self.server.wait(self, timeout)

    def kill(self) -> None:
        """kill -9 of it and of what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Warm:
    def __init__(self, folder: Path):
        """folder: where logs go."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lives = 0
        self._asking = threading.Lock()
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "XACT_TRACEBACK": ""}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, **pipes)
        self._ask(None, 300.0)

    def start(self, *words: str, ranks: int = 1, pictures: bool = False) -> list[Life]:
        """`xact pretrain` with these words, on so many ranks."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        lives = []
        for rank in range(ranks):
            with self._asking:
                log = self.folder / f"life-{self._lives}.log"
                self._lives += 1
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            request = {"words": ["pretrain", *words], "environment": environment, "log": str(log), "pictures": pictures}
            pid = self._ask(request)
            lives.append(Life(pid, log, self))
        return lives

    def run(self, *words: str, ranks: int = 1, code: int = 0, timeout: float = 180.0, pictures: bool = False) -> str:
        """`start`, waited for; what the ranks printed, the first's first. AssertionError: it exits not with `code`."""
        lives = self.start(*words, ranks=ranks, pictures=pictures)
        codes = [life.wait(timeout) for life in lives]
        assert codes[0] == code, f"exit codes {codes}\n" + "\n".join(life.output[-6000:] for life in lives)
        return "".join(life.output for life in lives)

    def wait(self, life: Life, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self._ask({"poll": life.pid})) is None:
            if time.monotonic() > deadline:
                life.kill()
                raise AssertionError(f"no end after {timeout} s\n{life.output[-6000:]}")
            time.sleep(0.01)
        life.kill()  # what it may have left behind
        return code

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ask(self, request: dict | None, timeout: float = 30.0):
        with self._asking:
            if request is not None:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], timeout)
            assert ready, "the warm process does not answer"
            return json.loads(self._process.stdout.readline())


@functools.cache
def warm(folder: Path) -> Warm:
    """The session's own; `folder`: the session's temporary folder, the same for every module."""
    server = Warm(folder / "lives")
    atexit.register(server.close)
    return server


def serve() -> None:
    """Answers each line of stdin by one of stdout: a life's pid, or its exit code (null while it lives)."""
    from megatron_xact.pretraining import cpu_platform

    cpu_platform.activate()
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.auto.tokenization_auto  # noqa: F401

    from megatron_xact import cli
    from megatron_xact.pretraining import arguments, gpt, monitor, plot, report, run, sample  # noqa: F401
    from megatron_xact.pretraining.checkpointing import keeper  # noqa: F401

    arguments.parser()
    gc.freeze()  # lives need not search it for garbage
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("null", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _live(cli, plot, **request)
        print(json.dumps(answer), file=answers, flush=True)


def _live(cli, plot, words: list[str], environment: dict[str, str], log: str, pictures: bool) -> None:
    code = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for fd in (1, 2):
            os.dup2(out, fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= environment
        # Megatron collects what was written through a process, which it would start at the first save, by an import.
        from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

        get_write_results_queue("fork")
        if not pictures:
            plot.draw = lambda *_: []
        code = cli.main(words)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
