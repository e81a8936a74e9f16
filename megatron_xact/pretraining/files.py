"""Writing a file that people or later runs rely on. Imports nothing: the launchers' side uses it too."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """The file with this text, or with what it had before: it is never seen half-written, nor after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
