"""Within `emulated_gpu()`, launching a Triton kernel on CPU tensors runs what it compiles to for a GPU (see `ptx`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import ptx
import ptx_hopper
import torch
import triton
from compiled import compiled_by_triton
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip


@contextmanager
def emulated_gpu(arch: int = 90, seed: int | None = None, last_only: bool = False) -> Iterator[None]:
    """arch: 80 or 90. With a seed, special functions are as far off as NVIDIA allows. last_only: of a grid's programs
    only the last one runs."""

    def run(kernel: triton.JITFunction, *args, grid, warmup=False, **kwargs):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        given = {name: _type(value) for name, value in arguments.items() if not _is_constant(kernel, name, value)}
        constants = {name: value for name, value in arguments.items() if name not in given}
        divisible = [name for name in given if _is_divisible(arguments[name])]
        code, maps = _compiled(kernel, tuple(given.items()), tuple(constants.items()), arch, tuple(divisible))
        maps = iter(maps)
        values = [arguments[name] for name in kernel.arg_names if name in given]
        values = [_described(v, next(maps)) if isinstance(v, TensorDescriptor) else v for v in values]
        ptx.run(code, grid[0], values, seed, first=grid[0] - 1 if last_only else 0)

    with mock.patch.object(triton.JITFunction, "run", run):
        yield


@functools.cache
def _compiled(kernel: triton.JITFunction, given: tuple, constants: tuple, arch: int, divisible: tuple):
    """(PTX, how each tensor map is to be made)."""
    binary = compiled_by_triton(kernel, dict(given), dict(constants), arch, divisible)
    return binary.asm["ptx"], getattr(binary.metadata, "tensordesc_meta", None) or []


def _described(descriptor: TensorDescriptor, how: dict) -> ptx_hopper.Described:
    row_bytes = {0: 0, 1: 32, 2: 64, 3: 128}[how["swizzle"]]
    matrix = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    return ptx_hopper.Described(matrix, tuple(how["block_size"]), row_bytes)


def _is_constant(kernel: triton.JITFunction, name: str, value: object) -> bool:
    """As Triton has it: declared to be, or nothing, or the number 1, or no argument but an option."""
    if name not in kernel.arg_names or value is None or (isinstance(value, int) and value == 1):
        return True
    return kernel.params[kernel.arg_names.index(name)].is_constexpr


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"


def _is_divisible(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
