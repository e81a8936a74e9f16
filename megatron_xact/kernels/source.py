"""What the kernels are made from, as a number: caches on disk that outlive an edit have it in their keys."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def digest(*modules: str) -> str:
    """SHA-256, in hex, of the source of these modules of this folder; of all of them where none is named."""
    here = Path(__file__).parent
    files = sorted(here / f"{name}.py" for name in modules) if modules else sorted(here.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
