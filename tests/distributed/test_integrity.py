"""kill -9 while checkpoints are saved, damaged ones, deleted ones, a full disk: the run goes on from a whole one."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest
from training import MARKS, TP2, Run, Trainings, copy_of, trainings
from warm import Life, Warm

from megatron_xact.pretraining import arguments, status
from megatron_xact.pretraining.checkpointing import choice, retention
from megatron_xact.pretraining.checkpointing.folder import TRACKER, is_cut_off, name_of, saved_steps
from megatron_xact.pretraining.checkpointing.keeper import Keeper, _save_follows
from megatron_xact.pretraining.config import XactConfig, load

pytestmark = MARKS

STEPS = 60
KILLS = 11  # of synchronous saves, and as many of asynchronous ones
LONG = ("--train-iters", str(STEPS), "--exit-interval", str(STEPS))  # exit-interval: without a report of the run
EVERY_STEP = ("--save-interval", "1", "--set", "xact.keep-checkpoints=3", "--set", "xact.keep-every=10")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Trainings:
    return trainings(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def words(data) -> Callable[..., list[str]]:
    """`xact pretrain`'s words for a run in this folder, resumed if there is anything to resume."""

    def words(folder: Path, *more: str) -> list[str]:
        cache = ("--data-cache-path", str(data.folder / "integrity-cache"))
        return [str(data.config), "--save", str(folder), "--load", str(folder), *cache, *more]

    return words


