"""Which implementation serves a tensor: Triton on NVIDIA GPUs, compiled C++ on CPUs, else the formulas themselves."""

from __future__ import annotations

import functools
import importlib.util
import logging
from types import ModuleType

import torch
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.kernels import cpu, reference, toolchain

logger = logging.getLogger(__name__)

CHOICES = ("auto", "triton", "reference")
_choice = "auto"


def select_backend(name: str) -> None:
    """For the whole process: "auto" (the fastest that is there), "triton" (that or an error), "reference" (no fusion).

    Raises ValueError for another name, and for "triton" where it cannot run.
    """
    global _choice
    if name not in CHOICES:
        raise ValueError(f"kernels = {name!r} is not one of {', '.join(CHOICES)}")
    if name == "triton" and (reason := triton_unavailable_reason()):
        raise ValueError(f"kernels = 'triton' cannot run here: {reason}; use 'auto'")
    _choice = name


def selected() -> str:
    return _choice


def backend_of(activation: Activation, x: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` serve pre-activations x."""
    # eps asks for the bits of code that rounds after every operation: no fused pass keeps them.
    if _choice == "reference" or activation.eps:
        return reference
    if x.is_cuda and _triton_is_there():
        from megatron_xact.kernels import triton_launch, triton_pointwise

        reason = triton_launch.unserved_reason(activation, x.dtype)
        if reason is None:
            return triton_pointwise
        if _choice == "auto":
            _warn_unfused(activation.name, reason)
    if _choice == "triton":
        raise ValueError(f"kernels = 'triton' has no kernel for {activation.name} on {x.device} in {x.dtype}")
    return cpu if cpu.serves(x) else reference


@functools.cache
def triton_unavailable_reason() -> str | None:
    """Why no Triton kernel can run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "torch sees no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU is of compute capability {major}.{minor}, older than 8.0"
    return _lacks_for_triton()


_lacks_for_triton = functools.cache(toolchain.lacks_for_triton)  # it looks through PATH, and FP8 asks at every operator


@functools.cache
def _triton_is_there() -> bool:
    reason = triton_unavailable_reason()
    if reason:
        logger.warning("activations run unfused on this GPU, several times slower: %s", reason)
    return reason is None


@functools.cache
def _warn_unfused(name: str, reason: str) -> None:
    logger.warning("%s runs unfused on this GPU, several times slower: %s", name, reason)
