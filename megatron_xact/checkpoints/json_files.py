"""JSON as other programs have written it."""

import json
from pathlib import Path


def read_object(path: Path) -> dict:
    """ValueError names the file: not JSON, or no object. OSError: it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {value!r:.40}, no JSON object")
    return value
