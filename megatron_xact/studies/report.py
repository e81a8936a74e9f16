"""`xact study report`: from a table to a folder with one page, its pictures, and every number as CSV and JSON.

    index.html          the page; links are relative, nothing is loaded from elsewhere
    results.json        every fit and comparison
    runs.csv            the table it was made from: `xact study report runs.csv` makes the folder again
    tables/*.csv        parameters, residuals, multipliers, pairs, profile of E, IsoFLOP
    plots/*.png

The folder appears whole: it is written beside and renamed. The same table gives the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_xact.studies import compare as comparing
from megatron_xact.studies import comparison_plots, curves, isoflop, law_plots, numbers, run_plots, words
from megatron_xact.studies.bars import bar
from megatron_xact.studies.compare import Comparison
from megatron_xact.studies.fit import Fit, fit
from megatron_xact.studies.law import MULTIPLIER
from megatron_xact.studies.outside import Values
from megatron_xact.studies.page import Section, page
from megatron_xact.studies.table import Run, Table, csv_text, describe, format_count
from megatron_xact.whole import partial, write_text


@dataclass(frozen=True)
class Findings:
    """Of a whole table. `refused`: subject -> why there is no fit or comparison."""

    table: Table
    baseline: str | None
    fits: dict[str, Fit]
    comparisons: list[tuple[Comparison, float]]  # with the multiplier under a tied law
    refused: dict[str, str]
    flops: list[float]


def find(table: Table, baseline: str | None, flops: list[float], *, bootstraps: int = 1000, seed: int = 0,
         workers: int | None = None) -> Findings:  # fmt: skip
    """Fit every activation and compare every other one with the baseline; what cannot be done is said, not fatal."""
    names = table.activations
    if baseline is None and len(names) > 1:
        if "swiglu" not in names:
            raise ValueError(f"{table.name} has {', '.join(names)}; say which one is the baseline: --baseline NAME")
        baseline = "swiglu"
    if baseline is not None:
        table.only(baseline)
    fits, compared, refused = {}, [], {}
    for name in bar(names, "fits"):
        try:
            fits[name] = fit(table.only(name), bootstraps=bootstraps, seed=seed, workers=workers)
        except ValueError as error:
            refused[f"law of {name}"] = str(error)
    for name in bar([n for n in names if n != baseline], "comparisons") if baseline else []:
        try:
            found = comparing.compare(table, baseline, name, draws=bootstraps, seed=seed, workers=workers)
            compared.append((found, comparing.tied_multiplier(table, baseline, name)))
        except ValueError as error:
            refused[f"{name} against {baseline}"] = str(error)
    if not fits and not compared:
        (_, why), *others = refused.items()  # often one complaint about each
        more = f"; not done either: {', '.join(subject for subject, _ in others)}" if others else ""
        raise ValueError(why + more)
    return Findings(table, baseline, fits, compared, refused, flops)


def write(found: Findings, out: Path, root: Path, values_of: Values | None = None) -> None:
    """The folder `out`, replacing a report that is there. root: where the table's run folders start from.

    values_of: an activation; where None, learned functions are not drawn.
    """
    if out.exists() and not (out / "results.json").exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not a report; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = partial(out)
    try:
        tables = _write_numbers(found, fresh, root, out)
        pictures = _draw(found, fresh, root, values_of)
        write_text(fresh / "index.html", page(*_contents(found, pictures), tables))
        if out.exists():
            old = out.with_name(f".{out.name}.old")
            shutil.rmtree(old, ignore_errors=True)  # of a process that was killed just here
            os.replace(out, old)
            os.replace(fresh, out)
            shutil.rmtree(old)
        else:
            os.replace(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_numbers(found: Findings, folder: Path, root: Path, out: Path) -> list[tuple[str, str]]:
    """The CSV and JSON files; returns their paths and what they are."""
    moved = [replace(r, run=os.path.relpath(root / r.run, out) if r.run else "") for r in found.table.runs]
    write_text(folder / "runs.csv", Table(moved, found.table.name).csv())
    results = {
        "baseline": found.baseline,
        "fits": {name: numbers.of_fit(f, found.flops) for name, f in found.fits.items()},
        "comparisons": [numbers.of_comparison(c, tied) for c, tied in found.comparisons],
        "not_done": found.refused,
    }
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    compared = [c for c, _ in found.comparisons]
    tables = {
        "parameters": (numbers.parameter_rows(found.fits), "parameters of every law with 95 % intervals"),
        "residuals": (numbers.residual_rows(found.fits), "measured and predicted loss of every run"),
        "profile_of_E": (numbers.profile_rows(found.fits), "least objective for each E"),
        "isoflop": (numbers.isoflop_rows(found.fits), "points and minima of the parabolas"),
        "multipliers": (numbers.multiplier_rows(compared), "compute and wall-clock multipliers, overall and by size"),
        "pairs": (numbers.pair_rows(compared), "paired losses"),
    }
    listed = [("results.json", "every number of this page"), ("runs.csv", "the runs it was made from")]
    for name, (rows, what) in tables.items():
        if len(rows) > 1:
            write_text(folder / f"tables/{name}.csv", csv_text(rows))
            listed.append((f"tables/{name}.csv", what))
    return listed


def _draw(found: Findings, folder: Path, root: Path, values_of: Values | None) -> dict[str, str]:
    """The pictures there are, by name -> path within the folder."""
    at = folder / "plots"
    law_plots.losses(found.table, found.fits, at / "losses.png")
    for name, f in found.fits.items():
        if f.trials:
            law_plots.held_out(f, at / f"held_out_{_file(name)}.png")
    if found.fits:
        law_plots.residuals(found.fits, at / "residuals.png")
        if any(not f.draws[-1].noise.why_unknown for f in found.fits.values()):
            law_plots.profiles(found.fits, at / "profile_of_E.png")
        if any(isoflop.parabolas(f.table) for f in found.fits.values()):
            law_plots.isoflops(found.fits, at / "isoflop.png")
    if compared := [c for c, _ in found.comparisons]:
        comparison_plots.multipliers(compared, at / "multipliers.png")
        comparison_plots.pairs(compared, at / "pairs.png")
    _draw_run_folders(found.table, at, root, values_of)
    return {path.stem: f"plots/{path.name}" for path in sorted(at.glob("*.png"))}


def _draw_run_folders(table: Table, at: Path, root: Path, values_of: Values | None) -> None:
    recorded = [(r, c) for r in table.runs if (c := curves.read(r, root))]
    if any(len(c.tokens) for _, c in recorded):
        run_plots.training_curves([(r, c) for r, c in recorded if len(c.tokens)], at / "training_curves.png")
    learned = [(r, values) for r in table.runs if (values := curves.final_alphas(r, root))]
    if not learned:
        return
    run_plots.alphas_over_depth(learned, at / "alphas_over_depth.png")
    longest: dict[str, tuple[Run, dict]] = {}  # of each activation the largest model, trained longest
    for r, values in sorted(learned, key=lambda pair: (pair[0].params, pair[0].tokens, -pair[0].seed)):
        longest[r.activation] = (r, values)
    for r, _ in longest.values():
        if (c := curves.read(r, root)) and c.alphas:
            run_plots.alphas_over_time(r, c, at / f"alphas_over_time_{_file(r.activation)}.png")
    if values_of is not None and (known := [name for name in sorted(longest) if _is_known(name, values_of)]):
        run_plots.shapes([longest[name] for name in known], values_of, at / "shapes.png")


def _is_known(activation: str, values_of: Values) -> bool:
    """Tables of others may have activations that are not here."""
    try:
        values_of(activation, {}, np.zeros(1))
    except ValueError:
        return False
    return True


def _file(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


# -- the page ---------------------------------------------------------------------------------------------------------


def _contents(found: Findings, pictures: dict[str, str]) -> tuple[str, str, list[Section]]:
    table = found.table
    title = "Scaling study"
    if found.baseline and len(table.activations) > 1:
        title += f": {', '.join(n for n in table.activations if n != found.baseline)} against {found.baseline}"
    lead = describe(table) + "."
    if counted := {r.params_count for r in table.runs} - {""}:
        lead += f" N counts parameters {', '.join(counted)}."
    elif table.runs:
        lead += " The table does not say which parameters N counts."
    return title, lead, [s for s in (*_comparisons(found, pictures), *_laws(found, pictures), _learned(pictures),
                                     _refused(found), METHOD) if s]  # fmt: skip


def _comparisons(found: Findings, pictures: dict[str, str]) -> list[Section]:
    if not found.comparisons:
        return []
    answers = [f"{c.other} against {c.baseline}: {words.answer(c)}." for c, _ in found.comparisons]
    shown = [
        ("multipliers", "Compute multipliers with their intervals, overall, at each size, and at each number of tokens "
                        "per parameter where it matters. At 1 (dashed) there is no difference."),
        ("pairs", "Loss of the other activation minus the baseline's, pair by pair, in thousandths of a nat."),
    ]  # fmt: skip
    head = Section(
        "What the activations are worth",
        "worth",
        answers=answers,
        text=[f"{MULTIPLIER}."],
        pictures=_shown(shown, pictures),
    )
    return [head, *(
        Section(f"{c.other} against {c.baseline}", f"compare-{_file(c.other)}", level=3,
                facts=words.of_comparison(c, tied)[1:]) for c, tied in found.comparisons
    )]  # fmt: skip


def _laws(found: Findings, pictures: dict[str, str]) -> list[Section]:
    shown = [
        ("losses", "Every run, with its activation's law."),
        *((f"held_out_{_file(a)}", f"{a}: laws fitted without the largest sizes (hollow points), extended to them. "
                                    "Bars: 95 % prediction intervals of these runs.")
          for a in found.fits),
        ("residuals", "What the law leaves over. Trends here are misfit of the law, not noise."),
        ("profile_of_E", "The objective's minimum for each irreducible loss E: where it is flat, E is not determined. "
                         "The limit is that of independent runs."),
        ("isoflop", "IsoFLOP parabolas through losses at equal compute, interpolated where no three sizes were trained "
                    "with it; a diagnostic, biased by the width of the grid. Stars: minima inside the sizes. Through "
                    "three points the fit is exact, and says nothing about whether a parabola is right."),
    ]  # fmt: skip
    head = Section("Laws", "laws", pictures=_shown(shown, pictures))
    if found.fits and "isoflop" not in pictures:
        head.text.append("No IsoFLOP parabolas: there is no compute that three sizes cover with their token budgets.")
    if found.fits:
        head.table = [["activation", "form", "E", "A", "B", "alpha", "beta", "a_opt"]]
        for name, f in found.fits.items():
            cells = [words.quantity(f, q) for q in ("E", "A", "B", "alpha", "beta", "a_opt")]
            head.table.append([name, f.form, *cells])
    return [head, *(
        Section(f"Law of {name}", f"law-{_file(name)}", level=3, facts=words.of_fit(f, found.flops))
        for name, f in found.fits.items()
    )]  # fmt: skip


def _learned(pictures: dict[str, str]) -> Section | None:
    over_time = [(name, "Learned parameters over training, by layer: the largest model, trained longest.")
                 for name in pictures if name.startswith("alphas_over_time")]  # fmt: skip
    shown = [
        ("training_curves", "Training loss of every run whose folder is there."),
        ("alphas_over_depth", "Learned activation parameters at the end of training over relative depth."),
        *over_time,
        ("shapes", "Learned functions of the largest model by layer, and the function they started as (dashed)."),
    ]
    shown = _shown(shown, pictures)
    return Section("What was learned", "learned", pictures=shown) if shown else None


def _shown(wanted: list[tuple[str, str]], pictures: dict[str, str]) -> list[tuple[str, str]]:
    return [(pictures[name], caption) for name, caption in wanted if name in pictures]


def _refused(found: Findings) -> Section | None:
    return Section("What could not be done", "refused", facts=list(found.refused.items())) if found.refused else None


METHOD = Section(
    "Method",
    "method",
    text=[
        "Law: L = E + A N^-alpha + B D^-beta with D in training tokens and compute 6 N D, fitted to ln L by the sum of "
        "Huber losses (delta 0.001), from starts by variable projection. Of the free and the tied form (alpha = beta) "
        "the one is shown that predicts the largest sizes better from the smaller ones; where none can be held out, "
        "the tied one, unless it misses the runs by more than their seeds differ and the free one does not. Intervals: "
        "95 % of a bootstrap that draws losses about the law with the scatter that the runs show, between runs and "
        "between the trunks that they branched from, and of one that draws the runs again where no trunks are shared: "
        "from the least to the greatest end, over both forms where the tied one was only assumed. In simulated studies "
        "they held what was planted in 92 % or more (of 200 to 400 of each of 10 designs), up to 100 % where noise "
        "shrinks with tokens. They know nothing of a law that is wrong: see the residuals.",
        "Multiplier: runs are paired by size, token budget and seed. The interval joins the scatter of the pairs "
        "(trunks, where runs branch from one, count as one; Student's t with an error that does not assume the same "
        "noise everywhere, and as many degrees of freedom as its weights leave) with the uncertainty of what a nat is "
        "worth (a law with free exponents, or with one for both where these runs cannot tell them apart, refitted to "
        "resampled residuals). Whether it changes with size is tested by regression over these clusters, whether it "
        "changes with tokens per parameter by the slopes inside each size and seed; where one is found (p < 0.05), no "
        "single number is given as the answer. It is valid inside the measured range of sizes "
        "and tokens; it says nothing about learning rates that were not tried.",
    ],
)


def default_budget(table: Table) -> list[float]:
    """Ten times the compute of the largest run, to one digit."""
    most = float((6 * table.array("params") * table.array("tokens")).max())
    return [float(f"{10 * most:.0e}")]


def summary(found: Findings, out: Path) -> str:
    sizes = [format_count(v) for v in (found.table.array("params").min(), found.table.array("params").max())]
    lines = [f"{len(found.table)} runs, {sizes[0]}..{sizes[1]} parameters, {', '.join(found.table.activations)}"]
    lines += [f"{c.other}: {words.answer(c)}" for c, _ in found.comparisons]
    lines += [f"not done: {subject}: {why}" for subject, why in found.refused.items()]
    return "\n".join([*lines, f"wrote {out / 'index.html'}"])
