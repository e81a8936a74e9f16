"""What a test's marker asks of the machine."""

import pytest

from megatron_xact.kernels import toolchain


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("compiler") and (reason := toolchain.lacks_for_torch()):
        pytest.skip(reason)
