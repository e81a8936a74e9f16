"""What the modules of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from warm import Warm, warm


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Warm]:
    """`xact pretrain` without its imports; started by the first test that wants it."""
    with warm(tmp_path_factory.mktemp("lives")) as server:
        yield server
