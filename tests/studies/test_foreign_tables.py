"""Tables as spreadsheets and other people's studies have them, and what must not be said of them."""

import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from planted import CHINCHILLA, Design, ladder, loss, study

from megatron_xact import cli
from megatron_xact.studies import effects, isoflop, law_plots, words
from megatron_xact.studies.compare import compare
from megatron_xact.studies.diagnostics import residuals_by
from megatron_xact.studies.fit import fit
from megatron_xact.studies.forms import Trial
from megatron_xact.studies.reading import read
from megatron_xact.studies.table import Run, Table

FIVE = Design(tuple(np.geomspace(5e7, 2e9, 5)), (5, 10, 20, 40, 80), 1)


def isoflops(levels=(1e18, 1e19, 1e20, 1e21), noise=0.0, law=CHINCHILLA) -> Table:
    """Seven sizes about the optimum of each compute, none of which is trained twice."""
    rng, runs = np.random.default_rng(0), []
    E, A, alpha, B, beta = law
    for C in levels:
        best = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))
        for N in np.round(best * np.geomspace(0.3, 3, 7)):
            runs.append(Run(params=N, tokens=C / 6 / N, loss=float(loss(law, N, C / 6 / N)) + rng.normal(0, noise),
                            size=f"{N:.0f}"))  # fmt: skip
    return Table(runs)


# -- files ------------------------------------------------------------------------------------------------------------


def test_rows_of_nothing_but_separators_are_blank(tmp_path):
    text = "params,tokens,loss\n100000000,1000000000,3.5\n,,\n100000000,2000000000,3.3\n , ,\n"
    (tmp_path / "t.csv").write_text(text)
    assert [r.line for r in read(tmp_path / "t.csv").runs] == ["line 2", "line 4"]


@pytest.mark.parametrize(("cell", "said"), [
    ("3,5", "'3,5'; write numbers with a decimal point and without thousands separators"),
    ("30.000.000", "; write numbers with a decimal point and without"),
    ("30M", "; write the number out (30M is 3e7), or give each name its number: values = {...} in a --mapping"),
    ("-", "; leave such runs out with --where 'loss!=VALUE'"),
])  # fmt: skip
def test_cells_that_are_no_numbers_come_with_the_way_out(cell, said, tmp_path):
    (tmp_path / "t.csv").write_text(f"params;tokens;loss\n100000000;1000000000;{cell}\n")
    with pytest.raises(ValueError, match="loss is not a finite number in line 2") as error:
        read(tmp_path / "t.csv")
    assert said in str(error.value)


def test_files_of_other_kinds_are_told_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w") as archive:
        archive.writestr("xl/worksheet.xml", "<x/>")
    (tmp_path / "t.csv.gz").write_bytes(b"\x1f\x8b\x08\x00")
    (tmp_path / "wide.csv").write_text("params,tokens,loss\n1,2,3\n", encoding="utf-16")
    for name, said in (("t.xlsx", "is a spreadsheet or a zip archive, not a CSV file"), ("t.csv.gz", "is compressed"),
                       ("wide.csv", "iconv -f utf-16 -t utf-8 wide.csv")):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(said)):
            read(tmp_path / name)


# -- designs ----------------------------------------------------------------------------------------------------------


def test_an_isoflop_study_needs_no_size_trained_twice():
    """N and D vary independently in it, though every size has one budget."""
    found = fit(isoflops(noise=0.002), bootstraps=100)
    for quantity, value in (("E", 1.69), ("alpha", 0.34), ("beta", 0.28), ("a_opt", 0.28 / 0.62)):
        low, high = found.interval(quantity, 0.99)
        assert low <= value <= high, quantity
    facts = dict(words.of_fit(found, []))
    assert max(map(len, facts)) < 40 and "predicts the 9 sizes from " in facts["form"]
    assert facts["residuals by size"].count("%") == 12 == facts["residuals by tokens per parameter"].count("%")


