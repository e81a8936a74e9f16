"""What the suite consists of: the sections by name, in three groups, and what is expected of each.

Minutes are estimates for an H200, 16 cores and an empty Triton cache, from the number of kernels to compile (0.2 to 0.8
seconds each) and of calls to time; no GPU has confirmed them yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools.gpu import correctness, fp8_mlp, memory, mlp, mlp_speed, speed, step, te, tiles, training
from tools.gpu.context import Context, Entries


@dataclass(frozen=True)
class Section:
    group: str
    run: Callable[[Context, Entries], str]  # what it found, in a line
    minutes: float  # of each part
    parts: int = 1  # processes that share it
    gib: int = 4  # of GPU memory, each
    timed: bool = False  # alone on the machine, and the clocks recorded

    @property
    def limit(self) -> float:
        """Seconds after which it is taken to hang."""
        return 60 * (1 + 3 * self.minutes)


CORRECTNESS, SPEED, TRAINING = GROUPS = ("correctness", "speed", "training")
SECTIONS = {
    "accuracy": Section(CORRECTNESS, correctness.accuracy, 0.8, parts=4),
    "sums": Section(CORRECTNESS, correctness.sums, 0.5, gib=12),
    "huge": Section(CORRECTNESS, correctness.huge, 1.0, gib=28),
    "determinism": Section(CORRECTNESS, correctness.determinism, 0.5, gib=8),
    "memory": Section(CORRECTNESS, correctness.memory, 0.3),
    "fp8": Section(CORRECTNESS, correctness.quantized, 0.8, parts=8, gib=6),
    "fp8-mlp": Section(CORRECTNESS, fp8_mlp.correctness, 1.0),
    "mlp": Section(CORRECTNESS, mlp.correctness, 0.8, parts=5),
    "mlp-memory": Section(CORRECTNESS, mlp.memory, 0.5, gib=8),
    "te": Section(CORRECTNESS, te.correctness, 1.0),
    "bandwidth": Section(SPEED, speed.bandwidth, 1.5, timed=True),
    "tiles": Section(SPEED, tiles.tiles, 1.5, timed=True),
    "peers": Section(SPEED, speed.peers, 2.0, timed=True),
    "fp8-speed": Section(SPEED, speed.quantized, 1.0, timed=True),
    "fp8-mlp-speed": Section(SPEED, fp8_mlp.speed, 1.0, timed=True),
    "mlp-speed": Section(SPEED, mlp_speed.speed, 1.5, parts=4, timed=True),
    "te-speed": Section(SPEED, te.speed, 1.5, timed=True),
    "quickstart": Section(TRAINING, training.quickstart, 1.0),
    "fp8-gate": Section(TRAINING, training.fp8_gate, 2.0, gib=8),
    "plan": Section(TRAINING, memory.plan, 1.0, parts=len(memory.CASES), gib=38),
    "step": Section(TRAINING, step.step, 5.3, timed=True),
}


def named(words: list[str]) -> list[str]:
    """Sections of these names or groups, in the order of the table; all for no words."""
    return [name for name, section in SECTIONS.items() if not words or name in words or section.group in words]


def listed() -> str:
    lines = []
    for group in GROUPS:
        found = [(name, section) for name, section in SECTIONS.items() if section.group == group]
        told = ", ".join(f"{name} {s.minutes:g}{f' x {s.parts}' if s.parts > 1 else ''}" for name, s in found)
        lines.append(f"  {group}: {told}")
    return "\n".join(lines)
