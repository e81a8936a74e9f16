"""The speed of every model of a study on this machine, from a few steps of each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from megatron_xact.studies.expectation import Speed
from megatron_xact.studies.planning import Plan
from megatron_xact.studies.running import environment
from megatron_xact.studies.state import SPEEDS, report_of
from megatron_xact.whole import write_text

STEPS = 20


def measure(plan: Plan, folder: Path) -> Speed:
    """Trains the first trunk of every activation and size for STEPS steps; SPEEDS of the folder then has the speeds.

    ValueError: one of them fails.
    """
    speeds, starts = {}, []
    place = folder / "measured"
    for trunk in plan.trunks:
        if (key := (trunk.size, trunk.activation)) in speeds:
            continue
        shutil.rmtree(place, ignore_errors=True)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "megatron_xact", "pretrain", str(folder / "configs" / f"{trunk.name}.toml"),
             "--quiet", "--save", str(place), "--load", str(place), "--train-iters", str(STEPS),
             "--lr-warmup-iters", "1", "--lr-wsd-decay-iters", "1", "--eval-iters", "1", "--log-interval", "1",
             "--save-interval", str(10 * STEPS)],
            env=environment(1, 1), capture_output=True, text=True,
        )  # fmt: skip
        took, speed = time.monotonic() - began, report_of(place).get("tokens_per_second")
        if done.returncode or not speed:
            last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
            raise ValueError(f"{trunk.name} could not be measured: {last}")
        speeds[key] = speed
        starts.append(max(0.0, took - STEPS * trunk.batch / speed))
        print(f"measured     {trunk.size} {trunk.activation}: {speed:,.0f} tokens/s", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    by_size: dict[str, dict[str, float]] = {}
    for (size, activation), speed in speeds.items():
        by_size.setdefault(size, {})[activation] = speed
    write_text(folder / SPEEDS, json.dumps(by_size, indent=1) + "\n")
    start = sum(starts) / len(starts)
    return Speed(f"measured here, median of {STEPS} steps, and {start:.0f} s for each start and end", speeds, start)
