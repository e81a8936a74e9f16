"""A real run on two data-parallel ranks whose batches DALI fetches, resumed in the middle of an epoch."""

from __future__ import annotations

import pytest
from training import MARKS, STEPS, Trainings, trainings

pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra `dali`)")
pytestmark = MARKS


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Trainings:
    return trainings(tmp_path_factory.getbasetemp()).start("dp2", "dp2@8 by dali")


def test_it_trains_as_with_megatrons_loader_bit_for_bit(runs):
    ours, whole = runs["dp2@8 by dali"], runs["dp2"]
    assert set(ours.losses) == set(range(9, STEPS + 1))
    assert ours.losses == {step: loss for step, loss in whole.losses.items() if step > 8}
    assert ours.alphas[STEPS] == whole.alphas[STEPS]
    validation = "lm loss validation"
    assert ours.scalars(validation)[STEPS] == whole.scalars(validation)[STEPS]
