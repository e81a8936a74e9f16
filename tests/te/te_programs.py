"""TransformerEngine's Python wheels without their CUDA libraries, and the programs that run in them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REQUIREMENTS = ("onnx==1.23.2", "onnxscript==0.7.2", "onnx-ir==1.1.0", "einops", "ml-dtypes")
NEWEST = "2.20.2"
VERSIONS = ("2.13.0", "2.17.1", NEWEST)  # the first with fusions of users, the first with joint ones, the newest


def folders_of(version: str) -> list[Path]:
    """Where this TE is and, if not there too, its requirements: beside the environment and not in it. Skips offline."""
    whole = installed(Path(sys.prefix) / "te-python", f"transformer-engine=={NEWEST}", *REQUIREMENTS)
    if version == NEWEST:
        return [whole]
    return [installed(Path(sys.prefix) / f"te-python-{version}", f"transformer-engine=={version}"), whole]


def installed(folder: Path, *packages: str) -> Path:
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--upgrade", "--target", folder]
        done = subprocess.run([*command, *packages], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"TransformerEngine's Python wheel cannot be had here: {done.stderr.strip().splitlines()[-1]}")
        (folder / "complete").touch()
    return folder


class Program:
    """A program of this folder in one version of TE: started at once, its JSON waited for."""

    def __init__(self, name: str, version: str):
        self.name, self.version, self.found = name, version, None
        try:
            folders = folders_of(version)
        except pytest.skip.Exception as reason:
            self.process, self.reason = None, str(reason)
            return
        command = [sys.executable, HERE / name, *folders]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def result(self) -> dict:
        if self.process is None:
            pytest.skip(self.reason)
        if self.found is None:
            stdout, stderr = self.process.communicate(timeout=600)
            assert self.process.returncode == 0, f"{self.name} with TE {self.version}: {stderr[-3000:]}"
            self.found = json.loads(stdout.splitlines()[-1]) | {"stdout": stdout}
        return self.found
