"""Files are there whole or not at all; what a killed process left goes with the next one, a living one's stays."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_xact.checkpoints.folders import whole_folder
from megatron_xact.whole import partial, write_text

REPOSITORY = Path(__file__).parents[2]

HALFWAY = """
import sys, time
from pathlib import Path
from megatron_xact.checkpoints.folders import whole_folder
with whole_folder(Path(sys.argv[1]), 10) as folder:
    (folder / "half").write_text("x")
    print("halfway", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def halfway():
    """Starts processes that are in the middle of a folder; they end with the test."""
    started = []

    def start(out: Path) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        process = subprocess.Popen(
            [sys.executable, "-c", HALFWAY, out], env=environment, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "halfway\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_a_killed_process_left_goes_and_what_a_living_one_makes_stays(tmp_path, halfway):
    out = tmp_path / "out [1]*"  # neither a pattern
    killed, living, other = halfway(out), halfway(out), halfway(tmp_path / "out [1]*2")
    killed.send_signal(signal.SIGKILL)
    other.send_signal(signal.SIGKILL)
    killed.wait()
    other.wait()
    assert len(list(tmp_path.glob(".out*"))) == 3
    with whole_folder(out, 10) as folder:
        (folder / "file").write_text("whole")
    assert [path.name for path in out.iterdir()] == ["file"]
    left = sorted(path.name.rpartition("-")[2] for path in tmp_path.glob(".out*"))
    assert left == sorted([str(living.pid), str(other.pid)])  # another name's is for who makes that


def test_what_cannot_be_told_to_be_of_an_ended_process_stays(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = os.uname().nodename
    ours, gone, foreign, unknown = (
        tmp_path / f".a.json.partial-{end}"
        for end in (f"{host}-{os.getppid()}", f"{host}-{ended.pid}", f"other-{host}-{ended.pid}", "copy")
    )
    for path in (ours, gone, foreign, unknown):
        path.write_text(json.dumps({}))
    name = partial(tmp_path / "a.json")
    assert name.parent == tmp_path and name.name == f".a.json.partial-{host}-{os.getpid()}"
    assert sorted(tmp_path.iterdir()) == sorted([ours, foreign, unknown])


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "tracker"
    write_text(path, "4")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "8\ud800")  # fails half-way
    assert path.read_text() == "4" and list(tmp_path.iterdir()) == [path]


def test_what_a_link_leads_to_is_replaced_and_devices_are_not(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "tracker").symlink_to("there/tracker")
    for text in ("4", "8"):
        write_text(tmp_path / "tracker", text)
        assert (tmp_path / "tracker").is_symlink() and (tmp_path / "there" / "tracker").read_text() == text
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/full")
    before = os.stat("/dev/full")
    for name in ("pipe", "device", "there"):
        with pytest.raises(OSError, match="is no file that could be replaced"):
            write_text(tmp_path / name, "text")
    assert os.stat("/dev/full") == before and (tmp_path / "pipe").is_fifo()


def test_a_file_has_its_name_only_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    """A crash could otherwise leave the name, and nothing behind it."""
    on_disk, fsync, replace = set(), os.fsync, os.replace

    def synced(number: int) -> None:
        fsync(number)
        on_disk.add((os.fstat(number).st_ino, os.fstat(number).st_size))

    def renamed(source: Path, target: Path) -> None:
        assert (source.stat().st_ino, source.stat().st_size) in on_disk
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "tracker", "1200")
    assert (tmp_path / "tracker").read_text() == "1200" and len(on_disk) == 1
