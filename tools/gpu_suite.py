"""What only a GPU can prove about the activation kernels: run it there, commit the JSON it writes.

    python tools/gpu_suite.py --out tools/results/kernels_h200.json            # everything, about 20 minutes
    python tools/gpu_suite.py --only bandwidth peers --out bandwidth.json      # sections by name
    python tools/gpu_suite.py --quick --out quick.json                         # small sizes, a minute or two

The sections are in tools/gpu/, and --help lists them. One that fails is reported and the rest go on; the exit code is 1
if any failed. --device cpu runs what can run without a GPU, at small sizes: it tests this program, not the kernels.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "tests" / "kernels"),
]  # the bound and the probe are the tests

import torch  # noqa: E402

from tools.gpu import correctness, fp8_mlp, memory, mlp, speed, te, training  # noqa: E402
from tools.gpu.context import Context, Failure, Skip  # noqa: E402

SECTIONS = {
    "accuracy": correctness.accuracy,
    "sums": correctness.sums,
    "huge": correctness.huge,
    "determinism": correctness.determinism,
    "memory": correctness.memory,
    "bandwidth": speed.bandwidth,
    "peers": speed.peers,
    "fp8": correctness.quantized,
    "fp8-speed": speed.quantized,
    "fp8-mlp": fp8_mlp.fp8_mlp,
    "mlp": mlp.mlp,
    "te": te.te,
    "training": training.training,
    "fp8-gate": training.fp8_gate,
    "plan": memory.plan,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU here; --device cpu --quick tests the suite itself", file=sys.stderr)
        return 2
    context = Context(torch.device(args.device), quick=args.quick or args.device == "cpu")
    result = {"machine": machine(context.device), "quick": context.quick, "sections": {}}
    for name in args.only or SECTIONS:
        result["sections"][name] = run(name, context)
        if args.out:  # after each, so that a run that is killed leaves what it found
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + "\n".join(f"{name:14}{s['status']:9}{s['seconds']:7.1f} s  {s['said']}"
                           for name, s in result["sections"].items()))  # fmt: skip
    return 1 if any(section["status"] == "FAILED" for section in result["sections"].values()) else 0


def run(name: str, context: Context) -> dict:
    """{"status": ok, FAILED or skipped, "said": one line, "seconds": ..., "data": whatever the section found}."""
    print(f"--- {name}", flush=True)
    start, data = time.perf_counter(), {}
    try:
        status, said = "ok", SECTIONS[name](context, data)
    except Skip as reason:
        status, said = "skipped", str(reason)
    except Failure as what:
        status, said = "FAILED", str(what)
    except Exception as error:  # a section that breaks must not take the others with it; it fails, and shows where
        traceback.print_exc()
        status, said = "FAILED", f"{type(error).__name__}: {error}".splitlines()[0]
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    print(f"{status}: {said}", flush=True)
    return {"status": status, "said": said, "seconds": time.perf_counter() - start, "data": data}


def machine(device: torch.device) -> dict:
    """What the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def said_by(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    packages = ("torch", "triton", "numpy", "transformer-engine", "liger-kernel", "megatron-core")
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "nvidia-smi": said_by("nvidia-smi", query, "--format=csv,noheader") if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "commit": said_by("git", "rev-parse", "--short", "HEAD"),
        "uncommitted": bool(said_by("git", "status", "--porcelain")),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in packages},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main())
