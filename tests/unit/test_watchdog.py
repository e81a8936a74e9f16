"""A hang of a dozen ranks, by processes that are nothing but a watchdog: who is named, and who reads how much."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_xact.pretraining import exits, failures, status
from megatron_xact.pretraining.checkpointing.choice import Ranks
from megatron_xact.pretraining.watchdog import JUDGES, SILENT, Watchdog, judges_of, position

ROOT = Path(__file__).parents[2]
RANKS = 12

# Completes a step, waits until it is told to hang, and hangs; notes how many statuses it has opened when it ends.
RANK = """
import os, sys, time
from pathlib import Path
from megatron_xact.pretraining.watchdog import Watchdog

folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
opened = 0

def count(event, args):
    global opened
    opened += event == "open" and str(args[0]).endswith(".json") and args[1] == "r"

class Noting(Watchdog):
    def end(self, *words):
        (folder / f"opened-{rank}").write_text(str(opened))
        super().end(*words)

sys.addaudithook(count)
with Noting(folder / "run", rank, ranks, 1.0, sys.stderr) as watchdog:
    (folder / f"begun-{rank}").touch()
    while not (folder / "hang").exists():
        watchdog.progress(step=1)
        time.sleep(0.02)
    opened = 0
    time.sleep(60)
"""

# Over NCCL: ranks wait in `.item()` for a result that their GPU does not get before the other ranks come; one is
# somewhere else, with nothing left on its GPU. There is none here: a stand-in answers for the trainer's stream.
ON_GPU = """
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from megatron_xact.pretraining.watchdog import Watchdog

folder, rank, ranks, asleep = Path(sys.argv[1]), *map(int, sys.argv[2:])

class Stream:
    def __init__(self):
        self.of_the_trainer = threading.current_thread() is threading.main_thread()

    def query(self):
        return rank == asleep or not self.of_the_trainer

def item():
    time.sleep(60)

def read_from_a_disk_that_does_not_answer():
    time.sleep(60)

sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, current_stream=Stream))
with Watchdog(folder / "run", rank, ranks, 2.0, sys.stderr) as watchdog:
    watchdog.progress(step=1)
    (folder / f"begun-{rank}").touch()
    while len(list(folder.glob("begun-*"))) < ranks:
        watchdog.progress()
        time.sleep(0.05)
    read_from_a_disk_that_does_not_answer() if rank == asleep else item()
"""


@pytest.mark.parametrize("asleep", [2, None])
def test_who_waits_for_its_gpu_in_a_collective_is_not_to_blame(tmp_path, asleep):
    environment = {name: value for name, value in os.environ.items() if name != "XACT_ATTEMPT"}
    environment["PYTHONPATH"] = str(ROOT)
    words = [sys.executable, "-c", ON_GPU, str(tmp_path)]
    ranks = [
        subprocess.Popen([*words, str(rank), "4", str(-1 if asleep is None else asleep)], env=environment)
        for rank in range(4)
    ]
    try:
        assert {rank.wait(timeout=60) for rank in ranks} == {exits.HANG}
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    last = list(map(status.of_file, status.folder_of(tmp_path / "run").glob("*.json")))
    assert {s.culprit for s in last} == {0 if asleep is None else asleep}
    told = "no rank stands out" if asleep is None else "it is in read_from_a_disk_that_does_not_answer"
    assert all(told in s.reason for s in last), [s.reason for s in last]


def test_a_hang_is_told_by_a_few_ranks_also_where_one_of_those_is_stopped(tmp_path):
    """Rank 0, a judge, is stopped; another judge and another rank are killed; the others agree on a stopped one."""
    environment = {name: value for name, value in os.environ.items() if name != "XACT_ATTEMPT"}
    environment["PYTHONPATH"] = str(ROOT)
    judges = [*judges_of(range(RANKS))]
    assert 0 in judges and len(judges) < RANKS
    words = [[sys.executable, "-c", RANK, str(tmp_path), str(rank), str(RANKS)] for rank in range(RANKS)]
    ranks = [subprocess.Popen(w, env=environment, stderr=subprocess.PIPE, text=True) for w in words]
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("begun-*"))) < RANKS:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks[0].send_signal(signal.SIGSTOP)
        gone = (0, judges[1], judges[-1] + 1)
        for rank in gone[1:]:
            ranks[rank].kill()
        (tmp_path / "hang").touch()
        left = [rank for rank in range(RANKS) if rank not in gone]
        told = {rank: ranks[rank].communicate(timeout=30)[1] for rank in left}
        assert {ranks[rank].returncode for rank in left} == {exits.HANG}
        last = {s.rank: s for s in map(status.of_file, status.folder_of(tmp_path / "run").glob("*.json"))}
        assert {last[rank].kind for rank in left} == {"hang"} and {last[rank].culprit for rank in left} <= {*gone}
        assert all(last[rank].reason.endswith(SILENT) and last[rank].reason in told[rank] for rank in left)
        opened = {rank: int((tmp_path / f"opened-{rank}").read_text()) for rank in left}
        assert {opened[rank] for rank in left if rank in judges} == {2 * RANKS}
        assert all(0 < opened[rank] <= JUDGES * 3 for rank in left if rank not in judges), opened
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_who_waits_for_the_first_rank_before_there_are_process_groups_is_not_to_blame():
    ranks = object.__new__(Ranks)
    ranks.rank, ranks.size = 1, 2
    ranks.store = SimpleNamespace(get=lambda key: json.dumps(position(sys._getframe())[1]))
    assert ranks.from_first("where are you") is True and position(sys._getframe())[1] is False


CRASH = """
import ctypes, os, signal, sys
from pathlib import Path
from megatron_xact.pretraining.watchdog import Watchdog

