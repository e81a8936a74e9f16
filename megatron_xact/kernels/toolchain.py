"""Can code be compiled on this machine while a run goes on? torch.compile makes C++ of it, Triton a launcher in C."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sysconfig
import tempfile
from pathlib import Path


def lacks_for_torch() -> str | None:
    """What torch.compile lacks for CPUs, or None."""
    include, torch = sysconfig.get_path("include"), importlib.util.find_spec("torch")
    if lacking := _lacks("torch.compile", "C++", (cxx(),), include):
        return lacking
    # It hands paths to the compiler without quotes: its own, Python's, and those of what it compiles.
    caches = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    paths = (include, torch.origin if torch else "", tempfile.gettempdir(), caches)
    split = next((path for path in paths if re.search(r"[\s'\"\\]", path)), None)
    return split and f"torch.compile's C++ compiler gets no path with a space or a quote ({split})"


def cxx() -> str:
    """The C++ compiler that torch.compile calls, there or not."""
    return os.environ.get("CXX", "g++")


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