def test_residuals_of_neighbours_are_put_together():
    table = isoflops()
    values = np.arange(28.0)
    order = np.argsort([r.params for r in table.runs], kind="stable")
    rows = residuals_by(values, table.runs, "size")
    assert len(rows) == 12 and sum(count for _, count, *_ in rows) == 28
    assert rows[0][:3] == (f"{table.sizes[0]}..{table.sizes[2]}", 3, values[order[:3]].mean())


def test_isoflop_parabolas_go_through_the_runs_where_there_are_some():
    found = isoflop.parabolas(isoflops())
    assert [p.flops for p in found] == pytest.approx([1e18, 1e19, 1e20, 1e21])
    assert all(p.measured and len(p.params) == 7 for p in found)
    E, A, alpha, B, beta = CHINCHILLA
    for p in found:
        expected = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (p.flops / 6) ** (beta / (alpha + beta))
        assert p.optimum == pytest.approx(expected, rel=0.03)


def test_parabolas_at_nearly_one_compute_are_drawn(tmp_path):
    """What three sizes cover may be so narrow that all levels are called the same."""
    ends = {1e8: (1e18, 3.04e18), 2e8: (1.02e18, 3.04e18), 3e8: (3e18, 6e18), 5e8: (3.3e18, 5.8e18)}
    cells = [(N, C / 6 / N) for N, both in ends.items() for C in both]
    table = Table([Run(params=N, tokens=D, loss=float(loss(CHINCHILLA, N, D))) for N, D in cells])
    found = isoflop.parabolas(table)
    assert len({f"{p.flops:.2g}" for p in found}) < len(found)
    law_plots.isoflops({"all": fit(table, bootstraps=5)}, tmp_path / "isoflop.png")
    assert (tmp_path / "isoflop.png").exists()


def test_more_sizes_than_there_are_may_not_be_held_out():
    table = ladder(CHINCHILLA, FIVE, 0.001, np.random.default_rng(0))
    with pytest.raises(ValueError, match="without its 3 largest sizes there are 2 left"):
        fit(table, hold_out=3, bootstraps=5)
    assert fit(table, hold_out=2, bootstraps=5).trials[0].named == "795M and 2B"
    assert Trial("free", ("1", "2", "3", "4"), np.zeros(1), None).named == "the 4 sizes from 1"


# -- what must not be said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [lambda r: 3.0, lambda r: 6 - r.loss], ids=["constant", "rising"])
def test_a_loss_that_does_not_fall_has_no_law(column, tmp_path, capsys):
    """An accuracy, say, instead of the loss: neither a law, nor an optimum, nor a multiplier."""
    table = study(CHINCHILLA, Design((3e7, 1e8, 3e8), (10, 20, 40), 2), 1.1, 0.001, np.random.default_rng(0))
    Table([replace(r, loss=column(r)) for r in table.runs]).write(tmp_path / "runs.csv")
    for words_ in (["fit"], ["compare"]):
        more = ["a", "b"] if words_ == ["compare"] else []
        assert cli.main(["study", *words_, str(tmp_path / "runs.csv"), *more, "--bootstraps", "20"]) == 2
        error = capsys.readouterr().err
        assert "the loss falls neither with parameters nor with tokens" in error and error.count("\n") == 1


def test_a_budget_below_all_runs_is_extrapolated_too():
    found = fit(ladder(CHINCHILLA, FIVE, 0.0005, np.random.default_rng(0)), bootstraps=20)
    smallest, largest = 6 * 5e7 * 2.5e8, 6 * 2e9 * 1.6e11
    assert words.optimum(found, smallest / 10).endswith("(0.1 x the smallest run: extrapolated)")
    assert words.optimum(found, largest * 10).endswith("(10 x the largest run: extrapolated)")
    assert "extrapolated" not in words.optimum(found, 1e19)


def test_a_diverged_run_is_an_outlier_and_no_failure_of_the_law():
    table = ladder(CHINCHILLA, Design(tuple(np.geomspace(1e7, 5e9, 8)), (5, 20, 80), 1), 0.002,
                   np.random.default_rng(1))  # fmt: skip
    wrecked = Table([replace(r, loss=r.loss + (0.3 if i == 9 else 0)) for i, r in enumerate(table.runs)])
    facts = dict(words.of_fit(fit(wrecked, bootstraps=20), []))
    assert facts["outliers"].startswith("1 beyond 5") and "the law fails" not in facts


