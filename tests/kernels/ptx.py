"""Runs a compiled kernel on the CPU: the PTX that a GPU would get, by numpy, every instruction for all threads at once.

Triton's interpreter runs the source. This runs what the compiler made of it: fused multiply-adds, the approximate
special functions and their flushed underflow, rounding to bf16, 128-bit accesses, shuffles. A read or write outside of
its tensor, a misaligned one, and two threads that write different values to one place are errors. All threads of
a program go in step, so a missing barrier is not seen. The threads of a program must branch together.
"""

from __future__ import annotations

import copy
import functools
import re

import numpy as np
import ptx_ampere
import ptx_hopper
import torch
from ptx_arithmetic import COMPARISONS, PAIRS, UNSIGNED, bits_of, cast, result_of, size_of, typed
from ptx_hopper import Described
from torch import Tensor

BASE_BITS = 40  # the i-th argument that is a tensor lies at (i + 1) << 40


def run(
    ptx: str, programs: int, arguments: list[Tensor | Described | float | int], seed: int | None = None, first: int = 0
) -> None:
    """Launches the only kernel in `ptx`; arguments: all but compile-time ones. Tensors (on the CPU) are written to.

    Programs before `first` are left out.

    With a seed, every result of a special function is `ULPS` off, up or down; else it is correctly rounded.
    """
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    instructions, labels = _parsed(ptx)
    groups = [(0, Machine(programs, threads, arguments, seed, first))]  # of programs that go the same way
    while groups:
        at, machine = groups.pop()
        while at < len(instructions):
            predicate, opcode, operands = instructions[at]
            at += 1
            if opcode == "bra":
                taken = machine.condition(predicate)
                if not taken.all() and taken.any():
                    groups.append((labels[operands[0]], machine.those(taken)))
                    machine = machine.those(~taken)
                elif taken.any():
                    at = labels[operands[0]]
                continue
            if opcode == "ret":
                break
            try:
                machine.step(predicate, opcode, operands)
            except Exception as error:
                error.add_note(f"in {predicate} {opcode} {operands}")
                raise


@functools.cache
def _parsed(ptx: str) -> tuple[list[tuple], dict[str, int]]:
    """(predicate or "", opcode, operands) of each instruction, an operand in braces being a list; and labels."""
    body = ptx[ptx.index("{", ptx.index(".entry")) :]
    body = re.sub(r"//[^\n]*", "", body[: body.index("$L__func_end0:")])
    instructions, labels = [], {}
    for statement in re.split(r"[;\n]", body):
        statement = statement.strip()
        if label := re.fullmatch(r"(\$?\w+):", statement):
            labels[label[1]] = len(instructions)
        elif found := re.fullmatch(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", statement):
            operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s|][^,|]*", found[3] or "")
            opcode = "bra" if found[2].startswith("bra") else found[2]
            instructions.append((found[1] or "", opcode, [_operand(o.strip()) for o in operands]))
    return instructions, labels


def _operand(text: str) -> str | list[str]:
    return [o.strip() for o in text[1:-1].split(",")] if text[0] == "{" else text


def _places(argument: object) -> list[object]:
    """The argument at its first place among a kernel's parameters, and None at its others."""
    return [argument, *[None] * 2 * argument.matrix.dim()] if isinstance(argument, Described) else [argument]


