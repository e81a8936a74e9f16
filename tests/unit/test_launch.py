"""What a launcher decides: who failed first, what is started again and how often, the commands, the scripts' words."""

from __future__ import annotations

import errno
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import DistNetworkError, DistStoreError

from megatron_xact.pretraining import exits, failures, signals, status, supervisor
from megatron_xact.pretraining.launchers import Launcher, Plan, adopt_slurm_rank
from megatron_xact.pretraining.nodes import Nodes
from megatron_xact.pretraining.status import FLAG, Status
from megatron_xact.pretraining.supervisor import Restarts, Supervisor
from megatron_xact.pretraining.watchdog import PATIENCE, Watchdog, position, verdict

ROOT = Path(__file__).parents[2]
TRACKER = "latest_checkpointed_iteration.txt"


def ranks(*changes: dict) -> dict[int, Status]:
    """Statuses of as many ranks, two per host, at step 7, each with its changes."""
    made = {}
    for rank, change in enumerate(changes):
        made[rank] = replace(Status("a", rank, f"n{1 + rank // 2}", 100 + rank, 5, 7, 1000.0), **change)
    return made


# Signals


def test_a_signal_is_held_back_and_acted_upon_later_and_all_is_given_back(monkeypatch):
    monkeypatch.delenv("XACT_SIGNAL", raising=False)
    both = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in both], signal.pthread_sigmask(signal.SIG_BLOCK, ())
    acted, here = [], threading.get_ident()  # not the process: other threads of a test run hold nothing back
    with signals.remembering():
        assert signals.received() is None
        signal.pthread_kill(here, signal.SIGTERM)
        signal.pthread_kill(here, signal.SIGUSR1)
        assert signals.received() == "SIGUSR1"
        signals.when_received(lambda: acted.append("at once"))
        assert acted == ["at once"]
        signals.heed()
        signal.pthread_kill(here, signal.SIGTERM)
        assert acted == ["at once"] * 4 and signals.received() == "SIGUSR1"
    assert signals.received() is None
    assert ([signal.getsignal(number) for number in both], signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before


def test_the_signal_is_the_launchers_choice(monkeypatch):
    monkeypatch.setenv("XACT_SIGNAL", "SIGUSR2")
    with signals.remembering():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert signals.received() == "SIGUSR2"


FAMILY = """
import multiprocessing, os, signal, time
from megatron_xact.pretraining import signals

if __name__ == "__main__":
    signals.hold_in_rank("SIGUSR1")
    for number in signals.handled():
        signal.signal(number, signal.SIG_DFL)
    contexts = [multiprocessing.get_context(way) for way in ("spawn", "forkserver", "fork")]
    queues = [context.Manager().Queue() for context in contexts]
    workers = [context.Process(target=time.sleep, args=(600,), daemon=True) for context in contexts]
    for worker in workers:
        worker.start()
    for number in signals.handled():
        os.killpg(0, number)
    time.sleep(1.0)
    for queue in queues:
        queue.put("alive")
    print(signals.received(), [worker.is_alive() for worker in workers], [queue.get() for queue in queues])
    raise KeyError("with workers left")
"""


def test_processes_that_a_rank_starts_outlive_its_signals_but_not_the_rank(tmp_path):
    """Signals to all of them, as torchrun and SLURM send them; multiprocessing itself would then wait for 600 s."""
    program = tmp_path / "family.py"
    program.write_text(FAMILY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(program)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.stdout.strip() == "SIGUSR1 [True, True, True] ['alive', 'alive', 'alive']", done.stderr[-3000:]
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'with workers left'\n"), done.stderr[-3000:]


def test_the_supervisor_and_a_rank_before_its_config_import_nothing_heavy():
    code = "import megatron_xact.pretraining.supervisor, megatron_xact.pretraining.command, sys; "
    code += "print([name for name in ('torch', 'megatron', 'numpy', 'psutil') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SIX_OF_64_CORES = """
import os, sys
from megatron_xact import cli
from megatron_xact.pretraining import supervisor

os.cpu_count = lambda: 64
os.sched_getaffinity = lambda process: range(6)
supervisor.replace_this_process = lambda *_: sys.exit(os.environ["OMP_NUM_THREADS"])
cli.main(["pretrain", *sys.argv[1:]])
"""


def test_ranks_share_the_cores_that_are_theirs_to_use(tmp_path):
    """A container's or a job's cpuset, not all of the machine: threads on cores of others wait for one another."""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "RANK")}
    words = ["configs/quickstart.toml", "--mock-data", "--tokenizer-model", str(tmp_path), "--nproc-per-node", "2"]
    program = [sys.executable, "-c", SIX_OF_64_CORES, *words]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1:] == ["3"], done.stderr[-3000:]


# Who failed


@pytest.mark.parametrize(
    "error, kind, reason",
    [
        (RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:9366."), "network", "closed by peer"),
        (RuntimeError("NCCL error in: x.cpp:77, remote process exited"), "network", "NCCL error"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "device", "illegal memory access"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "error", "out of memory"),
        (
            RuntimeError("Rank 3, node n, device 1, iteration 9: Unexpected result nan (message='found NaN in x')"),
            "nan",
            "found NaN in x: nan",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "killed", "(pid 7) is killed"),
        (KeyError("a"), "error", "KeyError: 'a'"),
        (DistNetworkError("The client socket has timed out after 2000ms"), "network", "socket has timed out"),
        (DistStoreError("Timed out after 3 seconds waiting for clients"), "network", "waiting for clients"),
        (OSError(errno.ESTALE, "Stale file handle", "/runs/a"), "network", "/runs/a: Stale file handle"),
        (OSError(errno.ENOENT, "No such file", "/runs/a"), "error", "/runs/a"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_an_exception_means(error, kind, reason):
    found = failures.of_exception(error)
    assert found[0] == kind and reason in found[1] and "\n" not in found[1]


def test_an_exception_that_only_carries_another_is_the_other():
    outer = RuntimeError("training stopped by an unexpected error")
    outer.__cause__ = ValueError("bad\nfile")
    assert failures.of_exception(outer) == ("error", "ValueError: bad file")


def test_a_data_loaders_worker_that_is_gone_was_killed_whatever_torch_noticed_it_by():
    gone = RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")
    gone.__cause__ = queue.Empty()
    assert failures.of_exception(gone) == ("killed", str(gone))


def test_what_a_data_loaders_worker_raised_is_its_last_line():
    from torch._utils import ExceptionWrapper

    try:
        int("seven")
    except ValueError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")  # what torch's workers send
    with pytest.raises(ValueError, match="Original Traceback") as raised:
        wrapped.reraise()
    said = "ValueError: invalid literal for int() with base 10: 'seven'"
    assert failures.of_exception(raised.value) == ("error", said)


@pytest.mark.parametrize(
    "error, kind, reason",
    [
        (SystemExit(exits.FAILED), "error", "it ended with exit code 1"),
        (SystemExit(exits.USER_ERROR), "user", "it ended with exit code 2"),
        (ValueError("no such flag"), "user", "no such flag"),
        (OSError(errno.EIO, "Input/output error", "/runs/a"), "network", "/runs/a: Input/output error"),
        (ZeroDivisionError(), "error", "ZeroDivisionError"),
        (KeyboardInterrupt(), "interrupted", ""),
    ],
    ids=repr,
)
def test_a_ranks_last_word_is_what_ended_it(tmp_path, error, kind, reason):
    with pytest.raises(type(error)), Watchdog(tmp_path, 3, 4, 0.0, sys.stderr):
        raise error
    last = status.of_file(status.path(status.folder_of(tmp_path), 3))
    assert (last.kind, last.reason) == (kind, reason)


def test_a_last_word_for_which_there_is_no_room_is_printed_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=full))  # with --quiet, a file on that disk
    monkeypatch.setenv("XACT_ATTEMPT", "a")
    with Watchdog(tmp_path, 3, 4, 0.0, sys.stdout) as watchdog:
        watchdog.end("error", "no room for the next checkpoint")
    assert capsys.readouterr().out == "xact: error: rank 3: no room for the next checkpoint\n"
    assert not list(status.folder_of(tmp_path).iterdir())


def test_a_log_for_which_there_is_no_room_hides_nothing(tmp_path):
    """With --quiet: what libraries have printed is written when the log is closed at the latest."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.log").symlink_to("/dev/full")
    program = """if True:
        import sys
        from types import SimpleNamespace
        from megatron_xact.pretraining.run import _output
        with _output(SimpleNamespace(megatron={"save": sys.argv[1]}), quiet=True) as terminal:
            print("a step")
            print("xact: error: no room for the next checkpoint", file=terminal)
        with _output(SimpleNamespace(megatron={"save": sys.argv[1]}), quiet=True):
            print("a step")
            raise RuntimeError("training stopped by an unexpected error")
    """
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    environment.pop("XACT_ATTEMPT", None)
    words = [sys.executable, "-c", program, str(tmp_path)]
    told = subprocess.run(words, env=environment, capture_output=True, text=True).stderr
    lines = "xact: error: no room for the next checkpoint\nxact: rank 0 stopped; its output is in "
    assert told.startswith(lines), told
    assert told.endswith("RuntimeError: training stopped by an unexpected error\n"), told


DONE = {"kind": "done"}
BROKEN = {"kind": "network", "reason": "Connection closed by peer", "time": 1003.0}


@pytest.mark.parametrize(
    "statuses, rank, kind",
    [
        (ranks(BROKEN, BROKEN, {}, BROKEN), 2, "killed"),
        # The launcher ended rank 0 by force, because rank 3 had been killed before.
        (ranks({"signal": "SIGTERM", "time": 990.0}, BROKEN, BROKEN, {}), 3, "killed"),
        (ranks({"time": 1020.0}, BROKEN, BROKEN, {"time": 1001.0}), 3, "killed"),
        (ranks({}, {"kind": "error", "reason": "KeyError", "time": 1004.0}, BROKEN, {}), 1, "error"),
        (ranks({"kind": "hang", "culprit": 2}, {}, {}, {}), 2, "hang"),
        (ranks({}, BROKEN, {"kind": "killed", "reason": "its data loader", "time": 1002.0}, BROKEN), 2, "killed"),
        (ranks(BROKEN, BROKEN, BROKEN, {"kind": "device", "time": 1005.0}), 3, "device"),
        (ranks({"kind": "nan", "time": 2.0}, {"kind": "nan", "time": 1.0}, DONE, DONE), 1, "nan"),
        (ranks(BROKEN, {**BROKEN, "time": 1001.0}, BROKEN, BROKEN), 1, "network"),
        (ranks(DONE, DONE, DONE), 3, "killed"),
        ({}, None, "launcher"),
    ],
)
def test_the_first_cause_is_found(statuses, rank, kind):
    failure = failures.root_cause(statuses, range(4))
    assert (failure.rank, failure.kind) == (rank, kind)
    if rank in statuses:
        assert f"rank {rank} on n{1 + rank // 2}, after step 7: " in failure.line()


WAITING = {"where": "all_reduce (distributed_c10d.py, line 1)", "waiting": True, "beat": 9}
ASLEEP = {"where": "read (files.py, line 5)", "waiting": False, "beat": 9}


@pytest.mark.parametrize(
    "now, culprit, words",
    [
        (ranks(WAITING, WAITING, {**WAITING, "beat": 5}, WAITING), 2, "not heard of any more"),
        (ranks(WAITING, WAITING, WAITING, ASLEEP), 3, "read (files.py, line 5), and others wait"),
        (ranks(WAITING, {**WAITING, "step": 6}, WAITING, WAITING), 1, "no rank stands out"),
        (ranks(WAITING, WAITING, WAITING), 3, "never began"),
    ],
)
def test_the_rank_that_holds_up_the_others_is_found(now, culprit, words):
    rank, said = verdict(ranks({}, {}, {}, {}), now, range(4))
    assert rank == culprit and words in said


def test_the_position_is_of_the_innermost_call_and_knows_a_collective():
    here, waiting = position(sys._getframe())
    assert here.startswith("test_the_position") and "test_launch.py" in here and not waiting
    code = compile("import sys\ndef reduce(): return sys._getframe()\n", "/x/torch/distributed/c.py", "exec")
    exec(code, names := {})
    assert position(names["reduce"]()) == ("reduce (distributed/c.py, line 2)", True)


def test_what_is_slow_by_nature_may_take_longer():
    watchdog = Watchdog(None, 0, 1, 10.0, sys.stderr)

    def save_checkpoint() -> float:
        return watchdog._allowed()

    assert watchdog._allowed() == 10.0 * PATIENCE > 10.0  # the first step
    watchdog.progress(step=1)
    assert watchdog._allowed() == 10.0
    assert save_checkpoint() == 10.0 * PATIENCE


HUNG = """
import sys, time
from pathlib import Path
from megatron_xact.pretraining.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 0, 1, 0.5, sys.stderr) as watchdog:
    watchdog.progress(step=1)
    time.sleep(30)
"""


def test_a_hang_ends_also_where_its_stacks_cannot_be_written(tmp_path):
    (tmp_path / "logs" / "stacks-rank0.txt").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "XACT_ATTEMPT"}
    done = subprocess.run(
        [sys.executable, "-c", HUNG, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == exits.HANG and "rank 0, no progress for" in done.stderr


# What is done about it


@pytest.fixture
def supervised(tmp_path):
    """(plan, the supervisor's decision after ranks said this)."""
    plan = Plan([], str(tmp_path), per_node=4, max_restarts=2)

    def decide(statuses: dict[int, Status], returned: int = 1) -> int | None:
        for entry in statuses.values():
            entry.write(status.folder_of(tmp_path))
        return supervisor._decide("a", returned)

    status.folder_of(tmp_path).mkdir(parents=True)
    supervisor = Supervisor(plan, Launcher(), Nodes(tmp_path, 0, 1))
    return plan, decide


def test_restarts_are_bounded_between_checkpoints(supervised, capsys):
    plan, decide = supervised
    killed = ranks(BROKEN, {}, BROKEN, BROKEN)
    assert [decide(killed) for _ in range(3)] == [None, None, exits.FAILED]
    (plan.folder / TRACKER).write_text("4")
    assert decide(killed) is None
    told = capsys.readouterr().err.splitlines()
    assert "restart 2 of 2 from the beginning" in told[1] and "restart 1 of 2 from step 4" in told[3]
    assert "given up at step 0 after 2 restarts without a new checkpoint (max-restarts = 2)" in told[2]
    recorded = [json.loads(line) for line in (plan.folder / "failures.jsonl").read_text().splitlines()]
    assert [record["rank"] for record in recorded] == [1] * 4 and recorded[2]["decision"].startswith("given up")


@pytest.mark.parametrize(
    "how, setting, code",
    [
        ({"kind": "nan"}, {}, exits.NAN),
        ({"kind": "nan"}, {"on_nan": "restart"}, None),
        ({}, {"on_failure": "stop"}, exits.FAILED),
        ({"kind": "hang"}, {}, None),
        ({"kind": "hang"}, {"on_failure": "stop"}, exits.HANG),
        ({"kind": "hang"}, {"max_restarts": 0}, exits.HANG),
        ({"kind": "replicas"}, {}, exits.REPLICAS),
        ({"kind": "error"}, {}, exits.FAILED),
        ({"kind": "user"}, {}, exits.USER_ERROR),
        ({"kind": "nan", "signal": "SIGUSR1"}, {}, exits.NAN),  # it would come again after a requeue
        ({"kind": "replicas", "signal": "SIGUSR1"}, {}, exits.REPLICAS),
    ],
)
def test_what_follows_a_failure(tmp_path, how, setting, code):
    """The other rank gets a SIGTERM, which is torchrun's or srun's, not the scheduler's."""
    plan = replace(Plan([], str(tmp_path), per_node=2), **setting)
    folder = status.folder_of(tmp_path)
    folder.mkdir(parents=True)
    for entry in ranks(how, {**BROKEN, "signal": "SIGTERM"}).values():
        entry.write(folder)
    assert Supervisor(plan, Launcher(), Nodes(tmp_path, 0, 1))._decide("a", 1) == code


@pytest.mark.parametrize("first, told", [({"kind": "user", "reason": "no such file"}, ""), ({}, "rank 2 on n2, ")])
def test_what_only_other_ranks_lack_is_told_by_the_launcher(supervised, capsys, first, told):
    """Rank 0 tells its own errors itself."""
    _, decide = supervised
    assert decide(ranks(first, {}, {"kind": "user", "reason": "no such file"}, {})) == exits.USER_ERROR
    err = capsys.readouterr().err
    assert told in err and (err == "") == (told == "") and err.count("no such file") == bool(told)


ORPHAN = """
import time
from pathlib import Path
from megatron_xact.pretraining import signals

signals.hold_in_rank("SIGUSR1")
Path("began").write_text("now")
until = time.monotonic() + 20.0
while not signals.received() and time.monotonic() < until:
    time.sleep(0.05)
Path("got").write_text(str(signals.received()))
"""


def test_ranks_end_with_all_launchers_above_them(tmp_path):
    """torchrun's agent passes on what the death of the one above it makes; here both are gone."""

    def text_of(file: str) -> str:
        deadline = time.monotonic() + 100.0
        while not ((tmp_path / file).exists() and (text := (tmp_path / file).read_text())):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return text

    (tmp_path / "rank.py").write_text(ORPHAN)
    words = [sys.executable, "-m", "megatron_xact.pretraining.agent", "--standalone", "rank.py"]
    agent = subprocess.Popen(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert text_of("began")
    agent.kill()
    agent.wait()
    assert text_of("got") == "SIGTERM"


# What rank 1 does; rank 0 ends well.
ENDINGS = {
    "it has told why": ("sys.exit(78)", exits.REPLICAS, ""),
    "killed": ("os.kill(os.getpid(), 9)", exits.FAILED, "xact: error: a rank was ended by SIGKILL; with save"),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_without_a_folder_the_ranks_exit_code_must_do(how, tmp_path, capsys, monkeypatch):
    does, code, told = ENDINGS[how]
    script = tmp_path / "rank.py"
    script.write_text(f"import os, sys\nif os.environ['RANK'] == '1': {does}\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    supervisor = Supervisor(Plan([], None, per_node=2, program=[str(script)]), Launcher(), Nodes(None, 0, 1))
    with signals.remembering():
        assert supervisor.run() == code
    err = capsys.readouterr().err
    assert err.startswith(told) and err.count("\n") == bool(told)
    assert supervisor._decide("a", returned=1) == exits.FAILED
    assert capsys.readouterr().err.startswith("xact: error: a rank failed, see what it said; with save in [checkpoint]")


def test_a_run_folder_that_cannot_be_made_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["supervisor", Plan([], str(tmp_path / "file" / "run"), nodes=2).dump()])
    with signals.remembering():
        assert supervisor.main() == exits.FAILED
    told = capsys.readouterr().err
    assert told.startswith("xact: error: ") and str(tmp_path / "file") in told and told.count("\n") == 1


class Sleeping(Launcher):
    """Starts a process that ends by a signal, or after half a minute."""

    def command(self, plan: Plan, attempt: str) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-c", "import time; time.sleep(30)"], {}


def test_a_signal_that_came_before_the_ranks_were_started_ends_them_too():
    with signals.remembering():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        signals.heed()
        assert Supervisor(Plan([], None), Sleeping(), Nodes(None, 0, 1))._attempt("a") == -signal.SIGTERM


COUNTING = """
import signal, sys, time
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
print("ready", flush=True)
while not signals:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(100 + len(signals))
"""


def test_a_signal_is_passed_on_once():
    supervisor = Supervisor(Plan([], None), Launcher(), Nodes(None, 0, 1))
    supervisor._child = subprocess.Popen([sys.executable, "-c", COUNTING], stdout=subprocess.PIPE)
    with signals.remembering(), supervisor._child as child:
        child.stdout.readline()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.pthread_kill(threading.get_ident(), number)
            supervisor._pass_on()
            time.sleep(0.1)
    assert child.returncode == 101


def test_torchruns_exit_code_does_not_matter_where_all_ranks_ended_well(supervised):
    _, decide = supervised
    assert decide(ranks(DONE, DONE, DONE), returned=1) is None  # the fourth never began
    assert decide(ranks(DONE, DONE, DONE, DONE), returned=1) == exits.FINISHED


def test_a_rank_that_is_killed_before_any_could_say_a_word_is_started_again(supervised, capsys):
    """Imports take 15 s and more."""
    _, decide = supervised
    assert decide({}, returned=128 + signal.SIGKILL) is None
    told = capsys.readouterr().err
    assert "a rank was ended by SIGKILL (or out of memory) while it was starting; restart 1 of 2" in told
    assert decide({}, returned=1) == exits.FAILED
    assert "the ranks' launcher ended before any rank began" in capsys.readouterr().err


def test_a_failure_is_told_also_where_it_cannot_be_recorded(supervised, monkeypatch, capsys):
    _, decide = supervised
    assert decide(ranks(BROKEN, {}, BROKEN, BROKEN)) is None

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(status, "write_json", full)
    monkeypatch.setattr(failures, "record", full)
    assert [decide({}) for _ in range(2)] == [None, exits.FAILED]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all("rank 1 on n1, after step 7: ended without a word" in line for line in told)


def test_ctrl_c_that_came_to_the_ranks_alone_is_not_taken_for_the_end_of_the_run(supervised, capsys):
    plan, decide = supervised
    (plan.folder / TRACKER).write_text("4")
    interrupted = {"kind": "interrupted"}
    assert decide(ranks(*[interrupted] * 4), returned=130) == exits.INTERRUPTED
    assert decide(ranks(BROKEN, interrupted, BROKEN, {})) == exits.INTERRUPTED
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all("interrupted without saving: the same command goes on from step 4" in t for t in told)


def test_a_preempted_run_goes_on_while_it_makes_progress(tmp_path, monkeypatch):
    def life(step: int, life: int) -> int | None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(life))
        supervisor = Supervisor(Plan([], str(tmp_path), max_restarts=2), Launcher(), Nodes(tmp_path, 0, 1))
        assert not (tmp_path / FLAG).exists()  # the last life's
        (tmp_path / TRACKER).write_text(str(step))
        (tmp_path / FLAG).write_text(json.dumps({"signal": "SIGUSR1", "step": step}))
        return supervisor._decide("a", 1)

    codes = [life(step, n) for n, step in enumerate([5, 9, 9, 9, 9])]
    assert codes == [exits.PREEMPTED] * 4 + [exits.FAILED]
    assert not (tmp_path / FLAG).exists()  # which a batch script may look for
    assert life(9, 0) == exits.PREEMPTED  # a person starts it again


@pytest.mark.parametrize(
    "error, saved, told",
    [
        (True, 4, "error: SIGUSR1 came, and rank 1 on n1, after step 7: KeyError; the same command goes on"),
        (False, 4, "nothing saved since step 4 after SIGUSR1"),
        (False, 8, "saved at step 8 after SIGUSR1"),
    ],
)
def test_what_is_told_after_a_signal_is_what_is_saved(supervised, capsys, error, saved, told):
    plan, decide = supervised
    (plan.folder / TRACKER).write_text(str(saved))
    ended = {"kind": "error", "reason": "KeyError", "signal": "SIGUSR1"} if error else DONE
    if not error:
        (plan.folder / FLAG).write_text(json.dumps({"signal": "SIGUSR1", "step": saved}))
    assert decide(ranks(DONE, ended, DONE, DONE)) == exits.PREEMPTED
    assert capsys.readouterr().err.startswith(f"xact: {told}")
    assert json.loads((plan.folder / FLAG).read_text()) == {"signal": "SIGUSR1", "step": saved}
    assert (plan.folder / "failures.jsonl").exists() == error


def test_a_failure_after_every_signal_is_not_requeued_for_ever(supervised):
    plan, decide = supervised
    failed = ranks({"kind": "error", "reason": "KeyError", "signal": "SIGUSR1"}, DONE, DONE, DONE)
    assert [decide(failed) for _ in range(3)] == [exits.PREEMPTED] * 2 + [exits.FAILED]
    assert not (plan.folder / FLAG).exists()


def test_restarts_are_counted_over_the_lives_of_a_job(tmp_path):
    assert Restarts(tmp_path, 2, goes_on=False).again(after_failure=True)
    assert Restarts(tmp_path, 2, goes_on=True).again(after_failure=True)
    assert not Restarts(tmp_path, 2, goes_on=True).again(after_failure=True)
    assert Restarts(tmp_path, 2, goes_on=False).again(after_failure=True)


def test_nodes_follow_the_first_one_and_notice_when_it_is_gone(tmp_path):
    first, second = (Nodes(tmp_path, rank, 2, lost=3.0) for rank in (0, 1))
    first.say(attempt="old", state="running")  # left behind by an earlier launcher
    assert second.hear(0) == {}
    beating = threading.Event()

    def beat() -> None:
        while not beating.wait(0.2):
            first.beat()

    thread = threading.Thread(target=beat)
    first.say(attempt="x", state="running", code=None)
    thread.start()
    assert second.next_attempt("") == ("x", None)
    assert second.over_elsewhere("x", 0.0) is None
    second.say(attempt="x", code=1)
    first.hear(1)
    second.say(attempt="x", code=1)
    assert "node 1" in first.over_elsewhere("x", 0.0)
    first.say(state="stop", code=75)
    assert second.over_elsewhere("x", 0.0) == "node 0 ended the attempt"
    assert second.next_attempt("x") == ("", 75)
    beating.set()
    thread.join()
    with pytest.raises(OSError, match="node 0 is not heard of any more"):
        second.next_attempt("y")


def test_a_node_that_is_started_later_is_not_lost_and_one_that_never_is_ends_the_run(tmp_path, capsys):
    """By hand, on one machine after the other."""
    nodes = Nodes(tmp_path, 0, 2, lost=0.2)
    now = time.monotonic()
    assert nodes.over_elsewhere("a", now - 1.0) is None
    supervisor = Supervisor(Plan([], str(tmp_path), nodes=2), Sleeping(), nodes)
    with signals.remembering():
        signals.heed()
        assert supervisor.run() == exits.FAILED
    (failure,) = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert failure["kind"] == "launcher" and failure["decision"] == "stopped: it would come again"
    assert capsys.readouterr().err.startswith("xact: error: node 1 has not begun: the same command is to be started on")
    second = Nodes(tmp_path, 1, 2)
    for _ in range(2):
        second.say(attempt="a")
        assert nodes.over_elsewhere("a", time.monotonic()) is None
    assert nodes.has_begun(1)
    time.sleep(0.3)
    assert nodes.over_elsewhere("a", time.monotonic() - 1.0) == "node 1 is not heard of any more"


# Commands and scripts


def test_after_a_signal_ranks_get_time_for_a_checkpoint(monkeypatch):
    """By torch's own agent and context of processes, whose 30 s are too few; after a rank's failure they are enough."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import PContext

    from megatron_xact.pretraining import agent

    class Ranks(PContext):
        def __init__(self):
            self.told, self._tail_logs = [], []
            self.filtered_stdout = self.filtered_stderr = self._stdout_tail = self._stderr_tail = None

        def _close(self, death_sig, timeout=30):
            self.told.append((death_sig, timeout))

        _start = _poll = pids = None  # abstract

    torchrun = SimpleNamespace(_pcontext=Ranks(), _worker_watchdog=None, _health_check_server=None)
    LocalElasticAgent._shutdown(torchrun, signal.SIGTERM)
    monkeypatch.setattr(PContext, "close", PContext.close)  # put back afterwards
    agent._give_time_to_save()
    LocalElasticAgent._shutdown(torchrun, signal.SIGUSR1)
    assert torchrun._pcontext.told == [(signal.SIGTERM, 30), (signal.SIGUSR1, agent.SAVING)]
    assert agent.SAVING >= 300


def test_the_commands(monkeypatch):
    plan = Plan(["c.toml", "--quiet"], "/runs/a", per_node=8)
    rank = ["-m", "megatron_xact", "pretrain", "c.toml", "--quiet"]
    words, added = Launcher(python="py").command(plan, "a1")
    assert words[:3] == ["py", "-m", "megatron_xact.pretraining.agent"] and words[-5:] == rank and added == {}
    assert "--standalone" in words and words[words.index("--nproc-per-node") + 1] == "8"
    assert words[words.index("--max-restarts") + 1] == "0"  # restarts are the supervisor's to count and to tell
    plan.nodes = 4
    words, _ = Launcher(rendezvous="h:1", python="py").command(plan, "a1")
    assert words[3:11] == ["--nnodes", "4", "--rdzv-backend", "c10d", "--rdzv-id", "a1", "--rdzv-endpoint", "h:1"]

    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "96")
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    launcher = Launcher("srun", wrap=("apptainer", "exec", "i.sif"), srun=("--container-image=x",), python="py")
    words, added = launcher.command(plan, "a1")
    flags = ["--nodes=4", "--ntasks=32", "--ntasks-per-node=8", "--cpus-per-task=12", "--kill-on-bad-exit=1"]
    assert words == ["srun", *flags, "--container-image=x", "apptainer", "exec", "i.sif", "py", *rank]
    assert added["MASTER_ADDR"] == "n1" and 1024 <= int(added["MASTER_PORT"]) < 65536
    words, _ = replace(launcher, kind="srun-torchrun").command(plan, "a1")
    assert words[:4] == ["srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1"]
    assert "apptainer exec i.sif py -m megatron_xact.pretraining.agent --nnodes 4" in " ".join(words)


@pytest.mark.parametrize(
    ("seen", "gpu"), [(None, "1"), ("", "1"), ("0,1,2,3", "1"), ("0", "0"), ("GPU-8f2a", "0")], ids=str
)
def test_a_task_of_srun_takes_its_place_from_slurm(monkeypatch, seen, gpu):
    """And its GPU by number among those that it sees, of which SLURM may leave it one (--gpus-per-task)."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen or "")
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    theirs = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "XACT_LAUNCHER": "srun"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    adopt_slurm_rank()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["5", gpu, "8"]


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"CPUS": "1", "GPUS": "8"}, "8 ranks per node need a CPU each, and this job has 1 there: add --exclusive or "),
        ({"CPUS": "96", "GPUS": "4"}, "8 ranks per node need a GPU each, and this job has 4 there: lower --nproc-per-"),
        ({"CPUS": "8", "GPUS": "8"}, "no /nowhere/python"),  # goes on
        ({"CPUS": "8"}, "no /nowhere/python"),
    ],
    ids=str,
)
def test_a_job_has_a_cpu_and_a_gpu_for_every_rank(there, told):
    """`sbatch --gpus-per-node 8` alone may give one CPU, where srun says "More processors requested than permitted"."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment |= {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": "/nowhere/python"}
    environment |= {f"SLURM_{what}_ON_NODE": number for what, number in there.items()}
    words = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "--nproc-per-node", "8", "a.toml"]
    refused = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith(f"slurm.sbatch: error: {told}"), refused.stderr
    assert refused.stderr.count("\n") == 1
    words[3], environment["SLURM_NTASKS_PER_NODE"] = "1", "1"
    idle = int(there.get("GPUS", "1")) - 1
    said = subprocess.run(words, env=environment, capture_output=True, text=True).stderr
    assert said.startswith(f"slurm.sbatch: {idle} of {idle + 1} GPUs per node stay idle") == (idle > 0), said


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_the_scripts_teach_and_refuse(script):
    def run(*words: str) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        words = ["bash", str(ROOT / "launch" / script), *words]
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    helped = run("--help")
    assert helped.returncode == 0 and helped.stdout.startswith("usage: ") and "--nproc-per-node N" in helped.stdout
    for words in ((), ("--nproc-per-node",)):
        refused = run(*words)
        assert refused.returncode == 2 and refused.stderr.startswith(f"{script}: error: "), refused.stderr
        assert refused.stderr.count("\n") == 1
