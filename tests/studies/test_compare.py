"""The compute multiplier and its interval on studies whose answer is known."""

import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from planted import CHINCHILLA, DATA, LARGE, SMALL, UNEQUAL, Design, loss, olmo, study
from scipy import optimize, stats

from megatron_xact.studies import numbers, words
from megatron_xact.studies.compare import _minus, compare, tied_multiplier
from megatron_xact.studies.effects import Estimate
from megatron_xact.studies.reading import Mapping, read
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
    """[covered, found different, found to depend on size, on tokens], each how often in STUDIES."""
    law, design, m, noise, more = KINDS[kind]
    rng = np.random.default_rng(sorted(KINDS).index(kind))
    counts = np.zeros(4, int)
    for _ in range(STUDIES):
        found = compare(study(law, design, m, noise, rng, **more), "a", "b", draws=60, workers=1)
        counts += [found.multiplier.holds(m), found.p < 0.05, *(t.p < 0.05 for t in found.trends.values())]
    return counts


@pytest.fixture(scope="module")
def simulated() -> dict[str, np.ndarray]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(KINDS, pool.map(repeated, KINDS), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_of_95_percent_cover_92_to_98(simulated, kind):
    assert 0.92 <= simulated[kind][0] / STUDIES <= 0.98


def test_noise_may_be_larger_at_small_sizes_and_few_tokens():
    """Of 150 studies; by the scatter of all groups, those at the smallest and at fewest tokens would hold 91, 90 %."""
    rng, held = np.random.default_rng(0), []
    for _ in range(150):
        found = compare(study(CHINCHILLA, SMALL, 1.05, 0.0, rng, share=0.004), "a", "b", draws=60, workers=1)
        groups = [*found.by_size.values(), *found.by_tokens.values()]
        held.append([e.holds(1.05) for e in (found.multiplier, *groups)])
    assert len(held[0]) == 1 + 3 + 3
    assert (np.mean(held, 0) >= 0.92).all() and np.mean(held) <= 0.98


def test_no_difference_is_rarely_found_different(simulated):
    assert simulated["no difference, seeds shared by the pair"][1] / STUDIES <= 0.06


@pytest.mark.parametrize("kind", KINDS)
def test_dependence_on_size_or_tokens_is_rarely_found_where_there_is_none(simulated, kind):
    # 5 % expected, with a standard deviation of 1 %. With trunks, 4.6 % of 1,100 others on tokens.
    assert (simulated[kind][2:] / STUDIES <= [0.07, 0.08]).all()


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
    told = words.answer(found)
    assert told.startswith("what b is worth against a changes with size: m = 1.0") and "excluded" not in told
    assert re.search(r"of the weight in the mean, m = 1\.0\S+ \[\S+ \S+\], \d\d % is of 3e\+07$", told)
    for N, estimate in zip(SMALL.sizes, found.by_size.values(), strict=True):
        assert estimate.value == pytest.approx(1.05 * (N / 1e8) ** 0.03, abs=0.005)


def scaled_up(table: Table, law) -> dict[tuple, float]:
    """ln of the compute multiplier of every pair by the true law, cell by cell, by a root finder."""
    found = {}
    for r in table.runs:
        N = np.array(float(r.size))
        log_m = optimize.brentq(lambda u, r=r, N=N: float(loss(law, N, r.tokens, u)) - r.loss, -2, 2)
        found.setdefault((r.size, r.seed), {})[r.activation, r.tokens / N] = log_m
    return found


@pytest.mark.parametrize("told", [True, False], ids=["trunks", "no trunks told"])
def test_dependence_on_tokens_is_found_inside_trunks(told):
    """Budgets of a trunk are one cluster, whose mean cannot tell of tokens. Against a t test over slopes by SciPy."""
    table = study(CHINCHILLA, SMALL, 1.05, 0.0005, np.random.default_rng(3), trunk=0.002, told=told, tilt_tokens=-0.05)
    found = compare(table, "a", "b", draws=100)
    t = found.trends["tokens per parameter"]
    slopes = [np.polyfit(*zip(*((np.log(r), u - ladder["a", r]) for (name, r), u in ladder.items() if name == "b"),
                              strict=True), 1)[0] for ladder in scaled_up(table, CHINCHILLA).values()]  # fmt: skip
    expected = stats.ttest_1samp(slopes, 0)
    assert len(slopes) == 6 and t.slope.value == pytest.approx(np.mean(slopes), abs=0.01)
    assert t.slope.holds(-0.05) and max(t.p, expected.pvalue) < 0.01
    low, high = expected.confidence_interval()
    assert t.slope.high - t.slope.low == pytest.approx(high - low, rel=0.5)
    said = words.answer(found)
    assert "changes with tokens per parameter: m = 1.0" in said and " at 10, 1.0" in said and "excluded" not in said
    assert numbers.of_comparison(found, 1.0)["excluded_beyond"] is None
    assert [e.value for e in found.by_tokens.values()] == pytest.approx(
        [1.05 * (r / 20) ** -0.05 for r in SMALL.ratios], abs=0.02)  # fmt: skip


def test_the_tiny_study_depends_on_tokens():
    """As it does by SciPy: slopes of loss differences in each of six trunks, t test of their mean."""
    table = read(TINY / "runs.csv")
    for other in ("relu2", "xielu", "xiprelu"):
        found = compare(table, "swiglu", other, draws=100)
        slopes = [np.polyfit([np.log2(a.tokens) for a, _ in trunk], [b.loss - a.loss for a, b in trunk], 1)[0]
                  for cell in {(a.size, a.seed) for a, _ in found.pairs}
                  if (trunk := [p for p in found.pairs if (p[0].size, p[0].seed) == cell])]  # fmt: skip
        assert len(slopes) == 6 and stats.ttest_1samp(slopes, 0).pvalue < 0.025
        assert found.clustered_by == "trunks" and found.trends["tokens per parameter"].p < 0.025
        told = words.answer(found)
        assert "changes with size: m = " in told and "; and with tokens per parameter: m = " in told
        assert "excluded" not in told and "needs" not in told
        assert round(100 * found.shares["0.3M"]) == 43  # as README says, and of xIELU:
        if other == "xielu":
            last = [b.loss - a.loss for a, b in found.pairs if a.tokens / a.params > 2]
            assert len(last) == 6 and min(last) > 0 and np.mean(last) == pytest.approx(0.08, abs=0.005)
        told = dict(words.of_comparison(found, 1.0))["along tokens per parameter"]
        assert re.match(r"the multiplier depends on it \(p = 0\.\d+\): times 0\.\d+ \[", told)


def test_what_was_not_tested_is_said_and_noise_gets_no_number():
    table = Table([replace(r, activation="rerun" if r.seed else "run", seed=0) for r in olmo().runs])
    told = dict(words.of_comparison(compare(table, "run", "rerun", draws=50), 1.0))
    assert told["along tokens per parameter"].startswith("not tested: it needs two sizes or seeds with pairs at two")
    noisy = study(CHINCHILLA, Design((3e7, 1e8, 3e8), (18, 20), 1), 1.0, 0.1, np.random.default_rng(0))
    told = dict(words.of_comparison(compare(noisy, "a", "b", draws=50), 1.0))
    assert re.fullmatch(r"no dependence detected \(p = \S+\), but these runs would hide a factor of 2 per doubling",
                        told["along tokens per parameter"])  # fmt: skip


def test_the_corpora_of_gadre_differ_by_size():
    """m runs from 0.95 to 0.43, most of the weight is of the smallest size, and no size has two ladders."""
    table = read(DATA / "gadre_models_tidy.csv", Mapping.of(DATA / "gadre.toml", ["activation=train_set"],
                                                            ["data=c4 val"]))  # fmt: skip
    found = compare(table, "c4_original", "rw_original", draws=200)
    told = words.answer(found)
    assert told.startswith("what rw_original is worth against c4_original changes with size: m = 0.951 at 10.6M, 0.433 "
                           "at 6.89B. No one number holds")  # fmt: skip
    assert told.endswith("57 % is of 10.6M") and sum(found.shares.values()) == pytest.approx(1)
    facts = dict(words.of_comparison(found, 1.0))
    assert "no intervals: no group has two independent clusters" in facts["by size"]
    assert "%" not in facts["along tokens per parameter"]


def test_a_diverged_run_is_named_and_the_answer_without_it_given():
    table = study(CHINCHILLA, Design((3e7, 1e8, 3e8, 1e9), (10, 20, 40), 2), 1.2, 0.002, np.random.default_rng(0))
    clean = compare(table, "a", "b", draws=100)
    assert not clean.outliers and clean.without is None
    (cell,) = [r for r in table.runs if (r.activation, r.params, r.tokens, r.seed) == ("b", 1e8, 2e9, 1)]
    wrecked = Table([replace(r, loss=9.9) if r is cell else r for r in table.runs])
    found = compare(wrecked, "a", "b", draws=100)
    assert [(a.params, a.tokens, b.loss) for a, b in found.outliers] == [(1e8, 2e9, 9.9)] and len(found.pairs) == 24
    assert found.without.multiplier.holds(1.2) and len(found.without.pairs) == 23
    told = words.answer(found)
    assert "1 pair beyond 5 robust standard deviations (1e+08 at 2B tokens, seed 1: 9.9 against 3.4" in told
    assert "; without it, m = 1.20" in told and "a needs 1.20" in told
    assert numbers.of_comparison(found, 1.0)["multiplier_without_outliers"]["value"] == pytest.approx(1.2, abs=0.01)


def test_wall_clock_divides_by_the_step_time():
    table = study(CHINCHILLA, SMALL, 1.1, 0.001, np.random.default_rng(0), step_time=1.04)
    found = compare(table, "a", "b", draws=100)
    assert found.step_time.value == pytest.approx(1.04)
    assert found.wall_clock.value == pytest.approx(found.multiplier.value / 1.04)
    assert found.wall_clock.holds(1.1 / 1.04)
    both = _minus(Estimate(3.0, 0.0, 5.0), Estimate(1.0, -1.0, 5.0))  # each has its part in either end
    assert both == Estimate(2.0, 2 - np.hypot(3, 4), 2 + np.hypot(2, 2))
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