ends = {"abort": os.abort, "segfault": lambda: ctypes.string_at(0), "kill": lambda: os.kill(os.getpid(), 9), "": int}
with Watchdog(Path(sys.argv[1]), int(sys.argv[2]), 4, 0.0, sys.stderr) as watchdog:
    watchdog.progress(step=7)
    ends[sys.argv[3]]()
"""


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        (("abort", "kill", "abort", "abort"), (1, "killed", "ended without a word")),
        (("abort", "abort", "segfault", "abort"), (2, "killed", "ended by itself: Segmentation fault (stacks in ")),
        (("", "", "abort", ""), (2, "network", "aborted, as NCCL does where the network, a GPU or another rank has ")),
    ],
    ids=str,
)
def test_the_rank_that_was_killed_is_named_and_not_those_that_nccl_aborts_for_it(tmp_path, ends, told):
    """It aborts them within the beat in which the other died, so by their beats they could not be told apart."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XACT_ATTEMPT", "PYTHONFAULTHANDLER")}
    for rank, end in enumerate(ends):  # the killed one is not the first
        words = [sys.executable, "-c", CRASH, str(tmp_path), str(rank), end]
        subprocess.run(words, env={**kept, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    folder = status.folder_of(tmp_path)
    said = status.read(folder, "", range(4))
    failures.add_crashes(folder, said)
    failure = failures.root_cause(said, range(4))
    assert (failure.rank, failure.kind) == told[:2] and failure.reason.startswith(told[2])
    if "stacks" in failure.reason:
        assert "Current thread" in status.crash_path(folder, failure.rank).read_text()
    assert not [rank for rank, end in enumerate(ends) if not end and status.crash_path(folder, rank).exists()]


def test_a_thousand_ranks_open_few_files(tmp_path, monkeypatch):
    """2 n by a judge, and about one by any other rank; it was 2 n by each."""
    monkeypatch.setenv("XACT_ATTEMPT", "a")
    ranks, folder = range(1000), status.folder_of(tmp_path)
    folder.mkdir(parents=True)
    assert len(judges_of(ranks)) == JUDGES and len(judges_of(range(JUDGES))) == JUDGES
    looked, read = [], status.of_file
    monkeypatch.setattr(status, "of_file", lambda file: looked.append(file) or read(file))
    status.Status("a", 0, "n0", 1, kind="hang", culprit=7, reason="no progress").write(folder)
    dog = Watchdog(tmp_path, 501, len(ranks), 1.0, sys.stderr)
    dog.interval = 0.01
    assert dog._verdict(time.monotonic()) == (7, "no progress") and len(looked) == 1


@pytest.mark.parametrize("judges", [{}, {0: "other", 2: "a"}])
def test_where_no_judge_speaks_each_rank_judges_for_itself(tmp_path, monkeypatch, judges):
    """None of them has begun, or what is there is another attempt's hang and a judge that has ended otherwise."""
    monkeypatch.setenv("XACT_ATTEMPT", "a")
    folder = status.folder_of(tmp_path)
    folder.mkdir(parents=True)
    for rank, attempt in judges.items():
        kind = "hang" if attempt == "other" else "error"
        status.Status(attempt, rank, "n0", 1, kind=kind, culprit=5, reason="what is not to be believed").write(folder)
    dog = Watchdog(tmp_path, 1, RANKS, 1.0, sys.stderr)
    dog.interval = 0.01
    culprit, told = dog._verdict(time.monotonic())
    assert culprit == 0 and told.endswith("it never began")
