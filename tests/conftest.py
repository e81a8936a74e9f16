"""What a test's marker asks of the machine, and what every test leaves as it was."""

import sys

import pytest

from megatron_xact.kernels import toolchain


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run by themselves come last: some activate the CPU platform in this process (see `stock_torch`)."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("compiler") and (reason := toolchain.lacks_for_torch()):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def stock_torch(request):
    """The CPU platform changes torch for good: a test that activates it in its own process breaks others, far away."""
    before = _on_the_cpu_platform()
    yield
    if not request.node.get_closest_marker("alone"):
        assert _on_the_cpu_platform() == before, "activates the CPU platform outside a process of its own"


def _on_the_cpu_platform() -> bool:
    platform = sys.modules.get("megatron_xact.pretraining.cpu_platform")
    return platform is not None and platform.is_active()
