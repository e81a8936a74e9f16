"""Megatron's command line as a table: which flags exist, what each accepts, and how a typed value is written.

The table is Megatron's own parser (about 800 flags in 0.19), not a copy of it, so it is right for the version
that is installed. A config key is a flag's name without the leading dashes; `-` and `_` are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import enum
import functools
import io
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_xact.pretraining.files import why_not

Scalar = bool | int | float | str
Value = Scalar | list

# Flags that a config may not set, with the way out.
_ACTIVATION = 'the MLP follows from the activation: set name = "..." in [activation] (`xact doctor` lists the names)'
REFUSED = {
    "swiglu": _ACTIVATION,
    "quick-geglu": _ACTIVATION,
    "squared-relu": _ACTIVATION,
    "openai-gelu": _ACTIVATION,
    "use-te-activation-func": _ACTIVATION,
    "use-fused-weighted-squared-relu": _ACTIVATION,
    "activation-func-clamp-value": _ACTIVATION,
    "glu-linear-offset": _ACTIVATION,
    "spec": "the layer spec follows from [activation]",
    "yaml-cfg": "this file takes its place",
    "help": "run `xact pretrain --help`",
}

# Where training finds its data: prefixes of indexed files, and files that list them.
DATA_PREFIXES = ("data-path", "train-data-path", "valid-data-path", "test-data-path")
DATA_LISTS = ("data-args-path", "per-split-data-args-path")
DATA_PATHS = DATA_PREFIXES + DATA_LISTS


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


@functools.cache
def parser() -> argparse.ArgumentParser:
    """Megatron's parser. Building it starts nothing: no CUDA, no process group, no global arguments."""
    from megatron.training.arguments import add_megatron_arguments  # seconds: it imports all of megatron.core

    return add_megatron_arguments(_Parser(prog="megatron", allow_abbrev=False))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Megatron's namespace for a command line, as parsed: `validate_args` has not filled anything in yet."""
    return parser().parse_args(arguments)


def fill_in(args: argparse.Namespace) -> None:
    """Megatron's own validation, which also works out what was not given. ValueError: what it asserts."""
    from megatron.training.arguments import validate_args

    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            validate_args(args)
    except AssertionError as error:
        raise ValueError(refusal(error)) from error


