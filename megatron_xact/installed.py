"""What is installed here: looked up, not imported, which would be slow and may fail. For all rooms; imports none."""

from __future__ import annotations

import importlib.metadata
import importlib.util


def version(distribution: str) -> str | None:
    """None where it is not installed, or was without pip."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def present(module: str) -> bool:
    """Whether there is such a module to import. The packages above it are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package above it
        return False


def extra(name: str, options: str = "") -> str:
    """How to get an extra of pyproject.toml."""
    return f'pip install {options}-e ".[{name}]" in the repository'