def test_p_is_the_same_whoever_is_the_baseline():
    """1 - a tail is 0 below 1e-16."""
    table = study(CHINCHILLA, Design(tuple(np.geomspace(3e7, 1e9, 5)), (5, 10, 20, 40), 2), 1.1, 0.001,
                  np.random.default_rng(0))  # fmt: skip
    one, other = (compare(table, *names, cluster="pair", draws=50) for names in (("a", "b"), ("b", "a")))
    assert 0 < one.p < 1e-20 and np.log(other.p) == pytest.approx(np.log(one.p), rel=0.05)
    assert effects.p_of_none(np.zeros(3), np.ones(3), 5) == 1.0


def test_a_trend_makes_no_outliers():
    """A pair far from the typical one because the multiplier changes with size has not diverged; one at 0.3 nat has."""
    law = (1.8, 0.35 * 1e9**0.4, 0.4, 0.5 * 2e10**0.3, 0.3)
    design = Design((1e7, 4e7, 1.6e8, 6.4e8, 2.5e9), (3, 10, 30, 100), 1)
    named = 0
    for seed in (2, 3, 5, 6):
        table = study(law, design, 1.1, 0.002, np.random.default_rng(seed), tilt=0.03)
        found = compare(table, "a", "b", draws=20)
        assert "size" in found.changes_with
        named += len(found.outliers)
    (cell,) = [r for r in table.runs if (r.activation, r.params, r.tokens) == ("b", 1.6e8, 1.6e10)]
    wrecked = Table([replace(r, loss=r.loss + 0.3) if r is cell else r for r in table.runs])
    assert cell.loss + 0.3 in [b.loss for _, b in compare(wrecked, "a", "b", draws=20).outliers]
    assert named <= 1


def test_noise_that_grows_with_the_loss_makes_no_difference_out_of_nothing():
    """Where sd is 0.4 % of L - E the smallest models are the noisiest, and theirs are the largest weights: pooled
    scatter found a difference in a quarter of such studies, of which there was none.
    """
    law = (1.8, 0.35 * 1e9**0.4, 0.4, 0.5 * 2e10**0.3, 0.3)
    design, rng, found = Design((1e7, 4e7, 1.6e8, 6.4e8, 2.5e9), (3, 10, 30, 100), 2), np.random.default_rng(0), 0
    for _ in range(40):
        table = study(law, design, 1.0, 0.0, rng)
        noisy = Table([replace(r, loss=r.loss + 0.004 * (r.loss - 1.8) * rng.normal()) for r in table.runs])
        found += compare(noisy, "a", "b", cluster="pair", draws=15, workers=1).p < 0.05
    assert found <= 6


def test_errors_of_a_mean_are_those_of_its_definition():
    """HC2 and the degrees of freedom of Bell and McCaffrey by their matrices, for weights that are far from equal."""
    rng = np.random.default_rng(0)
    weight, x = rng.uniform(0.1, 5, (1, 7)) ** 2, rng.normal(size=(1, 7))
    mean, error, freedom = effects.Effects(x, weight, np.ones(1)).mean()
    share = weight[0] / weight.sum()
    hat = np.outer(np.ones(7), share)
    residual = x[0] - hat @ x[0]
    maker = np.diag(share / np.sqrt(1 - np.diag(hat))) @ (np.eye(7) - hat)
    spread = maker @ np.diag(1 / weight[0]) @ maker.T
    assert mean[0] == pytest.approx(share @ x[0])
    assert error[0] ** 2 == pytest.approx((share**2 * residual**2 / (1 - np.diag(hat))).sum())
    assert freedom[0] == pytest.approx(np.trace(spread) ** 2 / (spread**2).sum())
    *_, equal = effects.Effects(x, np.ones((1, 7)), np.ones(1)).mean()
    assert equal[0] == pytest.approx(6)