def refusal(error: Exception) -> str:
    """The error in one line; many of Megatron's assertions have no message, so their source line stands in for it."""
    if str(error):
        return why_not(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"Megatron refuses these arguments: {where.line} ({Path(where.filename).name}, line {where.lineno})"


@dataclass(frozen=True)
class Flag:
    """One Megatron argument. `name` is the config key, `option` what the command line says."""

    name: str
    option: str
    action: argparse.Action

    @property
    def boolean(self) -> bool:
        return self.action.nargs == 0 or self.action.type is bool

    @property
    def many(self) -> bool:
        return not self.boolean and self.action.nargs is not None

    @property
    def expected(self) -> str:
        """In words, what a value must be."""
        if self.boolean:
            return "true or false"
        if self.action.choices:
            names = (c.name if isinstance(c, enum.Enum) else str(c) for c in self.action.choices)
            kind = "one of " + ", ".join(names)
        else:
            known = {int: "an integer", float: "a number", str: "a string", None: "a string"}
            kind = known.get(self.action.type, "a value that Megatron can parse")
        if not self.many:
            return kind
        count = f"{self.action.nargs} values" if isinstance(self.action.nargs, int) else "values"
        return f"a list of {count}, each {kind}"

    def check(self, value: object) -> Value:
        """`value` in its canonical form (lists are lists). ValueError says what was expected."""
        if self.boolean:
            if not isinstance(value, bool):
                raise ValueError(f"expected {self.expected}")
            return value
        if self.many:
            # Blends such as data-path = [0.3, "a", 0.7, "b"] mix weights and names; Megatron reads text.
            items = value if isinstance(value, list) else [value]
            text = self.action.type in (str, None)
            items = [str(i) if text and type(i) in (int, float) else i for i in items]
            value = items
        else:
            items = [value]
        if not all(self._right_type(item) for item in items):
            raise ValueError(f"expected {self.expected}")
        try:
            parse(self.tokens(value))
        except (ValueError, KeyError, TypeError, AssertionError, SyntaxError) as error:  # whatever `type=` raises
            raise ValueError(f"expected {self.expected}") from error
        return value

    def _right_type(self, item: object) -> bool:
        if isinstance(item, bool):
            return False
        if self.action.type is int:
            return isinstance(item, int)
        if self.action.type is float:
            return isinstance(item, int | float)
        if self.action.type in (str, None) or self.action.choices:
            return isinstance(item, str)
        return isinstance(item, int | str)  # Megatron's own pattern types: 4 or "([0]*3+[1])*2"

    def tokens(self, value: Value) -> list[str]:
        """The value as command-line words; nothing for a flag that is false."""
        if self.boolean:
            if isinstance(self.action, argparse.BooleanOptionalAction):
                return [self.option if value else "--no-" + self.option[2:]]
            return ([self.option] if self.action.nargs == 0 else [self.option, "True"]) if value else []
        if self.many:
            return [self.option, *map(str, value)]
        text = str(value)
        # argparse takes "-1e-6" or "-x" after a flag for another flag.
        return [f"{self.option}={text}"] if text.startswith("-") else [self.option, text]

    def read(self, words: list[str]) -> Value:
        """The typed value of command-line words, the inverse of `tokens`."""
        if self.boolean:
            if words:
                raise ValueError("it takes no value; to switch a flag of the config off, use --set table.key=false")
            return True
        if not self.many and len(words) != 1:
            raise ValueError(f"expected {self.expected}")
        convert = {int: int, float: float}.get(self.action.type, str)
        try:
            items = [convert(word) for word in words]
        except ValueError:
            raise ValueError(f"expected {self.expected}") from None
        return items if self.many else items[0]


@functools.cache
def _flags() -> dict[str, Flag]:
    table = {}
    for action in parser()._actions:
        options = [option for option in action.option_strings if option.startswith("--")]
        flag = Flag(_normal(options[0][2:]), options[0], action)
        table.update({_normal(option[2:]): flag for option in options})
    return table


def _normal(key: str) -> str:
    return key.replace("_", "-")


def find(key: str) -> tuple[Flag, bool]:
    """The flag a key names, and whether the key is its `no-` form. ValueError: unknown or refused key."""
    flags, name = _flags(), _normal(key)
    if name not in flags:
        raise ValueError(f"unknown argument {key!r}; {_suggestion(name, flags)}")
    flag = flags[name]
    if flag.name in REFUSED:
        raise ValueError(f"{key!r} cannot be set here: {REFUSED[flag.name]}")
    negated = isinstance(flag.action, argparse.BooleanOptionalAction) and name != flag.name
    return flag, negated


def _suggestion(name: str, flags: dict[str, Flag]) -> str:
    for flag in flags.values():
        if _normal(flag.action.dest) == name:  # e.g. add-bias-linear: the variable of the flag disable-bias-linear
            return f"Megatron's flag for it is {flag.name!r}"
    near = difflib.get_close_matches(name, flags, n=1)
    return f"nearest: {near[0]!r}" if near else "see Megatron's arguments"


def command_line(settings: Mapping[str, Value]) -> list[str]:
    """{key: typed value} as the words of Megatron's command line. ValueError: unknown or refused key."""
    return [word for key, value in settings.items() for word in find(key)[0].tokens(value)]


def read_tokens(words: Sequence[str]) -> dict[str, Value]:
    """Command-line overrides, e.g. ["--train-iters", "100", "--bf16"], as {key: typed value}."""
    result: dict[str, Value] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} belongs to no argument; the config file comes first, then --flag value ...")
        key, equals, inline = word[2:].partition("=")
        values = [inline] if equals else []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        flag, negated = find(key)
        try:
            value = flag.read(values)
        except ValueError as error:
            raise ValueError(f"--{key} {' '.join(values)}: {error}") from None
        result[flag.name] = not value if negated else value
    return result
