"""What the plan knows about GPUs. Numbers are of the SXM boards in 8-GPU servers; each with its source.

Memory is what torch reports as the device's total, a little under the nominal size. Peak is dense bf16 without
sparsity. NVLink is per direction; the network is one InfiniBand port per GPU, as in NVIDIA's DGX of that generation.
Sources: the datasheets of A100 (2021: 312 TFLOP/s, 40 or 80 GB, NVLink 600 GB/s in both directions together), H100
(2022: 989 TFLOP/s, 80 GB, 900 GB/s) and H200 (2024: 989 TFLOP/s, 141 GB, 900 GB/s); the DGX A100 (8 x HDR, 200 Gbit/s)
and DGX H100 and H200 (8 x NDR, 400 Gbit/s) datasheets.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int
    """Bytes."""
    peak: float
    """Floating-point operations per second, dense bf16."""
    nvlink: float
    """Bytes per second and direction, to GPUs of the same server."""
    network: float
    """Bytes per second and direction, to other servers."""
    mfu: float
    """Assumed share of the peak while the GPU works, without the pipeline's bubble: see MFU_SOURCE."""


MFU_SOURCE = "Megatron-LM reports 41% for a dense 2B model on H100, 44% for 1.7B on A100; small models reach less"

GPUS = {
    "a100-40gb": Gpu("A100 40GB", int(39.4 * GIB), 312e12, 300e9, 25e9, 0.44),
    "a100": Gpu("A100 80GB", int(79.1 * GIB), 312e12, 300e9, 25e9, 0.44),
    "h100": Gpu("H100 80GB", int(79.1 * GIB), 989e12, 450e9, 50e9, 0.40),
    "h200": Gpu("H200 141GB", int(139.8 * GIB), 989e12, 450e9, 50e9, 0.40),
}
