"""Can code be compiled on this machine while a run goes on? torch.compile makes C++ of it, Triton a launcher in C."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def lacks_for_torch() -> str | None:
    """What torch.compile lacks for CPUs, or None."""
    return _lacks("torch.compile", "C++", (os.environ.get("CXX", "g++"),), sysconfig.get_path("include"))


def lacks_for_triton() -> str | None:
    """What Triton lacks (triton/runtime/build.py), or None."""
    compilers = (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's, for what pip installs
        scheme = "posix_prefix"
    return _lacks("Triton", "C", compilers, sysconfig.get_path("include", scheme))


def _lacks(who: str, language: str, compilers: tuple[str, ...], include: str) -> str | None:
    if not any(map(shutil.which, compilers)):
        return f"{who} finds no {language} compiler ({' or '.join(compilers)})"
    header = Path(include, "Python.h")
    return None if header.is_file() else f"{who} needs Python's C headers (no {header}: python3-dev)"
