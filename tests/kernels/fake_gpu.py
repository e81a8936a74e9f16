"""Within `fake_gpu()`, the host code of our kernels runs as on a GPU: tensors on CUDA devices that hold nothing, and
Triton's own launch, up to the compiler, in whose place a list keeps what is launched.

So what waits for the GPU to read a value raises, as does a tensor that was left on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_xact.kernels import backends, fp8_operators, triton_gemm

MULTIPROCESSORS = {80: 108, 90: 132}
CACHED = (backends.triton_unavailable_reason, backends._triton_is_there, fp8_operators.gpu_has_fp8,
          triton_gemm._is_hopper, triton_gemm._multiprocessors)  # fmt: skip


class Launch(NamedTuple):
    kernel: triton.JITFunction
    device: int  # the current one
    grid: tuple[int, int, int]
    arguments: dict[str, object]


class _CurrentDevice:
    """torch.cuda.device"""

    number = 0

    def __init__(self, device: torch.device):
        self.new = device.index

    def __enter__(self):
        self.old, _CurrentDevice.number = _CurrentDevice.number, self.new

    def __exit__(self, *_):
        _CurrentDevice.number = self.old


@contextmanager
def fake_gpu(arch: int = 90) -> Iterator[list[Launch]]:
    """arch: 80 or 90. The first of several devices is the current one."""
    launches: list[Launch] = []
    compiled: set[triton.JITFunction] = set()
    addresses: dict[int, tuple[int, object]] = {}  # of storages, which stay alive

    def compile_(kernel, key, *_):
        def run(grid_0, grid_1, grid_2, stream, *rest):
            arguments = dict(zip(kernel.arg_names, rest[-len(kernel.arg_names) :], strict=True))
            launches.append(Launch(kernel, _CurrentDevice.number, (grid_0, grid_1, grid_2), arguments))

        compiled.add(kernel)
        return SimpleNamespace(run=run, function=0, packed_metadata=(), launch_metadata=lambda *_: None)

    def data_ptr(tensor: FakeTensor) -> int:
        storage = tensor.untyped_storage()
        start, _ = addresses.setdefault(storage._cdata, (1 << 40 | len(addresses) << 36, storage))
        return start + tensor.storage_offset() * tensor.itemsize

    driver = SimpleNamespace(
        get_current_device=lambda: _CurrentDevice.number,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS[arch])
    patches = {
        "is_available": lambda: True,
        "device": _CurrentDevice,
        "get_device_capability": lambda *_: divmod(arch, 10),
        "get_device_properties": lambda *_: properties,
    }
    active = triton.runtime.driver._active
    with ExitStack() as stack:
        for name, stand_in in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context"))
        stack.enter_context(mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0"))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", data_ptr))
        stack.enter_context(mock.patch.object(triton.JITFunction, "_do_compile", compile_))
        stack.callback(lambda: [kernel.device_caches.clear() for kernel in compiled])
        stack.callback(lambda: [function.cache_clear() for function in CACHED])
        for function in CACHED:
            function.cache_clear()
        triton.runtime.driver.set_active(driver)
        stack.callback(triton.runtime.driver.set_active, active)
        stack.enter_context(FakeTensorMode())
        yield launches


def violations(launch: Launch, device: int) -> list[str]:
    """What CUDA would refuse about a launch for tensors of this device."""
    found = [] if launch.device == device else [f"device {launch.device} is current, not {device}"]
    if not (1 <= launch.grid[0] < 1 << 31 and launch.grid[1:] == (1, 1)):
        found.append(f"grid {launch.grid}")
    for name, value in launch.arguments.items():
        tensor = value.base if isinstance(value, TensorDescriptor) else value
        if isinstance(tensor, torch.Tensor) and tensor.device != torch.device("cuda", device):
            found.append(f"{name} is on {tensor.device}")
        if isinstance(value, TensorDescriptor):
            found += [f"{name}: {why}" for why in _refusals(value)]
    return found


def _refusals(descriptor: TensorDescriptor) -> list[str]:
    """By cuTensorMapEncodeTiled, as documented for CUDA 13."""
    size, sizes, (*pitches, _) = descriptor.base.itemsize, descriptor.shape, descriptor.strides
    checks = {
        "address": descriptor.base.data_ptr() % 16 == 0,
        "sizes": 1 <= min(sizes) and max(sizes) <= 1 << 32,
        "pitch": pitches[-1] >= sizes[-1] and all(p * size % 16 == 0 and p * size < 1 << 40 for p in pitches),
        "box": max(descriptor.block_shape) <= 256,
    }
    return [what for what, holds in checks.items() if not holds]
