"""The compute multiplier and its interval on studies whose answer is known."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from planted import CHINCHILLA, LARGE, SMALL, UNEQUAL, olmo, study

from megatron_xact.studies import words
from megatron_xact.studies.compare import compare, tied_multiplier
from megatron_xact.studies.reading import read
from megatron_xact.studies.table import Table

TINY = Path(__file__).parents[2] / "tools/results/study_tiny"
STUDIES = 500
# name -> how a study is drawn. Noise in nat, per run; see planted.study.
KINDS = {
    "no difference, seeds shared by the pair": (CHINCHILLA, SMALL, 1.0, 0.002, {"common": 0.003}),
    "unequal exponents, little noise": (UNEQUAL, SMALL, 1.1, 0.0005, {}),
    "much noise, branches of one trunk": (CHINCHILLA, LARGE, 1.05, 0.005, {"trunk": 0.003, "told": True}),
    "branches that the table does not tell": (UNEQUAL, SMALL, 1.0, 0.001, {"trunk": 0.001}),
}


def repeated(kind: str) -> np.ndarray:
    """[covered, found different, found to depend on size], each how often in STUDIES."""
    law, design, m, noise, more = KINDS[kind]
    rng = np.random.default_rng(sorted(KINDS).index(kind))
    counts = np.zeros(3, int)
    for _ in range(STUDIES):
        found = compare(study(law, design, m, noise, rng, **more), "a", "b", draws=60, workers=1)
        counts += [found.multiplier.holds(m), found.p < 0.05, found.trends["size"].p < 0.05]
    return counts


@pytest.fixture(scope="module")
def simulated() -> dict[str, np.ndarray]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(KINDS, pool.map(repeated, KINDS), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_of_95_percent_cover_92_to_98(simulated, kind):
    assert 0.92 <= simulated[kind][0] / STUDIES <= 0.98


def test_no_difference_is_rarely_found_different(simulated):
    assert simulated["no difference, seeds shared by the pair"][1] / STUDIES <= 0.06


@pytest.mark.parametrize("kind", KINDS)
def test_dependence_on_size_is_rarely_found_where_there_is_none(simulated, kind):
    assert simulated[kind][2] / STUDIES <= 0.07  # 5 % expected, with a standard deviation of 1 %


def test_a_difference_of_five_millinats_is_found(simulated):
    assert simulated["unequal exponents, little noise"][1] == STUDIES


@pytest.mark.parametrize("law", [CHINCHILLA, UNEQUAL], ids=["chinchilla", "unequal"])
@pytest.mark.parametrize("m", [0.8, 1.0, 1.3])
def test_without_noise_it_is_exact(law, m):
    found = compare(study(law, SMALL, m, 0.0, np.random.default_rng(0)), "a", "b", draws=20)
    assert found.multiplier.value == pytest.approx(m, rel=1e-6)
    assert found.trends["size"].slope.value == pytest.approx(0, abs=1e-6)
    assert float(found.law.alpha) == pytest.approx(law[2], rel=1e-4)


def test_swapping_the_two_inverts_it():
    table = study(UNEQUAL, SMALL, 1.1, 0.002, np.random.default_rng(0))
    one, other = compare(table, "a", "b", draws=50), compare(table, "b", "a", draws=50)
    assert one.multiplier.value * other.multiplier.value == pytest.approx(1, rel=1e-7)
    assert one.multiplier.low * other.multiplier.high == pytest.approx(1, rel=2e-3)  # other signs are drawn


def test_parameters_that_do_not_quite_match_are_accounted_for():
    table = study(CHINCHILLA, SMALL, 1.05, 0.0, np.random.default_rng(0), mismatch=1.03)
    assert compare(table, "a", "b", draws=20).multiplier.value == pytest.approx(1.05, abs=1e-3)


def test_one_exponent_for_both_would_price_a_nat_wrongly():
    """Why `compare` uses the free form although the tied one extrapolates better."""
    table = study(UNEQUAL, SMALL, 1.2, 0.0005, np.random.default_rng(0))
    found = compare(table, "a", "b", draws=100)
    assert found.multiplier.holds(1.2)
    assert not found.multiplier.holds(tied_multiplier(table, "a", "b"))
    assert not compare(table, "a", "b", draws=100, form="tied").multiplier.holds(1.2)


def test_where_exponents_cannot_be_told_apart_one_does_for_both():
    """Three small sizes, each trained on few tokens: the free form says that size is worth nothing."""
    table = read(TINY / "runs.csv")
    free = compare(table, "swiglu", "relu2", draws=100, form="free")
    assert float(free.law.alpha) == pytest.approx(1e-3) and free.excluded == np.inf
    assert words.answer(free).endswith("these runs say nothing about it")
    found = compare(table, "swiglu", "relu2", draws=100)
    assert found.form == "tied" and found.law.alpha == found.law.beta
    assert found.multiplier == compare(table, "swiglu", "relu2", draws=100, form="tied").multiplier
    assert 1 < found.multiplier.low < found.multiplier.high < 3
    assert compare(study(UNEQUAL, SMALL, 1.2, 0.0005, np.random.default_rng(0)), "a", "b", draws=50).form == "free"


def test_a_run_against_its_rerun_is_one():
    """The ten 1xC runs and reruns of the OLMo ladder; its other runs inform the law."""
    table = Table([replace(r, activation="rerun" if r.seed else "run", seed=0) for r in olmo().runs])
    found = compare(table, "run", "rerun")
    assert len(found.pairs) == 5 and found.unpaired == 20
    assert found.multiplier.holds(1.0) and not found.detected and 0.98 < found.multiplier.low
    assert "no detectable difference" in words.answer(found) and "excluded at 95 %" in words.answer(found)


def test_dependence_on_size_is_found_and_no_single_number_left_alone():
    table = study(CHINCHILLA, SMALL, 1.05, 0.0005, np.random.default_rng(0), tilt=0.03)
    found = compare(table, "a", "b", draws=100)
    assert found.trends["size"].p < 0.01 and found.trends["size"].slope.holds(0.03)
    assert "depends on size" in words.answer(found)
    for N, estimate in zip(SMALL.sizes, found.by_size.values(), strict=True):
        assert estimate.value == pytest.approx(1.05 * (N / 1e8) ** 0.03, abs=0.005)


def test_wall_clock_divides_by_the_step_time():
    table = study(CHINCHILLA, SMALL, 1.1, 0.001, np.random.default_rng(0), step_time=1.04)
    found = compare(table, "a", "b", draws=100)
    assert found.step_time.value == pytest.approx(1.04)
    assert found.wall_clock.value == pytest.approx(found.multiplier.value / 1.04)
    assert found.wall_clock.holds(1.1 / 1.04)
    assert compare(study(CHINCHILLA, SMALL, 1.1, 0.001, np.random.default_rng(0)), "a", "b", draws=9).wall_clock is None


def test_trunks_make_honest_intervals_wider():
    table = study(CHINCHILLA, SMALL, 1.0, 0.0005, np.random.default_rng(1), trunk=0.003, told=True)
    told = compare(table, "a", "b", draws=100)
    assert told.clusters == 6 and told.clustered_by == "trunks"
    asked = compare(table, "a", "b", draws=100, cluster="pair")
    assert asked.clusters == 18
    width = [c.multiplier.high - c.multiplier.low for c in (told, asked)]
    assert width[0] > 1.3 * width[1]


def test_the_same_for_any_number_of_threads():
    table = study(CHINCHILLA, SMALL, 1.0, 0.002, np.random.default_rng(0))
    assert compare(table, "a", "b", draws=300, workers=1) == compare(table, "a", "b", draws=300, workers=3)
