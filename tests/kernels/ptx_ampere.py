"""Ampere's instructions for `ptx`: copies to shared memory that run ahead, matrices of 8 x 8, and their products.

Copies are done at once, so that they are waited for is not seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from ptx_arithmetic import bits_of, typed

if TYPE_CHECKING:
    from ptx import Machine


def serves(opcode: str) -> bool:
    return opcode.startswith(("cp.async.c", "cp.async.wait_group", "ldmatrix", "stmatrix", "mma."))


def step(machine: Machine, opcode: str, operands: list, where: np.ndarray | None) -> None:
    name, *modifiers = opcode.split(".")
    if name == "mma":
        _multiply(machine, modifiers, operands)
    elif name in ("ldmatrix", "stmatrix"):
        _move(machine, name, "trans" in modifiers, operands)
    elif operands and modifiers[1] in ("ca", "cg"):
        _copy(machine, operands, where)


def _copy(machine: Machine, operands: list, where: np.ndarray | None) -> None:
    """The first of so many bytes, zeros for the rest, from global to shared memory."""
    target, source, size, given = operands
    registers = [f"%copied{i}" for i in range(int(size, 0) // 4)]
    for register in registers:
        machine.registers[register] = np.zeros(len(machine.program), np.uint32)
    given = np.broadcast_to(machine.read(given, 4), machine.program.shape)
    whole = given == int(size, 0)
    assert (whole | (given == 0)).all(), "only a part of some bytes is copied"
    machine.memory("ld", ["global", "b32"], [registers, source], whole if where is None else whole & where)
    machine.memory("st", ["shared", "b32"], [target, registers], where)


def _multiply(machine: Machine, modifiers: list[str], operands: list[list[str]]) -> None:
    """d = a b + c of 16 x 16 and 16 x 8: sums in fp64, rounded once to fp32."""
    assert modifiers[:5] == ["sync", "aligned", "m16n8k16", "row", "col"] and modifiers[5] == modifiers[8] == "f32"
    lane = np.arange(32)
    group, pair = lane // 4, lane % 4 * 2

    def fragments(names: list[str]) -> np.ndarray:  # [registers, warps, lanes]
        return np.stack([np.broadcast_to(machine.read(n, 4), machine.program.shape).reshape(-1, 32) for n in names])

    warps = len(machine.program) // 32
    a, b, c = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
    for i, bits in enumerate(fragments(operands[1])):
        for k, half in enumerate(typed(bits.reshape(-1), modifiers[6] + "x2")):
            a[:, group + i % 2 * 8, pair + i // 2 * 8 + k] = half.reshape(-1, 32)
    for i, bits in enumerate(fragments(operands[2])):
        for k, half in enumerate(typed(bits.reshape(-1), modifiers[7] + "x2")):
            b[:, pair + i * 8 + k, group] = half.reshape(-1, 32)
    for i, bits in enumerate(fragments(operands[3])):
        c[:, group + i // 2 * 8, pair + i % 2] = bits.view(np.float32)
    d = (a @ b + c).astype(np.float32)
    for i, name in enumerate(operands[0]):
        machine.write(name, bits_of(d[:, group + i // 2 * 8, pair + i % 2].reshape(-1), "f32"), None)


def _move(machine: Machine, name: str, transposed: bool, operands: list) -> None:
    """8 x 8 matrices of 16 bits; lanes 8 i to 8 i + 7 have the addresses of the i-th one's rows."""
    pointer, registers = operands if name == "stmatrix" else operands[::-1]
    address = machine.address(pointer) + machine.program * machine.shared.shape[1]
    assert not (address % 16).any(), f"misaligned {name}"
    row_of_8 = address.reshape(-1, 32)
    memory, lane = machine.shared.reshape(-1).view(np.uint16), np.arange(32)
    for i, register in enumerate(registers):
        if transposed:  # a lane has elements (2 (lane % 4), lane // 4) and the one below
            halves = [row_of_8[:, 8 * i + lane % 4 * 2 + k] // 2 + lane // 4 for k in (0, 1)]
        else:
            halves = [row_of_8[:, 8 * i + lane // 4] // 2 + lane % 4 * 2 + k for k in (0, 1)]
        place = np.stack([h.reshape(-1) for h in halves], 1)
        if name == "ldmatrix":
            machine.write(register, np.ascontiguousarray(memory[place]).view(np.uint32)[:, 0], None)
        else:
            value = np.broadcast_to(machine.read(register, 4), machine.program.shape)
            memory[place] = np.ascontiguousarray(value)[:, None].view(np.uint16)
