"""What a test's marker asks of the machine, and what every test leaves as it was."""

import sys

import pytest

from megatron_xact.kernels import toolchain


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("compiler") and (reason := toolchain.lacks_for_torch()):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def stock_torch():
    """The CPU platform changes torch for good: a test that activates it in this process breaks others, far away."""
    yield
    platform = sys.modules.get("megatron_xact.pretraining.cpu_platform")
    assert platform is None or not platform.is_active(), "activates the CPU platform outside a process of its own"
