"""A run's folder takes one run at a time: by locks and beats of real processes, on this host and as if on another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_xact.pretraining import exits, status, taking
from megatron_xact.pretraining.launchers import Plan
from megatron_xact.pretraining.nodes import Nodes
from megatron_xact.pretraining.status import Status
from megatron_xact.pretraining.taking import Taken

ROOT = Path(__file__).parents[2]

# A supervisor whose ranks are a process that says when it is asked to end, and ends half a second later.
RANK = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path({saved!r}).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path({begun!r}).touch()
time.sleep(60)
"""
LAUNCHER = """
import sys
from megatron_xact.pretraining import launchers, supervisor
launchers.Launcher.command = lambda self, plan, attempt: ([sys.executable, "-c", {rank!r}], {{}})
sys.exit(supervisor.main())
"""


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """The launcher of a node of a run in tmp_path/run, with ranks that do nothing."""
    rank = RANK.format(saved=str(tmp_path / "saved"), begun=str(tmp_path / "begun"))
    (tmp_path / "launcher.py").write_text(LAUNCHER.format(rank=rank))
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_RESTART_COUNT"}
    started = []

    def start(node: int = 0, nodes: int = 1, host: str = "") -> subprocess.Popen:
        plan = Plan([], str(tmp_path / "run"), nodes, 1)
        words = [sys.executable, str(tmp_path / "launcher.py"), plan.dump(), "--node-rank", str(node)]
        there = {"PYTHONPATH": str(ROOT)} | ({"SLURMD_NODENAME": host} if host else {})
        words += ["--rendezvous", "127.0.0.1:1"] if nodes > 1 else []
        started.append(subprocess.Popen(words, env=environment | there, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def the_one_line(launcher: subprocess.Popen) -> str:
    """Of a launcher that is refused."""
    _, told = launcher.communicate(timeout=30)
    assert launcher.returncode == exits.TAKEN and told.startswith("xact: error: ") and told.count("\n") == 1, told
    return told


def test_a_command_that_is_typed_twice_is_refused_before_any_rank_has_said_a_word(launch, tmp_path):
    """Ranks import for 15 s before they write a status."""
    first = launch()
    until((tmp_path / "begun").exists)
    told = the_one_line(launch())
    assert f"a run is at work in {tmp_path / 'run'}: it was started by process {first.pid}; wait for its end" in told
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=20)
    (tmp_path / "begun").unlink()
    again = launch()
    until((tmp_path / "begun").exists)
    assert again.poll() is None


def test_of_two_nodes_both_refuse_a_second_start_and_the_first_goes_on(launch, tmp_path):
    first = [launch(node, 2) for node in (0, 1)]
    folder = tmp_path / "run" / "logs" / "nodes"
    until(lambda: status.read_json(folder / "1.json").get("beat", 0) > 1 and (tmp_path / "begun").exists())
    attempt = status.read_json(folder / "0.json")["attempt"]
    for node, process in enumerate(first):
        assert f"it was started by process {process.pid}" in the_one_line(launch(node, 2))
        # From another machine, on which no lock of this one is seen; or with another node's number.
        told = the_one_line(launch(node, 2, host="elsewhere"))
        assert f"node {node} of the run in {tmp_path / 'run'} has a launcher already, on {status.host_name()}" in told
    assert [process.poll() for process in first] == [None, None]
    assert status.read_json(folder / "0.json")["attempt"] == attempt


def test_a_launcher_that_was_killed_lets_its_ranks_end_and_the_next_one_start(launch, tmp_path):
    first = launch()
    until((tmp_path / "begun").exists)
    first.kill()
    until((tmp_path / "saved").exists)
    (tmp_path / "begun").unlink()
    again = launch()
    until((tmp_path / "begun").exists)
    assert again.poll() is None


def test_a_node_whose_launcher_was_killed_can_be_started_again(tmp_path):
    first = Nodes(tmp_path, 1, 2)
    first.say(attempt="a")  # and no more
    Nodes(tmp_path, 1, 2)
    first.say(state="stop")
    began = time.monotonic()
    Nodes(tmp_path, 1, 2)
    assert time.monotonic() - began < 0.5


def test_a_follower_that_waits_for_the_first_node_ends_by_a_signal(launch, tmp_path):
    follower = launch(1, 2)
    until((tmp_path / "run" / "logs" / "nodes" / "1.json").exists)
    follower.send_signal(signal.SIGTERM)
    _, told = follower.communicate(timeout=20)
    assert (follower.returncode, told) == (exits.PREEMPTED, "xact: ended by SIGTERM before anything was started\n")


FORKING = """
import multiprocessing, pathlib, sys, time
from megatron_xact.pretraining.taking import taking
with taking(pathlib.Path(sys.argv[1])):
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,)).start()
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(30)
"""


def test_what_a_killed_process_leaves_behind_holds_no_lock(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", FORKING, str(tmp_path)], env=environment, stdout=subprocess.PIPE)
    left = int(first.stdout.readline())
    try:
        with pytest.raises(Taken, match=f"process {first.pid}"), taking.taking(tmp_path):
            pass
        first.kill()
        first.wait()
        assert Path(f"/proc/{left}").exists()
        with taking.taking(tmp_path):
            pass
    finally:
        first.kill()
        os.kill(left, signal.SIGKILL)
        first.communicate()


def test_half_a_word_of_a_rank_that_was_killed_is_cleared_away(tmp_path):
    folder = status.folder_of(tmp_path)
    folder.mkdir(parents=True)
    (folder / "00000.7.partial").write_text('{"attempt": "a", "ra')
    with taking.taking(tmp_path):
        assert not list(folder.iterdir())


def test_ranks_that_outlive_their_launcher_are_at_work(tmp_path):
    rank = subprocess.Popen(["sleep", "60"], env={**os.environ, "XACT_ATTEMPT": "abc"})
    folder = status.folder_of(tmp_path)
    folder.mkdir(parents=True)
    try:
        Status("abc", 1, status.host_name(), rank.pid, 3, 40).write(folder)
        until(lambda: rank.pid in status.processes_of("abc"))
        told = f"rank 1 on {status.host_name()} .process {rank.pid}., at step 40; wait"
        for node in (0, 1):
            with pytest.raises(Taken, match=told), taking.taking(tmp_path, node):
                pass
    finally:
        rank.kill()
        rank.wait()
    with taking.taking(tmp_path):  # killed, and without a last word
        assert not list(folder.iterdir())  # so that the next start need not ask again


@pytest.mark.parametrize("attempt, host", [("abc", "elsewhere"), ("", status.host_name())])
def test_a_run_on_another_host_or_without_a_launcher_is_at_work_if_it_beats(
    tmp_path, monkeypatch, capsys, attempt, host
):
    monkeypatch.setattr(status, "SLOWEST_BEAT", 0.6)
    folder = status.folder_of(tmp_path)
    folder.mkdir(parents=True)
    rank = Status(attempt, 0, host, os.getpid(), 3, 40, time.time())
    rank.write(folder)
    assert taking.at_work(tmp_path) is None
    assert f"whether rank 0 on {host}" in capsys.readouterr().err
    threading.Timer(0.3, lambda: replace(rank, beat=4).write(folder)).start()
    assert taking.at_work(tmp_path).beat == 4
    capsys.readouterr()
    ended = subprocess.Popen(["true"])
    ended.wait()
    for gone in (replace(rank, kind="done"), Status("", 0, status.host_name(), ended.pid, 3, 40, time.time())):
        gone.write(folder)
        assert taking.at_work(tmp_path) is None and not capsys.readouterr().err


@pytest.mark.parametrize("wrong_by", [-1e6, 0.0, 1e6])
def test_no_clock_hides_a_rank_that_beats(tmp_path, monkeypatch, wrong_by):
    """Beside what a run left behind whose clock went ahead, and however wrong its own clock is."""
    monkeypatch.setattr(status, "SLOWEST_BEAT", 0.6)
    folder = status.folder_of(tmp_path)
    folder.mkdir(parents=True)
    for rank in (0, 2):
        Status("old", rank, "fast", 100, 3, 40, time.time() + 1800).write(folder)
    live = Status("new", 1, "elsewhere", 100, 3, 40, time.time() + wrong_by)
    live.write(folder)
    threading.Timer(0.3, lambda: replace(live, beat=4).write(folder)).start()
    assert taking.at_work(tmp_path).rank == 1


def test_a_job_that_is_requeued_while_its_former_life_is_at_work_is_requeued_again(tmp_path):
    """slurm.sbatch reads the exit code; here its last lines run, with a scontrol that notes what it is asked."""
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    last = script[script.index("# 75: saved after a signal") :]
    stand_in = f'#!/bin/sh\necho "$*" >> "{tmp_path}/asked"\necho " JobState=RUNNING "\n[ $1 = -o ]\n'
    (tmp_path / "scontrol").write_text(stand_in)
    (tmp_path / "scontrol").chmod(0o755)

    def ends(code: int, lives: str) -> tuple[int, bool]:
        (tmp_path / "asked").write_text("")
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": lives}
        done = subprocess.run(["bash", "-c", f"code={code}\n{last}"], env=environment, stdout=subprocess.DEVNULL)
        return done.returncode, "requeue 7" in (tmp_path / "asked").read_text()

    assert ends(exits.TAKEN, "1") == (exits.TAKEN, True)
    assert ends(exits.TAKEN, "0") == (exits.TAKEN, False)  # a mistake of whoever has submitted it
    assert ends(exits.PREEMPTED, "0") == (exits.PREEMPTED, True)
    assert ends(exits.USER_ERROR, "1") == (exits.USER_ERROR, False)
