"""STUDY.toml: what is to be compared, on which ladder. Everything outside [study] is config of every run.

base = "../llama.toml"                     # inherited by every run, relative to this file
[study]
activations = ["swiglu", "xielu"]          # the first one is the baseline
seeds = [1, 2]
tokens-per-parameter = [5, 10, 20]         # or tokens = [...]
[study.sizes]
1M = {layers = 4, hidden = 128, heads = 4, ffn = 768}     # ffn of ungated activations, see ladder.py
[model]                                    # and other tables: any key of a run's config
seq-length = 256
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

LAW = "deepseek"
# Keys of every run's config that the plan decides: Megatron's, in whichever table, and those of our own tables.
DECIDED = {
    "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "lr", "global-batch-size", "train-iters",
    "train-samples", "lr-decay-style", "lr-decay-iters", "lr-warmup-iters", "lr-warmup-fraction",
    "lr-wsd-decay-iters", "eval-interval", "eval-iters", "save", "load", "save-interval", "seed",
}  # fmt: skip
DECIDED_OURS = {"activation": {"name"}, "xact": {"keep-checkpoints", "keep-every"}}


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    heads: int
    ffn: int  # of an ungated activation


@dataclass(frozen=True)
class Recipe:
    """[study]; the defaults are those of the file."""

    activations: tuple[str, ...]
    sizes: dict[str, Size]
    tokens: tuple[float, ...] = ()
    """Budgets, absolute."""
    tokens_per_parameter: tuple[float, ...] = ()
    """Budgets, times N; instead of `tokens`."""
    seeds: tuple[int, ...] = (1, 2)
    """Each decides initialisation and data order."""
    learning_rate: str | float = LAW
    """The peak, or "deepseek": 0.3118 C^-0.1250, C: FLOPs of the layers in the largest budget."""
    sweep: tuple[float, ...] = (1.0,)
    """Every run is trained with these multiples of the rate; `collect` keeps the best one of activation and size."""
    rates: dict[str, float] = field(default_factory=dict)
    """By activation, multiples of the rate that a sweep has found; 1 for the others."""
    batch: str | float = LAW
    """Tokens, or "deepseek": 0.2920 C^0.3271."""
    batch_multiple: int = 0
    """Sequences; batches are rounded to multiples. 0: the micro-batch."""
    warmup: float = 1.0
    """Tokens per parameter."""
    cooldown: float = 0.2
    """Share of each budget."""
    validation_tokens: float = 1e6
    """For the one evaluation at the end, rounded up to batches."""
    ffn_multiple: int = 8
    """The ffn size of gated activations is one of it."""


@dataclass(frozen=True)
class Study:
    source: Path
    base: Path
    recipe: Recipe
    tables: dict[str, dict[str, object]]  # config of every run


def read(path: Path) -> Study:
    """ValueError or OSError, one line that names the key, for what is wrong."""
    if not path.is_file():
        raise ValueError(f"no such study: {path}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    base, table = content.pop("base", None), content.pop("study", None)
    if not isinstance(base, str):
        raise ValueError(f'{path}: base = "FILE" must name the config that every run inherits, relative to this file')
    if not (path.parent / base).is_file():
        raise ValueError(f"{path}: base = {base!r}: no such file as {path.parent / base}")
    if not isinstance(table, dict):
        raise ValueError(f"{path} has no table [study]")
    if stray := [key for key, value in content.items() if not isinstance(value, dict)]:
        raise ValueError(f"{path}: {stray[0]} stands in no table")
    for name, entries in content.items():
        if taken := sorted(DECIDED_OURS.get(name, DECIDED) & set(entries)):
            raise ValueError(f"{path} [{name}]: {taken[0]} is not yours to set: the plan decides it from [study]")
    return Study(path, path.parent / base, _recipe(table, str(path)), content)


def _recipe(table: dict, where: str) -> Recipe:
    known = {f.name.replace("_", "-"): f.name for f in fields(Recipe)}
    values = {}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{where} [study]: unknown key {key!r}; {hint}")
        values[known[key]] = READERS[known[key]](value, f"{where} [study]: {key}")
    for key in ("activations", "sizes"):
        if key not in values:
            raise ValueError(f"{where} [study]: {key} is missing")
    if bool(values.get("tokens")) == bool(values.get("tokens_per_parameter")):
        raise ValueError(f"{where} [study]: give budgets either as tokens or as tokens-per-parameter")
    if strange := set(values.get("rates", {})) - set(values["activations"]):
        raise ValueError(f"{where} [study]: rates.{sorted(strange)[0]} is of none of the activations")
    return Recipe(**values)


def _list(kind: type, below: float, what: str) -> Callable:
    def reader(value: object, where: str) -> tuple:
        if not isinstance(value, list) or not value or not all(_is(v, kind) and 0 < v < below for v in value):
            raise ValueError(f"{where} = {value!r} must be a list of {what}")
        if len(set(value)) < len(value):
            raise ValueError(f"{where} = {value!r} has an entry twice")
        return tuple(value)

    return reader


def _number(kind: type, below: float, what: str) -> Callable:
    def reader(value: object, where: str) -> float:
        if not (_is(value, kind) and 0 < value < below):
            raise ValueError(f"{where} = {value!r} must be {what}")
        return value

    return reader


def _or_law(value: object, where: str) -> str | float:
    if value == LAW or (_is(value, float) and 0 < value < 1e15):
        return value
    raise ValueError(f'{where} = {value!r} must be "{LAW}" or a positive number')


def _is(value: object, kind: type) -> bool:
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _activations(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f'{where} = {value!r} must be a list of names, e.g. ["swiglu", "xielu"]')
    return tuple(value)


def _sizes(value: object, where: str) -> dict[str, Size]:
    keys = [f.name for f in fields(Size)]
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{where} must be a table of sizes, each {{{' = .., '.join(keys)} = ..}}")
    sizes = {}
    for name, shape in value.items():
        if not re.fullmatch(r"[A-Za-z0-9._]+", name):
            raise ValueError(f"{where}: the name {name!r} must be of letters, digits, '.' and '_': it names files")
        if not isinstance(shape, dict) or set(shape) != set(keys):
            raise ValueError(f"{where}.{name} must have {', '.join(keys)} and nothing else")
        for key, number in shape.items():
            _number(int, 1e9, "a positive whole number")(number, f"{where}.{name}.{key}")
        if shape["hidden"] % shape["heads"]:
            raise ValueError(f"{where}.{name}: hidden = {shape['hidden']} must be a multiple of heads")
        sizes[name] = Size(**shape)
    return sizes


def _rates(value: object, where: str) -> dict[str, float]:
    if not isinstance(value, dict) or not all(_is(v, float) and 0 < v < 1e9 for v in value.values()):
        raise ValueError(f"{where} = {value!r} must be a table of positive factors by activation")
    return value


READERS: dict[str, Callable] = {
    "rates": _rates,
    "activations": _activations,
    "sizes": _sizes,
    "tokens": _list(float, 1e15, "positive numbers of tokens"),
    "tokens_per_parameter": _list(float, 1e9, "positive numbers"),
    "seeds": _list(int, 2**32, "positive whole numbers of 32 bits"),
    "learning_rate": _or_law,
    "sweep": _list(float, 1e9, "positive factors"),
    "batch": _or_law,
    "batch_multiple": _number(int, 1e9, "a positive number of sequences"),
    "warmup": _number(float, 1e9, "a positive number of tokens per parameter"),
    "cooldown": _number(float, 1, "a share between 0 and 1"),
    "validation_tokens": _number(float, 1e15, "a positive number"),
    "ffn_multiple": _number(int, 1e6, "a positive whole number"),
}
