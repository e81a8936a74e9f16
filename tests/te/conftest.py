"""The fixtures of this folder. Nothing is imported from here: other folders have a conftest too."""

import pytest
from te_programs import NEWEST, VERSIONS, Program


@pytest.fixture(scope="session")
def programs():
    """All programs, side by side: most of their time goes into importing torch and Megatron."""
    running = {version: Program("operations.py", version) for version in VERSIONS}
    running["spec"] = Program("spec.py", NEWEST)
    yield running
    for program in running.values():
        if program.process is not None and program.process.poll() is None:
            program.process.kill()
            program.process.wait()
