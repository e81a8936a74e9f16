"""`xact study`: the arguments and their help. Light on purpose; the work is imported when it is asked for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_xact.argument_types import positive
from megatron_xact.studies import commands
from megatron_xact.studies.outside import Outside

EPILOG = """\
examples:
  plan a ladder of runs, train it, and make its table
    xact study plan configs/studies/tiny.toml
    xact study run runs/tiny --jobs 2
    xact study collect runs/tiny --out runs/tiny/runs.csv
  does a config train as well in FP8 as in BF16?
    xact study fp8-gate my_fp8.toml --out runs/gate
  one table out of foreign ones: say which column is what, in which unit, and which rows count
    xact study collect wandb.csv --columns params=n_params tokens=tokens_b*1e9 loss=val_loss \\
        --constant tokenizer=mine --where State=finished --out runs.csv
  the law of each activation, and what it says about 1e21 FLOPs
    xact study fit runs.csv --budget 1e21
  is xielu worth anything against swiglu?
    xact study compare runs.csv swiglu xielu
  a folder with a page, plots and every number
    xact study report runs.csv --out study

Columns of a table: xact study collect --help."""


@dataclass(frozen=True)
class Subcommand:
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    main: Callable[[argparse.Namespace, Outside | None], int | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the subcommands of `xact study`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    subparsers = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    for name, step in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=step.help, description=step.help, allow_abbrev=False)
        step.add_arguments(subparser)


def main(args: argparse.Namespace, outside: Outside | None = None) -> int | None:
    """The exit code, None for 0. outside: needed by `plan`; without it a report has no picture of activations."""
    return SUBCOMMANDS[args.step].main(args, outside)


# -- collect ----------------------------------------------------------------------------------------------------------


def _reading_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tables that are not ours")
    group.add_argument("--mapping", type=Path, metavar="FILE", help="TOML with [columns] and [where]; see collect")
    several = {"nargs": "+", "action": "extend", "default": []}
    group.add_argument("--columns", **several, metavar="NAME=COLUMN",
                       help="column of the file for ours; COLUMN*1e9 changes units")  # fmt: skip
    group.add_argument("--constant", **several, metavar="NAME=VALUE", help="one value for every run")
    group.add_argument("--where", **several, metavar="COLUMN=VALUE",
                       help="only these rows of the file; COLUMN!=VALUE: all but these")  # fmt: skip


MAPPING = """\
a mapping in TOML:
  [columns]
  loss = "c4_en"
  tokens = {column = "tokens_b", scale = 1e9}
  params = {column = "size", values = {190M = 190354176, 370M = 371262464}}
  seed = {column = "run", pattern = "seed(\\\\d+)"}     # without a group: 1 where it matches, else 0
  activation = {constant = "swiglu"}
  [where]
  State = "finished"
"""


def _collect_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_xact.studies.table import COLUMNS

    width = max(map(len, COLUMNS))
    told = "\n".join(
        f"  {name:{width}}  {c.metadata['about']}{' (required)' if c.metadata['required'] else ''}"
        for name, c in COLUMNS.items()
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"columns of a table:\n{told}\n\n{MAPPING}"
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE",
                        help="folders of studies, or tables: CSV files, e.g. exports of W&B")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="CSV", help="the table to write")
    _reading_arguments(parser)


def _collect(args: argparse.Namespace, outside: Outside | None) -> None:
    from megatron_xact.studies.table import Table, describe

    folders = [path for path in args.sources if path.is_dir()]
    if folders:
        from megatron_xact.studies import collecting

        table, told = collecting.table_of(folders, args.out.parent)
        if len(folders) < len(args.sources):
            files = [path for path in args.sources if path not in folders]
            table = Table(table.runs + _read(args, files, args.out.parent).runs, f"{len(args.sources)} sources")
        print("\n".join(told))
    else:
        table = _read(args, args.sources, args.out.parent)
    table.write(args.out)
    print(f"{describe(table)}; {', '.join(table.activations)}\nwrote {args.out}")


def _read(args: argparse.Namespace, paths: Path | list[Path], folder: Path | None = None):
    from megatron_xact.studies.reading import Mapping, read

    return read(paths, Mapping.of(args.mapping, args.columns, args.constant, args.where), folder)


# -- fit --------------------------------------------------------------------------------------------------------------


def _table_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, metavar="TABLE", help="CSV with a row per run; see collect")
    _reading_arguments(parser)


def _random_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bootstraps", type=positive(int), default=1000, metavar="N",
                        help="of every interval (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstraps (default: 0)")
    parser.add_argument("--workers", type=positive(int), metavar="N", help="threads; results do not depend on it")


def _budget_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=float, nargs="+", default=[], metavar="FLOPS",
                        help="compute-optimal N and D for these (default: ten times the largest run)")  # fmt: skip


INTERVALS = """\
a_opt = beta / (alpha + beta): the compute-optimal N grows as compute^a_opt. gamma = alpha beta / (alpha + beta): along
that frontier L - E falls as compute^-gamma, compute being 6 N D.

