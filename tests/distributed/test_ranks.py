"""The helper itself: a rank that fails or hangs must not pass, hide its reason, or leave processes behind."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch
from ranks import RankFailed, run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = multiprocessing.active_children()  # another test's pool
    yield
    assert set(multiprocessing.active_children()) <= set(before)


def fail_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise ZeroDivisionError("planted on rank 1")
    torch.distributed.barrier()  # would wait for ever


def hang() -> None:
    time.sleep(60)


def test_a_failing_rank_s_traceback_arrives_first():
    with pytest.raises(RankFailed, match="planted on rank 1") as failed:
        run_ranks(fail_on_rank_1, 2)
    told = str(failed.value)
    assert told.split("--- rank ")[1].startswith("1\n") and "in fail_on_rank_1" in told


def test_out_of_time():
    started = time.monotonic()
    with pytest.raises(RankFailed, match="out of time") as failed:
        run_ranks(hang, 2, timeout=2.0)
    assert time.monotonic() - started < 50
    assert str(failed.value).count("in hang") == 2
