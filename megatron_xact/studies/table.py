"""The table of runs: one row is one finished run. All of this room reads it, and whatever runs studies writes it.

The columns are the fields of `Run`, in a CSV with a header. What is wrong with a table ends in one line that names the
rows, as a spreadsheet numbers them: the header is line 1.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from megatron_xact.studies.law import Array
from megatron_xact.whole import write_text

SAME_BUDGET = 0.01  # token budgets of one size within 1 % are one: runs end on whole steps


def _column(about: str, default: object = None, required: bool = False):
    return field(default=default, metadata={"about": about, "required": required})


@dataclass(frozen=True)
class Run:
    """A finished run. Empty text or None: not known."""

    activation: str = _column("what is compared; by default everything is one activation, 'all'", "all")
    size: str = _column("name of the model size, the same for activations matched in parameters", "")
    params: float = _column("N, the number of parameters", required=True)
    tokens: float = _column("D, the number of training tokens", required=True)
    seed: int = _column("pairs runs of two activations: same initialisation and data order", 0)
    loss: float = _column("validation cross-entropy, nats per token", required=True)
    params_count: str = _column("what params counts, e.g. with-embeddings or without-input-embedding", "")
    flops: float | None = _column("training FLOPs of the run")
    step_time_s: float | None = _column("measured seconds per step, at the same batch for both of a pair")
    tokenizer: str = _column("losses of different tokenizers cannot be compared", "")
    data: str = _column("training and validation data", "")
    batch: float | None = _column("tokens per step")
    lr: float | None = _column("peak learning rate")
    schedule: str = _column("learning-rate schedule, e.g. cosine or wsd", "")
    trunk: str = _column("the long run that this one branched from; runs of one trunk share its noise", "")
    alphas: str = _column('learned activation parameters, JSON: {"alpha_p": [layer 1, layer 2, ...], ...}', "")
    run: str = _column("run folder, from where the table is: curves of loss and alphas are read there", "")
    line: str = field(default="", compare=False)  # where it came from; not a column


COLUMNS = {f.name: f for f in fields(Run) if f.name != "line"}


class Table:
    """Checked runs, in a canonical order, and their columns as arrays."""

    def __init__(self, runs: Iterable[Run], name: str = "table"):
        self.name = name
        runs = [replace(r, size=r.size or format_count(r.params)) for r in runs]
        self.runs: list[Run] = sorted(runs, key=_order)
        _check(self.runs, name)

    def __len__(self) -> int:
        return len(self.runs)

    def array(self, column: str) -> Array:
        """A numeric column, nan where it is not known."""
        return np.array([math.nan if getattr(r, column) is None else getattr(r, column) for r in self.runs], float)

    @property
    def activations(self) -> list[str]:
        return sorted({r.activation for r in self.runs})

    @property
    def sizes(self) -> list[str]:
        """Names of sizes, smallest first."""
        return list(dict.fromkeys(r.size for r in sorted(self.runs, key=lambda r: (r.params, r.size))))

    def only(self, *activations: str) -> Table:
        """The runs of these activations; ValueError names those there are."""
        for name in activations:
            if name not in self.activations:
                raise ValueError(f"{self.name} has no activation {name!r}; it has {', '.join(self.activations)}")
        return self.where(lambda r: r.activation in activations)

    def where(self, keep: Callable[[Run], bool]) -> Table:
        chosen = object.__new__(Table)
        chosen.name, chosen.runs = self.name, [r for r in self.runs if keep(r)]
        return chosen

    def write(self, path: Path) -> None:
        """As CSV with the columns of `Run`, in canonical order."""
        write_text(path, self.csv())

    def csv(self) -> str:
        rows = [[_cell(getattr(r, column)) for column in COLUMNS] for r in self.runs]
        return csv_text([list(COLUMNS), *rows])


def _order(r: Run) -> tuple:
    return (r.activation, r.params, r.size, r.tokens, r.seed, r.trunk, r.loss)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e18 else repr(float(value))
    return str(value)


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def format_count(count: float) -> str:
    """1.28B, 190M, 30k."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:.3g}"


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def describe(table: Table) -> str:
    """'30 runs, 5 sizes 190M..3.17B, tokens 1.9B..634B (10..200 per parameter)'."""
    D = table.array("tokens")
    sizes = table.sizes
    N = table.array("params")
    params, tokens = (f"{format_count(v.min())}..{format_count(v.max())}" for v in (N, D))
    return (
        f"{plural(len(table), 'run')}, {plural(len(sizes), 'size')} {params}, tokens {tokens} "
        f"({(D / N).min():.3g}..{(D / N).max():.3g} per parameter)"
    )


