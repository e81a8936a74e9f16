"""The report folder: whole, the same twice, linked, and its numbers those of the functions."""

import csv
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from planted import CHINCHILLA, Design, ladder, study

from megatron_xact import cli
from megatron_xact.studies import compare as comparing
from megatron_xact.studies import comparison_plots, figures, law_plots, report, words
from megatron_xact.studies.effects import Estimate
from megatron_xact.studies.fit import fit
from megatron_xact.studies.reading import read
from megatron_xact.studies.table import Run, Table

ROOT = Path(__file__).parents[2]
FOUR = Design((3e7, 6e7, 1.2e8, 2.4e8), (5, 20, 120), 1)


class Page(HTMLParser):
    """Links and pictures of a page, and whether every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.pictures, self.open, self.ids, self.scripts = [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "a":
            self.links.append(attrs["href"])
        if tag == "img":
            self.pictures.append(attrs["src"])
            assert attrs["alt"]
        self.scripts += tag in ("script", "link", "iframe")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def run_folder(path: Path) -> None:
    """As pretraining leaves it, with a step that a resumed run repeated and half a last line."""
    path.mkdir(parents=True)
    progress = [{"step": s, "loss": 6 - 0.01 * s, "tokens": 1000 * s} for s in (10, 20, 20, 30)]
    alphas = [{"step": s, "alphas": {"1": {"alpha_p": 0.8 + s / 100}, "2": {"alpha_p": 0.8}}} for s in (0, 10, 20)]
    for name, records in (("progress.jsonl", progress), ("alphas.jsonl", alphas)):
        (path / name).write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 4')


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with runs.csv, a run folder, and the report of it, twice."""
    root = tmp_path_factory.mktemp("study")
    table = study(CHINCHILLA, FOUR, 1.08, 0.001, np.random.default_rng(0), step_time=1.03)
    runs = []
    for r in table.runs:
        more = {"activation": {"a": "swiglu", "b": "xielu"}[r.activation]}
        if more["activation"] == "xielu":
            more["alphas"] = json.dumps({"alpha_p": [0.7, 0.9], "alpha_n": [0.8, 0.8]}) if r.params < 2e8 else ""
            more["run"] = "runs/big" if r.params > 2e8 and r.tokens == max(s.tokens for s in table.runs) else ""
        runs.append(Run(**r.__dict__ | more))
    Table(runs).write(root / "runs.csv")
    run_folder(root / "runs/big")
    for out in ("report", "second"):
        words = ["study", "report", str(root / "runs.csv"), "--out", str(root / out), "--bootstraps", "60"]
        assert cli.main([*words, "--workers", "1" if out == "report" else "3"]) == 0
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_table_gives_the_same_bytes(made):
    first, second = contents(made / "report"), contents(made / "second")
    assert len(first) > 15 and first == second
    assert sorted(p.name for p in made.iterdir()) == ["report", "runs", "runs.csv", "second"]  # nothing left over


def test_it_can_be_made_again_from_its_own_table(made, capsys):
    own = made / "report/runs.csv"
    words = ["study", "report", str(own), "--out", str(made / "report"), "--bootstraps", "60"]
    before = contents(made / "report")
    assert cli.main(words) == 0
    assert contents(made / "report") == before
    assert "swiglu needs 1.0" in capsys.readouterr().out


def test_the_page_is_closed_linked_and_alone(made):
    text = (made / "report/index.html").read_text()
    page = Page(text)
    assert page.open == [] and page.scripts == 0 and "http" not in text.replace("http-equiv", "")
    for target in page.links + page.pictures:
        if target.startswith("#"):
            assert target[1:] in page.ids
        else:
            assert (made / "report" / target).is_file(), target
    there = {p.name for p in (made / "report/plots").iterdir()}
    assert {Path(p).name for p in page.pictures} == there  # every picture is shown
    assert there >= {"losses.png", "multipliers.png", "pairs.png", "residuals.png", "profile_of_E.png", "isoflop.png",
                     "held_out_swiglu.png", "held_out_xielu.png", "training_curves.png", "alphas_over_depth.png",
                     "alphas_over_time_xielu.png", "shapes.png"}  # fmt: skip


