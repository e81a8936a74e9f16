"""What a word of the command line has to be: `type=` of argparse's arguments. For all rooms; imports none of them.

A number that cannot be ends as argparse's usage error; a path that is not there in one line, as everywhere else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def positive(kind: type) -> Callable[[str], int | float]:
    """kind: int or float."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be a positive {'whole ' if kind is int else ''}number")
        return value

    return read


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 0 or more")
    return int(text)


def not_negative(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be 0 or a positive number")
    return value


def folder(text: str) -> Path:
    """FileNotFoundError: it is not there, or is a file."""
    if not Path(text).is_dir():
        raise FileNotFoundError(f"no such folder: {text}")
    return Path(text)


def file(text: str) -> Path:
    """FileNotFoundError: it is not there, or is a folder."""
    if not Path(text).is_file():
        raise FileNotFoundError(f"no such file: {text}")
    return Path(text)
