"""Timing on a GPU: contenders in turns, operands that are not in its cache, and the clocks it has under load."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.kernels import benchmark
from tools.gpu.context import Context, Entries

CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")  # MHz, MHz, W, degrees Celsius


def in_turns(
    context: Context, calls: dict[str, Callable[[], object]], repeats: int, data: Entries
) -> dict[str, list[float]]:
    """Seconds of every repetition by label, the calls taking turns; of one that cannot run data["absent"] says why."""
    working = {}
    absent = data.setdefault("absent", {})
    for label, call in calls.items():
        try:
            with data.trying(label):
                call()
                context.synchronize()
            working[label] = call
        except Exception as problem:  # a compiler's, mostly: it must not take the others' numbers with it
            absent[label] = reason(problem)
            print(f"    {label} cannot run: {absent[label]}", flush=True)
            context.synchronize()  # a GPU that is lost for this process says so again: nothing is left to time
    seconds = benchmark.clock_in_turns([*working.values()], context.device, repeats)
    return dict(zip(working, seconds, strict=True))


def reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:300]


class Rotation:
    """Calls of the same kind, one at a time. Each keeps its result until its next turn, so that results, too, go to
    other memory than the last one's."""

    def __init__(self, calls: Sequence[Callable[[], object]]):
        self.turns = itertools.cycle(enumerate(calls))
        self.results: list[object] = [None] * len(calls)

    def __call__(self) -> None:
        turn, call = next(self.turns)
        self.results[turn] = call()


def sets_beyond_cache(context: Context, num_bytes: int) -> int:
    """How many sets of operands of this size are together four times the GPU's second-level cache."""
    if not context.on_gpu:
        return 1
    return -(-4 * torch.cuda.get_device_properties(context.device).L2_cache_size // num_bytes)


def operands(
    context: Context, activation: Activation, tokens: int, columns: int, num_bytes: int
) -> list[tuple[Tensor, Tensor]]:
    """(x, dy) in bf16, as many sets as no cache can hold; num_bytes: that a call with one of them moves."""
    width, bf16 = columns * (1 + activation.gated), torch.bfloat16
    return [
        (context.randn(tokens, width, dtype=bf16), context.randn(tokens, columns, seed=1, dtype=bf16))
        for _ in range(sets_beyond_cache(context, num_bytes))
    ]


def clocks_under_load(context: Context) -> dict[str, str] | None:
    """What nvidia-smi says while matrix products are under way; None where it says nothing. About two seconds."""
    if not context.on_gpu:
        return None
    a = context.randn(8192, 8192, dtype=torch.bfloat16)

    def load() -> None:
        for _ in range(200):  # 1.4 ms each
            a @ a
        context.synchronize()

    load()
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as process:
            started = time.monotonic()
            while process.poll() is None:
                load()
                if time.monotonic() - started > 30:
                    process.kill()
            said = process.stdout.read().splitlines()
    except OSError:
        return None
    return dict(zip(CLOCKS, said[0].split(", "), strict=False)) if process.returncode == 0 and said else None
