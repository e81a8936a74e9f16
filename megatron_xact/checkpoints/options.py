"""What may be chosen of an export. The command line asks here too, so nothing slow is imported."""

from __future__ import annotations

import re

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SHARD_SIZE = "2GB"


def size_in_bytes(size: str | int) -> int:
    """2GB, 500MB or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", str(size).strip(), re.IGNORECASE)
    value = int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()]) if match else 0
    if value < 1:
        raise ValueError(f"max-shard-size = {size!r}: expected a size such as 2GB or 500MB")
    return value