class Machine:
    def __init__(self, launched: int, threads: int, arguments: list, seed: int | None, first: int):
        programs = launched - first
        self.threads, self.seed = threads, seed
        self.tensors: list[np.ndarray] = []
        nothing = np.zeros(1, np.uint64)  # Triton's two own pointers, to scratch memory and profile
        self.parameters = [*(p for a in arguments for p in self._parameters(a)), nothing, nothing]
        self.described = dict(enumerate(p for a in arguments for p in _places(a)))
        self.shared = np.zeros((programs, 232448), np.uint8)  # what a Hopper program may have
        thread, program = np.arange(programs * threads) % threads, np.arange(programs * threads) // threads
        self.program = program
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": thread.astype(np.uint32),
            "%ctaid.x": (program + first).astype(np.uint32),
            "%nctaid.x": np.full(len(program), launched, np.uint32),
            "global_smem": np.zeros(1, np.uint32),
        }

    def _parameters(self, argument: Tensor | Described | float | int) -> list[np.ndarray]:
        if isinstance(argument, Tensor):
            self.tensors.append(argument.view(-1).view(torch.uint8).numpy())
            return [np.array([len(self.tensors) << BASE_BITS], np.uint64)]
        if isinstance(argument, Described):  # the map, the sizes and the strides
            sizes = [np.array([n], np.uint32) for n in argument.matrix.shape]
            return [np.zeros(1, np.uint64), *sizes, *(np.array([n], np.uint64) for n in argument.matrix.stride())]
        if isinstance(argument, int) and argument >= 2**31:
            return [np.array([argument], np.uint64)]
        return [np.array([argument], np.float32 if isinstance(argument, float) else np.int32).view(np.uint32)]

    def condition(self, predicate: str) -> np.ndarray:
        """Of a branch, which all threads of a program take or none."""
        if not predicate:
            return np.ones(len(self.program), bool)
        value = np.broadcast_to(self.registers[predicate.lstrip("!")] ^ predicate.startswith("!"), self.program.shape)
        by_program = value.reshape(-1, self.threads)
        assert (by_program == by_program[:, :1]).all(), "threads of a program go different ways"
        return value

    def those(self, which: np.ndarray) -> Machine:
        """The machine of these threads only."""
        part = copy.copy(self)
        part.program = self.program[which]
        part.registers = {k: v[which] if len(v) > 1 else v for k, v in self.registers.items()}
        return part

    # --- operands -----------------------------------------------------------------------------------------------------
    def read(self, operand: str, size: int) -> np.ndarray:
        """Bits of a register or a number, [threads] or [1]."""
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("0f"):
            return np.array([int(operand[2:], 16)], np.uint32)
        if "_param_" in operand:  # a parameter's address is its number
            return np.array([int(operand.rpartition("_")[2])], UNSIGNED[size])
        if operand.startswith("%"):  # never written: what it holds must not matter
            return np.full(1, -1, np.int64).view(np.uint64).astype(UNSIGNED[size])
        return np.array([int(operand.rstrip("U"), 0)], np.int64).view(np.uint64).astype(UNSIGNED[size])

    def write(self, name: str, value: np.ndarray, where: np.ndarray | None) -> None:
        if where is not None and name in self.registers:
            value = np.where(where, value, self.registers[name])
        self.registers[name] = value

    # --- one instruction ----------------------------------------------------------------------------------------------
    def step(self, predicate: str, opcode: str, operands: list) -> None:
        where = None
        if predicate:
            where = self.registers[predicate.lstrip("!")] ^ predicate.startswith("!")
        name, *modifiers = opcode.split(".")
        for generation in (ptx_hopper, ptx_ampere):
            if generation.serves(opcode):
                return generation.step(self, opcode, operands, where)
        if name in ("ld", "st"):
            return self.memory(name, modifiers, operands, where)
        if name == "bar":
            return None
        if name == "mov" and any(isinstance(o, list) for o in operands):
            return self._repack(operands, where)
        if name == "shfl":
            return self.write(operands[0], self._shuffled(*operands[1:4], modifiers), where)
        target, *sources = operands
        if name == "cvt":
            result = self._converted(modifiers, sources)
        elif name == "setp" and modifiers[1].endswith("x2"):
            return self._compared_halves(modifiers, operands)
        else:
            kind = modifiers[-1]
            result = result_of(name, modifiers[:-1], kind, self._sources(name, modifiers, sources), self.seed)
        return self.write(target, result, where)

    def _sources(self, name: str, modifiers: list[str], sources: list[str]) -> list[np.ndarray]:
        """Typed by the instruction's last modifier; what differs from that in a few instructions is handled here."""
        kind = modifiers[-1]
        sizes = [size_of(kind)] * len(sources)
        if kind == "pred":
            return [self.registers[o] if o in self.registers else np.array([bool(int(o))]) for o in sources]
        if name == "selp":
            return [*(self.read(o, sizes[0]) for o in sources[:2]), self.registers[sources[2]]]
        if name in ("shl", "shr", "bfe"):
            sizes[1:] = [4] * (len(sources) - 1)
        elif "wide" in modifiers and name == "mad":
            sizes[2] *= 2
        values = [self.read(o, s) for o, s in zip(sources, sizes, strict=True)]
        return [typed(v, kind) if v.dtype.itemsize == size_of(kind) else v for v in values]

    def memory(self, name: str, modifiers: list[str], operands: list, where: np.ndarray | None) -> None:
        space, kind = modifiers[0], modifiers[-1]
        if space == "param":
            which = self.read(operands[1][1:-1], 4)
            first, last = which.min(), which.max()
            return self.write(operands[0], np.choose(which - first, self.parameters[first : last + 1]), where)
        size = size_of(kind)
        pointer, data = (operands[1], operands[0]) if name == "ld" else (operands[0], operands[1])
        data = data if isinstance(data, list) else [data]
        address = self.address(pointer)
        active = np.ones(len(address), bool) if where is None else np.broadcast_to(where, address.shape)
        if space == "global":
            memory, place = self._global(address, active, size * len(data))
        else:
            memory, place = self.shared.reshape(-1), address + self.program * self.shared.shape[1]
        assert not (address[active] % (size * len(data))).any(), f"misaligned {name}.{'.'.join(modifiers)}"
        memory = memory[: len(memory) // size * size].view(UNSIGNED[size])
        for i, register in enumerate(data):
            index = place[active] // size + i
            if name == "ld":
                value = np.zeros(len(address), UNSIGNED[max(size, 2)])  # there are no registers of 8 bits
                value[active] = memory[index]
                self.write(register, value, active if where is not None else None)
            else:
                value = np.broadcast_to(self.read(register, size), address.shape)[active].astype(UNSIGNED[size])
                memory[index] = value
                assert (memory[index] == value).all(), "threads write different values to one place"

    def address(self, pointer: str) -> np.ndarray:
        register, _, offset = pointer[1:-1].partition("+")
        address = self.read(register.strip(), 8).astype(np.int64) + int(offset or 0)
        return np.broadcast_to(address, self.program.shape)

    def _global(self, address: np.ndarray, active: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        if not active.any():
            return np.zeros(size, np.uint8), address
        which = np.unique(address[active] >> BASE_BITS)
        assert len(which) == 1 and 1 <= which[0] <= len(self.tensors), f"an address outside of every tensor: {which}"
        memory = self.tensors[which[0] - 1]
        place = address - (int(which[0]) << BASE_BITS)
        inside = (place[active] >= 0) & (place[active] + size <= len(memory))
        assert inside.all(), f"{(~inside).sum()} accesses outside of tensor {which[0] - 1}"
        return memory, place

    def _repack(self, operands: list, where: np.ndarray | None) -> None:
        target, source = operands
        if isinstance(target, list):
            value = self.read(source, 4)
            size = value.dtype.itemsize // len(target)
            value = np.ascontiguousarray(value)[:, None].view(UNSIGNED[size])
            for i, name in enumerate(target):
                if name != "_":
                    self.write(name, np.ascontiguousarray(value[:, i]), where)
        else:
            parts = [self.read(o, 2) for o in source]
            parts = np.stack(np.broadcast_arrays(*parts), 1)
            self.write(target, np.ascontiguousarray(parts).view(UNSIGNED[parts.shape[1] * parts.itemsize])[:, 0], where)

    def _shuffled(self, value: str, lane: str, clamp: str, modifiers: list[str]) -> np.ndarray:
        assert modifiers[1] in ("bfly", "idx") and clamp == "31", modifiers
        value, lane = (np.broadcast_to(self.read(o, 4), self.program.shape).reshape(-1, 32) for o in (value, lane))
        source = lane ^ np.arange(32, dtype=np.uint32) if modifiers[1] == "bfly" else lane & 31
        return np.take_along_axis(value, source.astype(np.int64), 1).reshape(-1)

    def _compared_halves(self, modifiers: list[str], operands: list[str]) -> None:
        kind = modifiers[1][:-2]
        halves = [np.ascontiguousarray(self.read(o, 4)).view(np.uint16).reshape(-1, 2) for o in operands[2:]]
        for i in (0, 1):
            values = [typed(np.ascontiguousarray(h[:, i]), kind) for h in halves]
            self.write(operands[i], COMPARISONS[modifiers[0]](*values), None)

    def _converted(self, modifiers: list[str], sources: list[str]) -> np.ndarray:
        to, source = modifiers[-2], modifiers[-1]
        values = [typed(self.read(o, size_of(source)), source) for o in sources]
        if to in PAIRS:  # the first source is the upper half
            dtype = PAIRS[to]
            halves = [torch.from_numpy(np.array(np.broadcast_to(v, self.program.shape))) for v in values]
            if dtype.itemsize == 1:  # .satfinite
                largest = torch.finfo(dtype).max
                halves = [h.clamp(-largest, largest) for h in halves]
            pair = torch.stack(halves[::-1], 1).to(dtype)
            return pair.view(torch.int16 if dtype.itemsize == 1 else torch.int32)[:, 0].numpy().view(
                np.uint16 if dtype.itemsize == 1 else np.uint32
            )  # fmt: skip
        return bits_of(cast(values[0], to), to)