Intervals are of 95 %, from losses drawn about the law with the scatter that the runs show, between runs and between
trunks (column trunk), and from runs drawn again; they hold the free form's too where equal exponents are only assumed.
In simulated studies of 18 to 48 runs, or of 6 to 12 trunks, they held planted values in 92 % or more. What the runs do
not determine is told so. "without SIZE" tells how well the other sizes predict it, and whether its runs lie in their
95 % prediction intervals."""


def _fit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, INTERVALS
    _table_arguments(parser)
    parser.add_argument("--activation", nargs="+", default=[], metavar="NAME", help="default: each of the table")
    parser.add_argument("--form", choices=["auto", "free", "tied"], default="auto",
                        help="of the exponents; auto: what predicts the largest sizes better")  # fmt: skip
    parser.add_argument("--hold-out", type=positive(int), metavar="SIZES",
                        help="how many sizes that is (default: a third)")  # fmt: skip
    _budget_argument(parser)
    _random_arguments(parser)
    parser.add_argument("--check", action="store_true", help="also the classical grid of 4500 starts; about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")


def _fit(args: argparse.Namespace, outside: Outside | None) -> None:
    from megatron_xact.studies import numbers, report, words
    from megatron_xact.studies.fit import classical_check, fit
    from megatron_xact.whole import write_text

    table = _read(args, args.table)
    flops = _budgets(args, report.default_budget(table))
    results = {}
    for name in args.activation or table.activations:
        found = fit(table.only(name), form=args.form, hold_out=args.hold_out, bootstraps=args.bootstraps,
                    seed=args.seed, workers=args.workers)  # fmt: skip
        print(words.lines(name, words.of_fit(found, flops)))
        results[name] = numbers.of_fit(found, flops)
        if args.check:
            least, share, count = classical_check(found)
            agrees = abs(least / found.objective - 1) < 1e-4 or found.objective < 1e-9
            print(f"  check: of {count} classical starts {share:.0%} reach the least objective, {least:.6g}: "
                  f"{'the same optimum' if agrees else 'NOT the optimum above'}")  # fmt: skip
            results[name]["classical_check"] = numbers.rounded({"objective": least, "share": share, "starts": count})
    if args.json:
        write_text(args.json, json.dumps(results, indent=1) + "\n")


def _budgets(args: argparse.Namespace, default: list[float]) -> list[float]:
    if bad := [c for c in args.budget if not 0 < c < float("inf")]:
        raise ValueError(f"--budget {bad[0]:g} must be a positive number of FLOPs")
    return args.budget or default


# -- compare ----------------------------------------------------------------------------------------------------------


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    _table_arguments(parser)
    from megatron_xact.studies.law import MULTIPLIER

    parser.epilog = f"{MULTIPLIER}."
    parser.add_argument("baseline", metavar="BASELINE", help="activation to compare with")
    parser.add_argument("other", metavar="OTHER", help="activation whose compute multiplier over BASELINE is wanted")
    parser.add_argument("--cluster", choices=["auto", "pair", "ladder"], default="auto",
                        help="what is independent: pairs, or all budgets of one size and seed together (auto: by the "
                        "column trunk, else by whether budgets look alike)")  # fmt: skip
    parser.add_argument("--level", type=float, default=0.95, metavar="P", help="of intervals (default: 0.95)")
    _random_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")


def _compare(args: argparse.Namespace, outside: Outside | None) -> None:
    from megatron_xact.studies import compare as comparing
    from megatron_xact.studies import numbers, words
    from megatron_xact.studies.law import MULTIPLIER
    from megatron_xact.whole import write_text

    if not 0.5 <= args.level < 1:
        raise ValueError(f"--level {args.level:g} must be from 0.5 to below 1, e.g. 0.95")
    table = _read(args, args.table)
    found = comparing.compare(table, args.baseline, args.other, cluster=args.cluster, level=args.level,
                              draws=args.bootstraps, seed=args.seed, workers=args.workers)  # fmt: skip
    tied = comparing.tied_multiplier(table, args.baseline, args.other)
    print(words.lines(f"{args.other} against {args.baseline}", words.of_comparison(found, tied)))
    print(f"{MULTIPLIER}.")
    if args.json:
        write_text(args.json, json.dumps(numbers.of_comparison(found, tied), indent=1) + "\n")


# -- report -----------------------------------------------------------------------------------------------------------


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _table_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--baseline", metavar="NAME", help="activation to compare with (default: swiglu)")
    _budget_argument(parser)
    _random_arguments(parser)


def _report(args: argparse.Namespace, outside: Outside | None) -> None:
    from megatron_xact.studies import report

    table = _read(args, args.table)
    found = report.find(table, args.baseline, _budgets(args, report.default_budget(table)),
                        bootstraps=args.bootstraps, seed=args.seed, workers=args.workers)  # fmt: skip
    report.write(found, args.out, args.table.parent, outside and outside.values)
    print(report.summary(found, args.out))


SUBCOMMANDS = {
    "plan": Subcommand(
        "a ladder of runs from a recipe: configs, cost, expected interval of the answer",
        commands.plan_arguments,
        commands.plan,
    ),
    "run": Subcommand(
        "train a planned study, here or under SLURM; again: what is left", commands.run_arguments, commands.run
    ),
    "fp8-gate": Subcommand(
        "may a config be trained in FP8? a BF16/FP8 pair, its gap, the layers that suffer",
        commands.gate_arguments,
        commands.gate,
    ),
    "collect": Subcommand("one checked table out of study folders or CSV files", _collect_arguments, _collect),
    "fit": Subcommand("the law L(N, D) of each activation, with intervals and diagnostics", _fit_arguments, _fit),
    "compare": Subcommand("compute multiplier of one activation over another, in pairs", _compare_arguments, _compare),
    "report": Subcommand("a folder with a page, plots and every number", _report_arguments, _report),
}
