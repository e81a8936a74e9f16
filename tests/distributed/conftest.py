"""What the modules of this folder share."""

from __future__ import annotations

import pytest
from warm import Warm, warm


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Warm:
    """`xact pretrain` without its imports; started by the first test that wants it."""
    return warm(tmp_path_factory.getbasetemp())
