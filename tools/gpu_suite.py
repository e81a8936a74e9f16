"""What only a GPU can prove about this project: run it there, commit the JSON it writes.

    python tools/gpu_suite.py --out tools/results/kernels_h200.json    # everything, about 25 minutes
    python tools/gpu_suite.py --only bandwidth peers                   # sections or groups by name
    python tools/gpu_suite.py --quick                                  # small sizes, a few minutes

What FILE has of a section that came to its end is kept and not measured again (--again does), so where a command may
last ten minutes, the same file takes three:

    python tools/gpu_suite.py --out FILE --only correctness bandwidth tiles peers fp8-speed   # 8 minutes
    python tools/gpu_suite.py --out FILE --only speed                                         # what is left of it, 9
    python tools/gpu_suite.py --out FILE --only training                                      # 8

Every section is a process of its own, and large ones are several parts: one that crashes, hangs or loses the GPU takes
no other with it. Those that are timed run alone, after the others, which run side by side. FILE is written as they find
something, also when this command is ended by Ctrl-C or SIGTERM, and is of one commit, one GPU and one size.

A section that misses a target says so in the table and goes on. The exit code is 0 if every section asked for was run
or skipped and met its targets, else 1; 130 if interrupted. --device cpu runs what can run without a GPU, at small
sizes: it tests this program, not the kernels.
"""

from __future__ import annotations

import argparse
import platform
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megatron_xact import installed  # noqa: E402
from megatron_xact.kernels.backends import triton_unavailable_reason  # noqa: E402
from tools.gpu import jobs, sections  # noqa: E402
from tools.gpu.jobs import Job  # noqa: E402
from tools.gpu.results import Results  # noqa: E402
from tools.gpu.sections import GROUPS, SECTIONS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"sections and expected minutes:\n{sections.listed()}",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=[*GROUPS, *SECTIONS], metavar="NAME", default=[],
                        help="groups or sections, see below")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON; go on with those there")
    parser.add_argument("--again", action="store_true", help="measure also what FILE has")
    parser.add_argument("--limit", type=float, metavar="SECONDS",
                        help="that a process may take (default: a minute and 3 times what is expected)")  # fmt: skip
    parser.add_argument("--commit", help="that is measured (default: what git says)")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU here; --device cpu tests the suite itself", file=sys.stderr)
        return 2
    if args.device == "cuda" and (reason := triton_unavailable_reason()):
        print(f"gpu_suite: Triton's kernels cannot run here: {reason}", file=sys.stderr)
        return 2
    quick = args.quick or args.device == "cpu"
    asked = jobs_of(sections.named(args.only), args.device, quick, args.limit)
    try:
        results = Results(args.out, machine(args.device, args.commit) | {"quick": quick})
    except ValueError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 2
    return run(asked, results, args.again, gpu_memory(args.device))


def run(asked: list[Job], results: Results, again: bool, gib: float) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    try:
        jobs.run([job for job in asked if again or not results.has(job.name)], jobs.cores(), gib, results.put)
    except KeyboardInterrupt:
        interrupted = True
    names = [job.name for job in asked]
    print("\n" + results.table(names))
    return 130 if interrupted else 0 if results.are_good(names) else 1


def jobs_of(names: list[str], device: str, quick: bool, limit: float | None) -> list[Job]:
    found = []
    for name in names:
        section = SECTIONS[name]
        parts = 1 if quick else section.parts
        for part in range(parts):
            words = [name, "--device", device, "--part", str(part), "--parts", str(parts), *["--quick"] * quick]
            found.append(Job(
                name if parts == 1 else f"{name} {part + 1}/{parts}",
                [sys.executable, "-m", "tools.gpu.child", *words],
                limit or section.limit, 60 * section.minutes, section.gib, section.timed,
            ))  # fmt: skip
    return found


def gpu_memory(device: str) -> float:
    """GiB."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else float("inf")


def machine(device: str, commit: str | None) -> dict:
    """What the numbers depend on. commit, uncommitted: None where nobody knows."""

    def said_by(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changes = said_by("git", "status", "--porcelain")
    packages = ("torch", "triton", "numpy", "transformer-engine", "liger-kernel", "megatron-core")
    query = "--query-gpu=driver_version,power.limit"
    return {
        "gpu": torch.cuda.get_device_name(0) if device == "cuda" else None,
        "nvidia-smi": said_by("nvidia-smi", query, "--format=csv,noheader") if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "commit": commit or said_by("git", "rev-parse", "--short", "HEAD"),
        "uncommitted": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "versions": {name: installed.version(name) for name in packages},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main())
