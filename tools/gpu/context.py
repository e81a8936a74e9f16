"""What every section of the GPU suite is given: where to compute and how much, and a place for what it finds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.installed import present
from tools.gpu.results import write


class Failure(Exception):
    """The section cannot go on; the message says why. A missed target is none: see `Entries.target`."""


class Skip(Exception):
    """The section cannot run here; the message says why."""


class Entries(dict):
    """What a section has found so far, by name, and the targets that it has met or missed.

    Sections call `save` after every entry: what lies in the file is what a section that is killed leaves.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.targets: dict[str, dict] = {}

    def target(self, what: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        """A number that must not be above or below another. NaN misses."""
        met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        bounds = {"at most": at_most, "at least": at_least}
        self.targets[what] = {"value": value, "met": met} | {k: v for k, v in bounds.items() if v is not None}
        self.save()

    def all_at_most(self, what: str, bound: float, errors: dict[str, float]) -> None:
        """One target for many errors: the largest of them, which is named. NaN misses, and so does having none."""
        errors = errors or {"nothing was compared": math.nan}
        over = [label for label, error in errors.items() if not error <= bound]
        for label in over:
            print(f"over {bound:g}: {what}, {label}: {errors[label]:.4g}", flush=True)
        worst = max(errors, key=lambda label: as_error(errors[label]))
        count = f"{len(over)} of {len(errors)} too large, " if over else ""
        self.target(f"{what}: {count}{worst}", errors[worst], at_most=bound)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """While this goes on, the file says what it is: which kernel it was, if it never ends."""
        self["at"] = what
        self.save()
        try:
            yield
        finally:
            del self["at"]

    def save(self, **outcome: str) -> None:
        write(self.path, {"status": "running", "said": ""} | outcome | {"targets": self.targets, "data": self})


def as_error(value: Tensor | float) -> float:
    """A NaN compares as neither large nor small, and Python's max passes over it: as an error it is infinite."""
    value = float(value)
    return math.inf if math.isnan(value) else value


def over_bound(ours: Tensor, true: Tensor, loose: float = 1e-5) -> float:
    """Largest error over (2 roundings to its own dtype + `loose` of the largest value)."""
    rounding = (true.to(ours.dtype).double() - true).abs()
    return as_error(((ours.double() - true).abs() / (2 * rounding + loose * true.abs().max() + 1e-30)).max())


@dataclass(frozen=True)
class Context:
    device: torch.device
    quick: bool  # small sizes
    part: int = 0  # of a section that several processes share
    parts: int = 1

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self):
        """The kernels under test; on a CPU, where Triton's do not run, the reference stands in to test the suite."""
        from megatron_xact.kernels import reference

        if not self.on_gpu:
            return reference
        from megatron_xact.kernels import triton_pointwise

        return triton_pointwise

    def needs(self, *modules: str) -> None:
        for module in modules:
            if not present(module):
                raise Skip(f"{module} is not installed")

    def needs_fp8(self) -> None:
        if self.on_gpu and torch.cuda.get_device_capability(self.device) < (8, 9):
            raise Skip("this GPU has no FP8")

    def mine(self, things: Sequence) -> Sequence:
        """Those of this process."""
        return things[self.part :: self.parts]

    def randn(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=dtype)

    def parameters(self, activation: Activation, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | float]:
        """Effective values: learned ones as the fp32 numbers that a kernel reads, in the dtype asked for."""
        values = {q: torch.tensor([q.init], device=self.device).to(dtype) for q in activation.trainable}
        return {q.symbol: values.get(q, q.init) for q in activation.parameters}

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