@pytest.fixture(scope="module")
def undisturbed(server, words, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return Run(folder, 0, server.run(*words(folder, *LONG, "--save-interval", str(STEPS))))


def tracker_of(folder: Path) -> str | None:
    path = folder / TRACKER
    return path.read_text() if path.is_file() else None


def newest(folder: Path) -> int:
    names = (path.name for path in folder.glob("iter_*")) if folder.is_dir() else ()
    return max((int(name.removeprefix("iter_")) for name in names), default=0)


def wait_until(happened: Callable[[], bool], life: Life) -> float:
    """When it had happened, to half a millisecond."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, life.output[-4000:]
        time.sleep(0.0005)
    return time.monotonic()


def time_of_a_save(server: Warm, command: list[str], folder: Path) -> float:
    """Seconds from the checkpoint's folder to the tracker, of a run's third save; the run is then killed."""
    (life,) = server.start(*command)
    began = wait_until(lambda: newest(folder) >= 3, life)
    ended = wait_until(lambda: (tracker_of(folder) or "0") not in ("0", "1", "2"), life)
    life.kill()
    life.wait()
    return ended - began


@pytest.mark.parametrize("how", [[], ["--async-save"]], ids=["sync", "async"])
def test_killed_at_any_moment_of_a_save_it_goes_on_from_a_whole_checkpoint(server, words, undisturbed, tmp_path, how):
    """The same folder, life after life: each is killed at its own moment of a save that it has begun."""
    folder = tmp_path / "run"
    command = words(folder, *LONG, *EVERY_STEP, *how)
    duration = time_of_a_save(server, command, folder)
    chance, seen, whole = random.Random(0), [], 0
    for kill in range(KILLS):
        before = newest(folder)
        (life,) = server.start(*command)
        wait_until(lambda before=before: newest(folder) > before, life)
        time.sleep(1.3 * duration * (kill + chance.random()) / KILLS)
        life.kill()
        assert life.wait() == -9
        resumed = int(re.search(r"going on from \S*/iter_(\d+)", life.output)[1])
        assert resumed >= whole, life.output[-4000:]
        assert re.search(rf"successfully loaded checkpoint .* at iteration {resumed}\b", life.output)
        latest = tracker_of(folder)
        whole = max(resumed, int(latest or 0))
        seen.append((newest(folder) - whole, is_cut_off(folder / f"iter_{newest(folder):07d}"), latest == ""))
    print(f"a save took {1e3 * duration:.0f} ms; (steps not in the tracker, cut off, empty tracker): {seen}")
    assert any(cut_off for _, cut_off, _ in seen)
    server.run(*command)
    run = Run(folder, 0, "")
    assert run.losses == undisturbed.losses and set(run.losses) == set(range(1, STEPS + 1))
    kept = {int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*")}
    assert kept == {10, 20, 30, 40, 50, STEPS - 2, STEPS - 1, STEPS}
    assert not list(folder.glob("deleted-*")) + list(folder.glob("superseded-*"))


def test_two_ranks_of_which_one_is_killed_while_they_save_agree_on_what_is_whole(server, words, tmp_path):
    def run(name: str, *more: str) -> list[str]:
        return words(tmp_path / name, *TP2, "--save-interval", "2", "--exit-interval", "12", *more)

    server.run(*run("whole"), ranks=2)
    whole, folder = Run(tmp_path / "whole", 0, ""), tmp_path / "killed"
    first, second = server.start(*run("killed"), ranks=2)
    wait_until(lambda: newest(folder) >= 6, first)
    second.kill()
    assert first.wait() != 0
    assert "going on from" in server.run(*run("killed"), ranks=2)
    assert Run(folder, 0, "").losses == whole.losses

    files = sorted(json.loads((folder / "iter_0000012" / "integrity.json").read_text())["files"])
    theirs = next(name for name in files[1::2] if name.endswith(".distcp"))  # of those that the second rank compares
    flip(folder / "iter_0000012" / theirs)
    lives = server.start(*run("killed", "--ckpt-step", "12"), ranks=2)
    assert [life.wait() for life in lives] == [2, 2]
    assert [life.output.count("xact: error: ") for life in lives] == [1, 0]
    told = server.run(*run("killed"), ranks=2)
    assert re.search(rf"iter_0000012 is damaged: {theirs} is not what .*: going on from \S*/iter_0000010", told)
    assert Run(folder, 0, "").losses == whole.losses


@pytest.fixture(scope="module")
def saved(server, words, tmp_path_factory) -> Run:
    """A run of 12 steps with checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    return Run(folder, 0, server.run(*words(folder, "--exit-interval", "12")))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def settled(data: Trainings, folder: Path, *more: str, compare: bool = True) -> tuple[int | None, str]:
    """The step that a run in this folder would go on from, and what it would say."""
    config = load(data.config).with_overrides(["--save", str(folder), "--load", str(folder), *more])
    chosen, lines = choice.settle(arguments.parse(config.arguments()), None, compare, choice.Ranks())
    return chosen.step, "\n".join(lines)


@pytest.fixture
def only_rank(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")


DAMAGED = [
    (flip, "__0_0.distcp", "is not what was saved"),
    (flip, ".metadata", ""),
    (flip, "metadata.json", "metadata.json"),
    (flip, "integrity.json", ""),
    (truncate, "__0_0.distcp", "bytes"),
    (truncate, ".metadata", ".metadata cannot be read"),
    (truncate, "metadata.json", "metadata.json cannot be read"),
    (truncate, "integrity.json", "integrity.json cannot be read"),
    (Path.unlink, "__0_0.distcp", "has 0 of at least"),
    (Path.unlink, ".metadata", "no .metadata, as when saving was cut off"),
    (Path.unlink, "metadata.json", "no metadata.json, as when saving was cut off"),
    (shutil.rmtree, "", "is missing or empty"),
]


@pytest.mark.parametrize("harm, name, told", DAMAGED, ids=[f"{h.__name__} {n}" for h, n, _ in DAMAGED])
def test_whatever_is_damaged_the_newest_whole_checkpoint_is_used_and_said(
    data, saved, tmp_path, only_rank, harm, name, told
):
    folder = copy_of(saved, tmp_path / "run")
    harm(folder / "iter_0000012" / name)
    step, said = settled(data, folder)
    assert step == 8 and told in said
    assert re.match(r"iter_0000012 is (damaged|missing).*: going on from \S*/iter_0000008\b", said)
    # Nothing is left that the run would overwrite file by file, and the tracker says what the run does.
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000004", "iter_0000008"]
    assert tracker_of(folder) == "8"
    assert settled(data, folder) == (8, f"going on from {folder}/iter_0000008")


@pytest.mark.parametrize(
    "word, told",
    [("", "is empty"), ("twelve", "is corrupt: 'twelve'"), ("16", "iter_0000016 is missing"), (None, "is missing")],
    ids=["empty", "corrupt", "of none", "missing"],
)
def test_a_useless_tracker_is_replaced_by_the_newest_whole_checkpoint(data, saved, tmp_path, only_rank, word, told):
    folder = copy_of(saved, tmp_path / "run")
    tracker = folder / TRACKER
    tracker.unlink() if word is None else tracker.write_text(word)
    step, said = settled(data, folder)
    assert step == 12 and told in said and "going on from" in said
    assert tracker_of(folder) == "12"


def test_what_a_user_put_into_the_tracker_counts_and_nothing_newer_is_overwritten(data, saved, tmp_path, only_rank):
    folder = copy_of(saved, tmp_path / "run")
    (folder / TRACKER).write_text("4\n")
    step, said = settled(data, folder)
    assert step == 4 and "set aside iter_0000008, iter_0000012" in said
    assert {path.name for path in folder.glob("superseded-*")} == {
        "superseded-iter_0000008",
        "superseded-iter_0000012",
    }


def test_a_checkpoint_without_checksums_loads_and_says_so(data, saved, tmp_path, only_rank):
    folder = copy_of(saved, tmp_path / "run")
    (folder / "iter_0000012" / "integrity.json").unlink()
    step, said = settled(data, folder)
    assert step == 12 and "not compared with what was saved: it has no integrity.json" in said
    flip(folder / "iter_0000012" / "__0_0.distcp")
    assert settled(data, folder, compare=False) == (12, f"going on from {folder}/iter_0000012")


def test_the_step_that_was_asked_for_or_nothing(data, saved, tmp_path, only_rank):
    folder = copy_of(saved, tmp_path / "run")
    flip(folder / "iter_0000012" / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"iter_0000012 is damaged: __0_0.distcp is not what was saved"):
        settled(data, folder, "--ckpt-step", "12")
    for step in (4, 8):
        truncate(folder / f"iter_{step:07d}" / ".metadata")
    with pytest.raises(ValueError, match=r"no whole checkpoint in \S+: iter_0000012 is .*iter_0000008.*iter_0000004"):
        settled(data, folder)
    assert len(list(folder.glob("iter_*"))) == 3 and tracker_of(folder) == "12"


def test_saving_that_was_cut_off_before_anything_was_complete_starts_again(data, saved, tmp_path, only_rank):
    folder = copy_of(saved, tmp_path / "run")
    (folder / TRACKER).unlink()
    for path in folder.glob("iter_*/.metadata"):
        path.unlink()
    step, said = settled(data, folder)
    assert step is None and "starting from the beginning" in said
    assert not list(folder.glob("iter_*"))


def test_megatrons_own_check_reads_our_checksums(saved, tmp_path):
    folder = copy_of(saved, tmp_path / "run")
    verify_integrity_manifest(str(folder / "iter_0000012"))
    flip(folder / "iter_0000012" / "__0_0.distcp")
    with pytest.raises(CheckpointingException, match="__0_0.distcp: hash mismatch"):
        verify_integrity_manifest(str(folder / "iter_0000012"))


def test_what_has_just_been_saved_and_is_not_whole_costs_no_other_checkpoint(saved, tmp_path):
    folder, said = copy_of(saved, tmp_path / "run"), io.StringIO()
    (folder / "iter_0000012" / "integrity.json").unlink()
    truncate(folder / "iter_0000012" / "__0_0.distcp")
    Keeper(folder, XactConfig(keep_checkpoints=1), said)._look_after(12)
    assert "iter_0000012, which has just been saved, is damaged: __0_0.distcp has" in said.getvalue()
    assert saved_steps(folder) == [4, 8, 12] and not (folder / "iter_0000012" / "integrity.json").exists()


def test_older_ones_go_once_the_new_one_is_on_the_disk(saved, tmp_path, monkeypatch):
    """A machine that crashed could otherwise find none that is whole: Megatron syncs the shards, and no more."""
    folder, on_disk, fsync, swept = copy_of(saved, tmp_path / "run"), set(), os.fsync, []

    def synced(number: int) -> None:
        fsync(number)
        on_disk.add(os.fstat(number).st_ino)

    def sweep(folder: Path, newest: int, *_: int) -> None:
        files = [*(folder / name_of(newest)).iterdir(), folder / TRACKER]
        swept.extend(file.name for file in files if file.stat().st_ino in on_disk)

    (folder / "iter_0000012" / "integrity.json").unlink()
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(retention, "sweep", sweep)
    Keeper(folder, XactConfig(keep_checkpoints=1), io.StringIO())._look_after(12)
    assert {*swept} == {".metadata", "metadata.json", "__0_0.distcp", "integrity.json", TRACKER}


def test_what_a_kill_left_to_look_after_is_looked_after_by_the_next_life(server, words, saved, tmp_path):
    folder = copy_of(saved, tmp_path / "run")
    (folder / "iter_0000012" / "integrity.json").unlink()
    server.run(*words(folder, "--exit-interval", "12", "--set", "xact.keep-checkpoints=2"))  # nothing left to train
    assert saved_steps(folder) == [8, 12]
    verify_integrity_manifest(str(folder / "iter_0000012"))


def test_closing_hides_no_failure_that_came_before(saved, tmp_path, monkeypatch):
    """Of the network, before there is a process group; of the disk, in the middle of writing the tracker."""
    folder = copy_of(saved, tmp_path / "run")
    Keeper(folder, XactConfig(), io.StringIO()).close()
    looking = Keeper(folder, XactConfig(), io.StringIO())
    monkeypatch.setattr("megatron_xact.pretraining.checkpointing.keeper._is_first", lambda: True)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    (folder / TRACKER).write_text("")
    looking.close()


def test_room_is_asked_for_before_the_steps_that_save(saved):
    """save-interval is 4, and steps are counted before they are complete."""
    counters = [Namespace(curr_iteration=step, save_interval=4, train_iters=14) for step in range(14)]
    assert [at.curr_iteration + 1 for at in counters if _save_follows(at)] == [*saved_steps(saved.folder), 14]


def test_training_goes_on_from_the_whole_one_to_the_same_losses(server, words, saved, tmp_path):
    folder = copy_of(saved, tmp_path / "run")
    flip(folder / "iter_0000012" / "__0_0.distcp")
    (folder / "deleted-iter_0000002").mkdir()
    told = server.run(*words(folder, "--exit-interval", "12"))
    lines = [line for line in told.splitlines() if line.startswith("xact: ")]
    assert re.search(r"iter_0000012 is damaged: __0_0.distcp is not .*: going on from \S*/iter_0000008$", lines[0])
    assert "xact: removed deleted-iter_0000002: deleting it was cut off" in lines
    run = Run(folder, 0, told)
    assert [record["step"] for record in run.records("progress.jsonl")] == [*range(1, 13), *range(9, 13)]
    assert run.losses == saved.losses
    assert not list(folder.glob("superseded-*"))  # overtaken
    assert tracker_of(folder) == "12"
    verify_integrity_manifest(str(folder / "iter_0000012"))


def test_a_run_that_would_overwrite_checkpoints_that_it_does_not_load_is_refused(server, data, saved, words):
    told = server.run(str(data.config), "--save", str(saved.folder), code=2)
    assert "has checkpoints, up to iter_0000012, which this run would overwrite" in told


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts, or changes, a file system of its own in memory: small_disk("size=3m")."""
    place, mounted = tmp_path / "disk", []
    place.mkdir()

    def mount(options: str) -> Path:
        kind = ["-o", f"remount,{options}"] if mounted else ["-t", "tmpfs", "-o", options, "tmpfs"]
        done = subprocess.run(["mount", *kind, str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount needs root, and a system that lets it: {done.stderr.strip()}")
        mounted.append(options)
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_without_room_for_a_checkpoint_the_run_is_not_started_or_ends_before_it_saves(server, words, small_disk):
    """A checkpoint takes 0.58 MB here; retention, where it is asked for, makes the room."""
    disk = small_disk("size=300k")
    told = server.run(*words(disk / "none", *TP2), ranks=2, code=1)
    assert re.search(r"xact: error: .*no room for the next checkpoint: \S+ has 0.\d\d MB free, and", told)
    assert told.count("xact: error: ") == 1 and not (disk / "none" / "progress.jsonl").exists()
    ends = [status.of_file(status.path(status.folder_of(disk / "none"), rank)) for rank in (0, 1)]
    assert all(end.kind == "error" and "MB free, and a checkpoint takes" in end.reason for end in ends), ends

    small_disk("size=3m")
    every = ("--save-interval", "1", "--exit-interval", "12")
    told = server.run(*words(disk / "some", *every), code=1)
    assert told.count("xact: error: ") == 1 and "no room for the next checkpoint" in told
    assert tracker_of(disk / "some") == str(newest(disk / "some"))
    shutil.rmtree(disk / "none")
    told = server.run(*words(disk / "some", *every, "--set", "xact.keep-checkpoints=2"))
    assert sorted(path.name for path in (disk / "some").glob("iter_*")) == ["iter_0000011", "iter_0000012"]


@pytest.mark.parametrize("how", [[], ["--async-save"]], ids=["sync", "async"])
def test_a_disk_that_is_full_leaves_the_last_checkpoint_and_one_line(server, words, saved, small_disk, how):
    disk = small_disk("size=50m,nr_inodes=1000")
    command = words(disk / "run", "--save-interval", "1", "--exit-interval", "12", *how)
    (life,) = server.start(*command)
    wait_until(lambda: (tracker_of(disk / "run") or "0") >= "2", life)
    status = os.statvfs(disk)
    small_disk(f"size=50m,nr_inodes={status.f_files - status.f_ffree + 2}")  # bytes are free, but no file can be made
    assert life.wait() == 1
    assert len(re.findall(r"xact: error: .*a checkpoint could not be written", life.output)) == 1, life.output[-3000:]
    small_disk("size=50m,nr_inodes=1000")
    assert "going on from" in server.run(*command)
    assert Run(disk / "run", 0, "").losses == saved.losses
