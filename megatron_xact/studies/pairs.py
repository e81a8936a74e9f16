"""Which runs of two activations belong together, and which of these pairs are independent of each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from megatron_xact.studies.law import Array
from megatron_xact.studies.table import Run, budgets, lines_of

Interval = tuple[float, float]
Pairs = Sequence[tuple[Run, Run]]  # (baseline, other)
Ids = NDArray[np.int_]  # of each pair its cluster, from 0
CLUSTERS = ("auto", "pair", "ladder")


def keys(runs: Sequence[Run]) -> list[tuple]:
    return [(r.size, budget, r.seed) for r, budget in zip(runs, budgets(runs), strict=True)]


def pair(runs: Sequence[Run], baseline: str, other: str, name: str = "table") -> list[tuple[Run, Run]]:
    """(baseline, other) of the same size, token budget and seed, smallest first.

    ValueError: there are none, or what is not the activation differs too.
    """
    keyed: dict[tuple, dict[str, Run]] = {}
    for r, key in zip(runs, keys(runs), strict=True):
        keyed.setdefault(key, {})[r.activation] = r
    pairs = [(cell[baseline], cell[other]) for cell in keyed.values() if len(cell) == 2]
    if not pairs:
        told = [
            f"{a} has sizes {', '.join(dict.fromkeys(r.size for r in runs if r.activation == a))} and seeds "
            f"{', '.join(map(str, sorted({r.seed for r in runs if r.activation == a})))}"
            for a in (baseline, other)
        ]
        raise ValueError(f"{name}: no run of {other} has the size, tokens and seed of one of {baseline}; "
                         + "; ".join(told))  # fmt: skip
    for column in ("schedule", "batch"):
        if odd := [a for a, b in pairs if getattr(a, column) != getattr(b, column)]:
            raise ValueError(f"{name}: {baseline} and {other} differ in {column} in the pairs of {lines_of(odd)}; "
                             "that would be compared, not the activation")  # fmt: skip
    if odd := [a for a, b in pairs if abs(b.params / a.params - 1) > 0.1]:
        raise ValueError(f"{name}: {baseline} and {other} differ by more than 10 % in parameters in the pairs of "
                         f"{lines_of(odd)}; match them (an ungated activation needs 1.5 x the ffn width)")  # fmt: skip
    return sorted(pairs, key=lambda p: (p[0].params, p[0].size, p[0].tokens, p[0].seed))


def column_of(pairs: Pairs, which: int, column: str) -> Array:
    return np.array([getattr(p[which], column) for p in pairs], float)


def differences(pairs: Pairs) -> Array:
    return column_of(pairs, 1, "loss") - column_of(pairs, 0, "loss")


def ratio(pairs: Pairs, column: str) -> Interval | None:
    if any(getattr(r, column) is None for p in pairs for r in p):
        return None
    ratios = column_of(pairs, 1, column) / column_of(pairs, 0, column)
    return float(ratios.min()), float(ratios.max())


def clusters(pairs: Pairs, x: Array, how: str) -> tuple[Ids, str]:
    """Which pairs are independent of which: cluster of each pair, and what a cluster is."""
    trunks = [(a.trunk, b.trunk) for a, b in pairs]
    ladders = [(a.size, a.seed) for a, _ in pairs]
    single = list(range(len(pairs)))
    if how == "pair":
        return number(single), "pairs"
    if how == "ladder":
        return number(ladders), "ladders (all budgets of one size and seed)"
    if how != "auto":
        raise ValueError(f"cluster {how!r} must be one of {', '.join(CLUSTERS)}")
    if any(a or b for a, b in trunks):
        return number([t if any(t) else s for t, s in zip(trunks, single, strict=True)]), "trunks"
    ids = number(ladders)
    groups = int(ids.max()) + 1
    if not 2 < groups < len(pairs):
        return number(single), "pairs"
    means = np.bincount(ids, x) / np.bincount(ids)
    between = ((means[ids] - x.mean()) ** 2).sum() / (groups - 1)
    within = ((x - means[ids]) ** 2).sum() / (len(x) - groups)
    alike = stats.f.sf(between / within, groups - 1, len(x) - groups) if within > 0 else 1.0
    # Lenient on purpose. Simulated coverage of 95 % intervals then stays at 92-97 % whether or not budgets share noise;
    # without the test it falls to 75 %. With few ladders the test is weak and must be more lenient still.
    if alike < (0.25 if groups >= 5 else 0.35):
        return ids, "ladders (all budgets of one size and seed)"
    return number(single), "pairs"


def number(keys: Sequence) -> Ids:
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])