def test_the_multiplier_is_defined_where_it_is_met(made, capsys):
    """As tests plant it, see planted.loss."""
    with pytest.raises(SystemExit):
        cli.main(["study", "compare", "--help"])
    page = (made / "report/index.html").read_text()
    for text in (page, capsys.readouterr().out, (ROOT / "README.md").read_text()):
        assert "L_baseline(m^a N, m^(1-a) D), with a = beta / (alpha + beta) of the law" in " ".join(text.split())
    assert page.index("L_baseline(") < page.index('id="compare-xielu"')
    assert "xielu against swiglu: swiglu needs 1.0" in page


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The axes of everything that is drawn."""
    kept, figure = [], figures.figure

    @contextmanager
    def keeping(*args, **words):
        with figure(*args, **words) as axes:
            kept.extend(axes.flat)
            yield axes

    monkeypatch.setattr(figures, "figure", keeping)
    return kept


@pytest.mark.parametrize("sizes", [(2e7, 6e7, 2e8, 7e8), (3e5, 5e5, 1.2e6)], ids=["4 decades of FLOPs", "2 decades"])
def test_nothing_lies_on_anything_else(drawn, sizes, tmp_path):
    """Labels of a logarithmic axis on each other, the legend on points or the line."""
    table = study(CHINCHILLA, Design(sizes, (5, 10, 40), 1), 1.08, 0.001, np.random.default_rng(0))
    law_plots.losses(table, {}, tmp_path / "losses.png")
    for ax in drawn:
        FigureCanvasAgg(ax.figure).draw()
        low, high = ax.get_xlim()
        labels = [t.label1.get_window_extent() for t in ax.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
        assert len(labels) >= 3
        assert all(a.x1 < b.x0 for a, b in zip(labels, labels[1:], strict=False))
    comparison_plots.pairs([comparing.compare(table, "a", "b", draws=9)], tmp_path / "pairs.png")
    FigureCanvasAgg(drawn[-1].figure).draw()
    assert drawn[-1].get_legend().get_window_extent().x0 > drawn[-1].get_window_extent().x1


def test_where_nothing_tells_how_well_E_is_determined_there_is_no_picture_of_it(tmp_path):
    three = ladder(CHINCHILLA, Design((3e7, 1e8, 1e9), (5, 20, 80), 1), 0.002, np.random.default_rng(0), 0.004)
    for table, drawn in ((three, False), (Table([replace(r, trunk="") for r in three.runs]), True)):
        report.write(report.find(table, None, [1e21], bootstraps=9), tmp_path / "out", tmp_path)
        assert (tmp_path / "out/plots/profile_of_E.png").exists() == drawn
        assert ("profile_of_E.png" in (tmp_path / "out/index.html").read_text()) == drawn


def test_one_huge_interval_hides_none_of_the_others(drawn, tmp_path):
    found = comparing.compare(study(CHINCHILLA, FOUR, 1.08, 0.001, np.random.default_rng(0)), "a", "b", draws=9)
    huge = replace(found, other="c", multiplier=Estimate(1.1, 1e-4, 1e5), by_size={"1B": Estimate(1.2, np.nan, np.nan)})
    comparison_plots.multipliers([found, huge], tmp_path / "multipliers.png")
    (ax,) = drawn
    low, high = ax.get_xlim()
    assert ax.get_xscale() == "log" and 0.9 < low < found.multiplier.low < found.multiplier.high < high < 1.5
    assert low < 1.2 < high and {line.get_marker() for line in ax.lines} >= {"<", ">"}
    assert ax.get_title() == "95% intervals; an arrow: beyond this axis; no line: one cluster each, interval unknown"
    FigureCanvasAgg(ax.figure).draw()
    assert sum(low <= t <= high for t in ax.get_xticks()) >= 3
    endless = replace(found, by_size={f"{n}B": Estimate(1.2, 0, math.inf) for n in range(3)})
    comparison_plots.multipliers([endless], tmp_path / "multipliers.png")
    low, high = drawn[-1].get_xlim()
    assert 0.9 < low < found.multiplier.low < found.multiplier.high < high < 1.5


@pytest.mark.filterwarnings("error")
def test_noise_alone_is_told_and_drawn(drawn, tmp_path):
    """Its intervals end nowhere, of the multiplier, of a size or of a slope."""
    ends = set()
    design = Design((3e7, 1e8, 3e8), (5, 10, 20), 1)
    for seed in range(6):
        noise = study(CHINCHILLA, design, 1.0, 0.5, np.random.default_rng(seed))
        try:
            found = comparing.compare(noise, "a", "b", draws=50)
        except ValueError:  # no law falls where these losses do not
            continue
        told = words.of_comparison(found, 1.0)
        comparison_plots.multipliers([found], tmp_path / "multipliers.png")
        low, high = drawn[-1].get_xlim()
        assert 0 < low <= 1 <= high < math.inf and not any("nan" in value for _, value in told)
        ends |= {end for e in (found.multiplier, *found.by_size.values()) for end in (e.low, e.high)}
    assert {0.0, math.inf} <= ends


def test_colours_have_a_legend_and_exact_parabolas_say_so(drawn, tmp_path):
    table = study(CHINCHILLA, Design((3e7, 6e7, 1.2e8), (5, 20, 120), 2), 1.0, 0.001, np.random.default_rng(0))
    fits = {"a": fit(table.only("a"), bootstraps=9)}
    law_plots.residuals(fits, tmp_path / "residuals.png")
    texts = [t.get_text() for ax in drawn if ax.get_legend() for t in ax.get_legend().get_texts()]
    assert texts == ["3e+07", "6e+07", "1.2e+08", "2 sd between seeds"]
    law_plots.isoflops(fits, tmp_path / "isoflop.png")
    texts = [t.get_text() for t in drawn[-1].get_legend().get_texts()]
    assert texts and all(t.endswith(", exact") for t in texts)


def test_numbers_are_those_of_the_functions(made):
    results = json.loads((made / "report/results.json").read_text())
    found = comparing.compare(read(made / "runs.csv"), "swiglu", "xielu", draws=60)
    (told,) = results["comparisons"]
    assert told["multiplier"]["value"] == pytest.approx(found.multiplier.value, rel=1e-5)
    assert told["multiplier"]["low"] == pytest.approx(found.multiplier.low, rel=1e-5)
    assert found.multiplier.holds(1.08)
    rows = list(csv.DictReader(open(made / "report/tables/multipliers.csv")))
    assert float(next(r for r in rows if r["what"] == "compute")["value"]) == told["multiplier"]["value"]
    assert {r["what"] for r in rows} >= {"wall clock", "step time", "compute at 3e+07"}
    assert f"{found.multiplier.value:.3f}" in (made / "report/index.html").read_text()
    assert len(list(csv.DictReader(open(made / "report/tables/residuals.csv")))) == 24


def test_a_folder_that_is_no_report_is_left_alone(made, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    words = ["study", "report", str(made / "runs.csv"), "--out", str(tmp_path / "mine"), "--bootstraps", "20"]
    assert cli.main(words) == 2
    assert "is not a report" in capsys.readouterr().err
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"


def test_activations_of_others_may_have_learned_values(made, tmp_path):
    """Their functions are not known here: they are in the picture over depth, not in that of shapes."""
    other = [replace(r, activation="theirs") if r.activation == "xielu" else r for r in read(made / "runs.csv").runs]
    Table([replace(r, run="") for r in other]).write(tmp_path / "runs.csv")
    words = ["study", "report", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out"), "--bootstraps", "9"]
    assert cli.main(words) == 0
    there = {p.name for p in (tmp_path / "out/plots").iterdir()}
    assert "alphas_over_depth.png" in there and "shapes.png" not in there


@pytest.mark.parametrize(
    "alphas, record, said",
    [
        ('{"alpha_p": 3}', "", "a value per layer"),
        ('{"alpha_p": []}', "", "a value per layer"),
        ('{"alpha_p": [1, 2], "alpha_n": [1]}', "", "a value per layer"),
        ('{"alpha_p": [-5, 1]}', "", "xielu: alpha_p = -5.0 must be greater than 0.0"),
        (
            "",
            '{"step": 1, "tokens": 5}',
            "big: progress.jsonl or alphas.jsonl is not what pretraining writes: KeyError",
        ),
        ("", "[1]", "big: progress.jsonl or alphas.jsonl is not what pretraining writes"),
    ],
)
def test_broken_values_of_runs_are_named_and_no_report_is_begun(made, tmp_path, capsys, alphas, record, said):
    (tmp_path / "runs/big").mkdir(parents=True)
    (tmp_path / "runs/big/progress.jsonl").write_text(record + "\n" if record else "")
    runs = [replace(r, alphas=alphas if r.alphas else "") for r in read(made / "runs.csv").runs]
    Table(runs).write(tmp_path / "runs.csv")
    words = ["study", "report", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out"), "--bootstraps", "5"]
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_said_on_the_page(made, tmp_path, capsys):
    """A third activation with too few runs: its law and comparison are refused, the rest is there."""
    table = read(made / "runs.csv")
    few = [Run(**r.__dict__ | {"activation": "relu2"}) for r in table.only("swiglu").runs[:2]]
    Table([*table.runs, *few]).write(tmp_path / "runs.csv")
    words = ["study", "report", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out"), "--bootstraps", "20"]
    assert cli.main(words) == 0
    assert "not done: law of relu2: runs.csv, relu2: 2 runs are too few" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results["fits"]) == {"swiglu", "xielu"} and "law of relu2" in results["not_done"]
    assert "What could not be done" in (tmp_path / "out/index.html").read_text()
