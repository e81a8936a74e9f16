"""Retention, checksums and room on the disk, on small files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_xact.pretraining.checkpointing import checksums, retention, space
from megatron_xact.pretraining.checkpointing.folder import TRACKER, damage, name_of, saved_steps

ROOT = Path(__file__).parents[2]
STEPS = (4, 8, 12, 16, 20)


@pytest.fixture
def run(tmp_path) -> Path:
    """Whole checkpoints of STEPS, the tracker at the last one."""
    for step in STEPS:
        checkpoint = tmp_path / name_of(step)
        dcp.save({"weight": torch.arange(100.0)}, checkpoint_id=checkpoint, no_dist=True)
        (checkpoint / "metadata.json").write_text("{}")
    (tmp_path / TRACKER).write_text("20")
    return tmp_path


@pytest.mark.parametrize(
    "newest, keep, every, kept",
    [
        (20, 0, 0, STEPS),
        (20, 0, 8, STEPS),
        (20, 1, 0, (20,)),
        (20, 2, 0, (16, 20)),
        (20, 2, 8, (8, 16, 20)),
        (20, 1, 12, (12, 20)),
        (20, 5, 0, STEPS),
        (20, 9, 0, STEPS),
        (12, 1, 0, (12, 16, 20)),  # what is newer than the tracker may be being saved
    ],
)
def test_retention_keeps_the_newest_and_the_multiples(run, newest, keep, every, kept):
    assert set(retention.sweep(run, newest, keep, every)) == set(STEPS) - set(kept)
    assert saved_steps(run) == sorted(kept)
    assert {path.name for path in run.iterdir()} == {TRACKER, *map(name_of, kept)}


def test_what_a_cut_off_deletion_left_is_no_checkpoint_and_goes_with_the_next(run, monkeypatch):
    def cut_off(folder: Path, ignore_errors: bool = False) -> None:
        if folder.is_dir():
            (folder / ".metadata").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", cut_off)
        retention.sweep(run, 20, 4, 0)
    assert not (run / f"deleted-{name_of(4)}" / ".metadata").exists()
    assert saved_steps(run) == list(STEPS[1:])
    retention.sweep(run, 20, 0, 0)
    assert not list(run.glob("deleted-*"))


def test_what_was_set_aside_goes_once_the_run_has_come_as_far(run):
    assert retention.tidy(run, 12) and saved_steps(run) == [4, 8, 12] and (run / TRACKER).read_text() == "12"
    shutil.copytree(run / name_of(12), run / name_of(16))
    (run / "superseded-iter_0000016.mine").mkdir()  # someone's own copy
    retention.sweep(run, 16, 0, 0)
    left = {"superseded-iter_0000016.mine", "superseded-iter_0000020"}
    assert {path.name for path in run.glob("superseded-*")} == left


def test_every_file_has_its_checksum_and_any_other_bit_is_found(run):
    checkpoint = run / name_of(20)
    checksums.write(checkpoint)
    told = json.loads((checkpoint / checksums.NAME).read_text())
    names = {path.name for path in checkpoint.iterdir()} - {checksums.NAME}
    assert told["files"] == {n: hashlib.sha256((checkpoint / n).read_bytes()).hexdigest() for n in names}
    assert told["sizes"] == {n: (checkpoint / n).stat().st_size for n in names}
    assert checksums.compare(checkpoint) is None
    chance = random.Random(0)
    for name in names:
        content = (checkpoint / name).read_bytes()
        for _ in range(20):
            harmed = bytearray(content)
            harmed[chance.randrange(len(harmed))] ^= 1 << chance.randrange(8)
            (checkpoint / name).write_bytes(harmed)
            assert checksums.compare(checkpoint).startswith(f"is damaged: {name} is not what was saved")
        (checkpoint / name).write_bytes(content)


def test_the_ranks_together_compare_every_file_once(run):
    checkpoint = run / name_of(20)
    checksums.write(checkpoint)
    names = sorted(json.loads((checkpoint / checksums.NAME).read_text())["files"])
    for number, name in enumerate(names):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found = [checksums.compare(checkpoint, rank, 2) for rank in range(2)]
        assert found[number % 2] is not None and found[1 - number % 2] is None
        (checkpoint / name).write_bytes(content)


KILLED = """
import os, sys
from pathlib import Path
from megatron_xact.pretraining.checkpointing import checksums
os.replace = lambda *_: os.kill(os.getpid(), 9)
checksums.write(Path(sys.argv[1]))
"""


def test_what_a_kill_left_of_checksums_is_none_of_the_checkpoints_files(run):
    """Or the next process would take its checksum, and then its absence for damage."""
    checkpoint = run / name_of(20)
    files = sorted(checkpoint.iterdir())
    killed = subprocess.run([sys.executable, "-c", KILLED, checkpoint], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL and len(list(checkpoint.iterdir())) == len(files) + 1
    checksums.write(checkpoint)
    assert checksums.compare(checkpoint) is None
    assert sorted(checkpoint.iterdir()) == sorted([*files, checkpoint / checksums.NAME])


def test_room(run):
    size = sum(path.stat().st_size for path in (run / name_of(20)).iterdir())
    assert space.size_of_newest(run) == size
    (run / name_of(20) / "metadata.json").unlink()
    assert damage(run / name_of(20)) and space.size_of_newest(run) == size  # that of step 16, as large
    assert space.shortage(run, size) is None
    assert "free, and a checkpoint takes" in space.shortage(run, 2 * shutil.disk_usage(run).free)
    assert "free, and a checkpoint takes" in space.shortage(run / "not" / "there", 10**18)


def test_a_checkpoint_takes_14_bytes_per_16_bit_parameter_with_adam():
    args = Namespace(no_save_optim=False, optimizer="adam")
    assert space.estimate({2: 10**9, 4: 10}, args) == 14 * 10**9 + 12 * 10
    assert space.estimate({2: 10**9}, Namespace(no_save_optim=True, optimizer="adam")) == 2 * 10**9
    assert space.estimate({4: 10**9}, Namespace(no_save_optim=False, optimizer="sgd")) == 8 * 10**9
