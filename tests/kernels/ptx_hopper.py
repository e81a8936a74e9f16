"""Hopper's instructions for `ptx`: tiles between global and shared memory (TMA), products of matrices there (wgmma).

Copies and products are done at once, so waiting for them is nothing, and that something is waited for is not seen.
Matrices have 16-bit elements. Shared-memory layouts: PTX ISA, section on wgmma's matrix descriptors and swizzles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ptx import Machine

NOTHING_TO_DO = (
    "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "fence.", "mbarrier.init", "mbarrier.inval",
    "mbarrier.arrive", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group",
)  # fmt: skip
ROW_BYTES = {1: 128, 2: 64, 3: 32}  # of a matrix descriptor's swizzle


@dataclass(frozen=True)
class Described:
    """What a kernel gets as a tensor map, a matrix or several of one size; copied in boxes of as many dimensions."""

    matrix: Tensor
    box: tuple[int, ...]
    row_bytes: int  # of the swizzle


def serves(opcode: str) -> bool:
    return opcode.startswith((*NOTHING_TO_DO, "elect.", "mbarrier.try_wait", "cp.async.bulk.tensor", "wgmma.mma_async"))


def step(machine: Machine, opcode: str, operands: list, where: np.ndarray | None) -> None:
    if opcode.startswith(NOTHING_TO_DO):
        return
    if opcode.startswith("elect."):
        machine.write(operands[1], machine.registers["%tid.x"] % 32 == 0, None)
    elif opcode.startswith("mbarrier.try_wait"):
        machine.write(operands[0], np.ones(1, bool), None)
    elif opcode.startswith(("cp.async.bulk.tensor.2d.shared", "cp.async.bulk.tensor.3d.shared")):
        for memory, places, tile in _boxes(machine, operands[1], operands[0], where):
            memory[places] = tile
    elif opcode.startswith("cp.async.bulk.tensor.2d.global"):
        for memory, places, tile in _boxes(machine, operands[0], operands[1], where, writes=True):
            tile[...] = memory[places[tuple(map(slice, tile.shape))]]
    else:
        _multiply(machine, opcode, operands)


def _boxes(machine: Machine, described: str, pointer: str, where: np.ndarray | None, writes: bool = False):
    """Of each thread that copies: (its program's shared memory, the places of a box there, the box).

    What a box has beyond the matrix is 0 where read, and left out (of a view of the matrix) where written.
    """
    number, coordinates = described[1:-1].split(",", 1)
    names = [c.strip() for c in coordinates.strip()[1:-1].split(",")]  # the innermost dimension's first
    shape = machine.program.shape
    read = [np.broadcast_to(machine.read(o, 4), shape) for o in (number, *reversed(names))]
    address = machine.address(pointer)
    for thread in np.flatnonzero(np.broadcast_to(where, shape)):
        map_number, *start = (int(v[thread].astype(np.int32)) for v in read)
        given: Described = machine.described[map_number]
        places = np.arange(math.prod(given.box)).reshape(given.box) * 2
        assert given.box[-1] * 2 == given.row_bytes or not given.row_bytes, "a box is as wide as the swizzle"
        places = _swizzled(int(address[thread]) + places, given.row_bytes) // 2
        memory = machine.shared[machine.program[thread]].view(np.int16)
        whole = given.matrix.view(torch.int16).numpy()
        assert min(start) >= 0
        inside = whole[tuple(slice(first, first + n) for first, n in zip(start, given.box, strict=True))]
        if writes:
            yield memory, places, inside
        else:
            tile = np.zeros(given.box, np.int16)
            tile[tuple(map(slice, inside.shape))] = inside
            yield memory, places, tile


def _swizzled(address: np.ndarray, row_bytes: int) -> np.ndarray:
    """16-byte chunks of eight rows change places: their number's bits are flipped by those of the row's."""
    chunks = max(row_bytes // 16, 1)
    return address ^ (address >> 7 & (chunks - 1)) << 4


def _multiply(machine: Machine, opcode: str, operands: list) -> None:
    """d = a b (+ d) for 64 x 16 and 16 x n, of each four warps: sums in fp64, rounded once to fp32."""
    shape, kind = opcode.split(".")[4], opcode.split(".")[-1]
    n = int(shape.removeprefix("m64n").removesuffix("k16"))
    assert shape.endswith("k16") and kind in ("bf16", "f16"), opcode
    target, a, b, accumulate, _, _, a_is_transposed, b_is_transposed = operands
    groups = len(machine.program) // 128
    left = _matrices(machine, a, 64, a_is_transposed == "1", kind)
    right = _matrices(machine, b, n, b_is_transposed == "1", kind)
    thread = np.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
    product = left @ right.transpose(0, 2, 1)
    added = np.broadcast_to(machine.registers[accumulate], machine.program.shape).reshape(groups, 128)
    for i, name in enumerate(target):
        d = product[:, row + i % 4 // 2 * 8, column + i // 4 * 8 + i % 2]
        before = np.broadcast_to(machine.read(name, 4), machine.program.shape).view(np.float32).reshape(groups, 128)
        d = np.where(added, d + np.where(added, before, 0.0), d).astype(np.float32)
        machine.write(name, d.reshape(-1).view(np.uint32), None)


def _matrices(machine: Machine, descriptor: str, size: int, transposed: bool, kind: str) -> np.ndarray:
    """[groups of 128 threads, size, 16] of what a descriptor points at; transposed: `size` is contiguous, not 16."""
    bits = np.broadcast_to(machine.read(descriptor, 8), machine.program.shape)[::128].astype(np.uint64)
    program = machine.program[::128]
    start, leading, stride = (((bits >> np.uint64(s) & np.uint64(0x3FFF)).astype(np.int64) << 4) for s in (0, 16, 32))
    row_bytes = ROW_BYTES[int(bits[0] >> np.uint64(62))]
    i, k = np.arange(size)[:, None], np.arange(16)[None, :]
    if transposed:
        wide = row_bytes // 2
        place = (i // wide)[None] * leading[:, None, None] + (k // 8)[None] * stride[:, None, None]
        place = place + k % 8 * row_bytes + i % wide * 2
    else:
        place = (i // 8)[None] * stride[:, None, None] + i % 8 * row_bytes + k * 2
    address = _swizzled(start[:, None, None] + place, row_bytes)
    elements = machine.shared.view(np.int16)[program[:, None, None], address // 2]
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    return torch.from_numpy(np.ascontiguousarray(elements)).view(dtype).double().numpy()
