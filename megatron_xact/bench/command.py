"""`xact bench kernels` and `xact bench mlp`: a table on the terminal; a plot and JSON in a folder."""

from __future__ import annotations

import argparse
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from megatron_xact.bench import kernels, mlp
from megatron_xact.kernels import toolchain

PARTS = {
    "kernels": (kernels, "the activations alone, beside the published formula"),
    "mlp": (mlp, "fc1, activation and fc2, forward and backward: what is measured at a shape, and what a run chooses"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (part, help_) in PARTS.items():
        one = parts.add_parser(name, help=help_, description=help_, allow_abbrev=False)
        part.add_arguments(one)
        one.add_argument(
            "--out", type=Path, default=Path("runs/bench"),
            help=f"folder of {name}.json and {name}.png (default: %(default)s)",
        )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if lacking := toolchain.lacks_for_triton() if device.type == "cuda" else toolchain.lacks_for_torch():
        raise ValueError(f"torch.compile, to compare with, cannot work: {lacking}; apt install g++ python3-dev")
    PARTS[args.what][0].main(args, device, machine(device))


def machine(device) -> dict:
    """What the numbers depend on."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
