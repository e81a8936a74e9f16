"""What every section of the GPU suite is given, and how it says that it failed or cannot run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_xact.activations import Activation


class Failure(Exception):
    """A measured number misses its target; the message holds both."""


class Skip(Exception):
    """The section cannot run here; the message says why."""


@dataclass(frozen=True)
class Context:
    device: torch.device
    quick: bool

    @property
    def backend(self):
        """The kernels under test; on a CPU, where Triton's do not run, the reference stands in to test the suite."""
        from megatron_xact.kernels import reference

        if self.device.type != "cuda":
            return reference
        from megatron_xact.kernels import triton_pointwise

        return triton_pointwise

    def randn(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device, dtype=dtype)

    def parameters(self, activation: Activation, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | float]:
        """Effective values: learned ones as the fp32 numbers that a kernel reads, in the dtype asked for."""
        values = {q: torch.tensor([q.init], device=self.device).to(dtype) for q in activation.trainable}
        return {q.symbol: values.get(q, q.init) for q in activation.parameters}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
