"""What a speed in tokens per second means: FLOP/s of the model, share of the GPUs' peak; and the memory in use."""

from __future__ import annotations

from argparse import Namespace

import psutil
import torch
from megatron.training.training import num_floating_point_operations

from megatron_xact.pretraining import cpu_platform
from megatron_xact.pretraining.planning.hardware import GPUS


def model_flops(args: Namespace, tokens_per_second: float | None) -> float | None:
    """Floating-point operations per second of the whole run, by Megatron's count for a step (forward and backward)."""
    if not tokens_per_second:
        return None
    per_token = num_floating_point_operations(args, args.global_batch_size) / args.global_batch_size / args.seq_length
    return per_token * tokens_per_second


def mfu(args: Namespace, tokens_per_second: float | None) -> float | None:
    """`model_flops` over the dense bf16 peak of all GPUs; None on the CPU and on GPUs whose peak is not known here."""
    flops, peak = model_flops(args, tokens_per_second), _peak()
    return flops / (peak * args.world_size) if flops and peak else None


def _peak() -> float | None:
    if cpu_platform.is_active():
        return None
    name = torch.cuda.get_device_name().lower()
    # PCIe boards of the same name are slower.
    return next((gpu.peak for key, gpu in GPUS.items() if key in name and "pcie" not in name), None)


def memory_bytes() -> int:
    """The most this process has had allocated on its GPU; on the CPU, what it has resident."""
    if cpu_platform.is_active():
        return psutil.Process().memory_info().rss
    return torch.cuda.max_memory_allocated()
