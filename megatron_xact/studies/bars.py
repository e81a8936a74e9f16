"""Progress bars of fits: on a terminal, and only of what takes longer than half a second."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def bar(parts: Iterable, what: str, total: int | None = None) -> Any:
    from tqdm import tqdm

    return tqdm(parts, desc=what, total=total, leave=False, disable=None, delay=0.5)  # None: only on a terminal