# -- refusals ---------------------------------------------------------------------------------------------------------


def lines_of(runs: Sequence[Run]) -> str:
    """'line 3, line 7 and 2 more', in the order of the file."""
    runs = sorted(runs, key=lambda r: (r.line.rstrip("0123456789"), len(r.line), r.line))
    names = [r.line or f"{r.activation} {r.size} {r.tokens:.4g} tokens seed {r.seed}" for r in runs]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _check(runs: list[Run], name: str) -> None:
    if not runs:
        raise ValueError(f"{name} has no runs")
    for column in ("params", "tokens", "loss"):
        if those := [r for r in runs if not (math.isfinite(getattr(r, column)) and getattr(r, column) > 0)]:
            values = ", ".join(f"{getattr(r, column):g}" for r in those[:3])
            raise ValueError(f"{name}: {column} must be positive and finite, but is {values} in {lines_of(those)}")
    for column in ("step_time_s", "flops"):
        if those := [r for r in runs if getattr(r, column) is not None and not 0 < getattr(r, column) < math.inf]:
            raise ValueError(f"{name}: {column} must be positive and finite where it is given: {lines_of(those)}")
    if those := [r for r in runs if r.loss > 20]:
        raise ValueError(
            f"{name}: a loss above 20 nats per token in {lines_of(those)}: is it a perplexity, or did the run diverge? "
            "Losses are cross-entropies in nats"
        )
    for column, way in (
        ("tokenizer", "their losses per token cannot be compared"),
        ("data", "losses on different data are not one law"),
        ("params_count", "N must count the same parameters in every run"),
    ):
        if len(kinds := Counter(getattr(r, column) for r in runs)) > 1:
            told = ", ".join(f"{k or 'not given'} ({plural(n, 'run')})" for k, n in sorted(kinds.items()))
            raise ValueError(f"{name} mixes {column}: {told}; {way}. Choose with --where {column}=VALUE")
    _check_sizes(runs, name)
    _check_duplicates(runs, name)


def _check_sizes(runs: list[Run], name: str) -> None:
    by_size: dict[tuple[str, str], list[Run]] = {}
    for r in runs:
        by_size.setdefault((r.activation, r.size), []).append(r)
    for (activation, size), those in by_size.items():
        first = those[0].params
        if odd := [r for r in those if abs(r.params / first - 1) > 1e-3]:
            raise ValueError(
                f"{name}: {activation} {size} has {first:.6g} parameters in {lines_of(those[:1])} but "
                f"{odd[0].params:.6g} in {lines_of(odd)}; one size has one number of parameters"
            )


def _check_duplicates(runs: list[Run], name: str) -> None:
    cells: dict[tuple, list[Run]] = {}
    for r, budget in zip(runs, budgets(runs), strict=True):
        cells.setdefault((r.activation, r.size, budget, r.seed), []).append(r)
    for (activation, size, _, seed), those in cells.items():
        if len(those) > 1:
            raise ValueError(
                f"{name}: {activation} {size} at {those[0].tokens:.4g} tokens, seed {seed} is there {len(those)} "
                f"times: {lines_of(those)}; runs that repeat a cell need different seeds"
            )


def budgets(runs: Sequence[Run]) -> list[float]:
    """For every run the token budget it belongs to, within its size: the smallest token count of the group."""
    group: dict[tuple[str, float], float] = {}
    for size in {r.size for r in runs}:
        last = start = 0.0
        for tokens in sorted({r.tokens for r in runs if r.size == size}):
            if not last or tokens > last * (1 + SAME_BUDGET):
                start = tokens
            group[size, tokens] = start
            last = tokens
    return [group[r.size, r.tokens] for r in runs]


def ratio_names(runs: Sequence[Run]) -> list[str]:
    """For every run its tokens per parameter, to two digits; what differs by less than 5 % has one name."""
    group: dict[float, str] = {}
    start = 0.0
    for ratio in sorted({r.tokens / r.params for r in runs}):
        if ratio > 1.05 * start:
            start = ratio
        group[ratio] = f"{float(f'{start:.2g}'):g}"
    return [group[r.tokens / r.params] for r in runs]
