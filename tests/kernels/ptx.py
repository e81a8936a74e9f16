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
from collections.abc import Callable

import numpy as np
import ptx_hopper
import torch
from ptx_hopper import Described
from torch import Tensor

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
BASE_BITS = 40  # the i-th argument that is a tensor lies at (i + 1) << 40
SMALLEST_NORMAL = np.float32(2.0**-126)
# By how many ulps of its correctly rounded result a special function may be off: PTX ISA, sections on ex2.approx,
# div.full and rsqrt.approx (whose limit is 2^-22.9 of the result).
ULPS = {"ex2": 2.0, "div": 2.0, "rsqrt": 2.14}


def run(ptx: str, programs: int, arguments: list[Tensor | Described | float | int], seed: int | None = None) -> None:
    """Launches the only kernel in `ptx`; arguments: all but compile-time ones. Tensors (on the CPU) are written to.

    With a seed, every result of a special function is `ULPS` off, up or down; else it is correctly rounded.
    """
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    instructions, labels = _parsed(ptx)
    groups = [(0, Machine(programs, threads, arguments, seed))]  # of programs that go the same way
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
        statement = statement.strip().removeprefix("{").strip() if "," not in statement else statement.strip()
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
    return [argument, None, None, None, None] if isinstance(argument, Described) else [argument]


class Machine:
    def __init__(self, programs: int, threads: int, arguments: list, seed: int | None):
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
            "%ctaid.x": program.astype(np.uint32),
            "%nctaid.x": np.full(len(program), programs, np.uint32),
            "global_smem": np.zeros(1, np.uint32),
        }

    def _parameters(self, argument: Tensor | Described | float | int) -> list[np.ndarray]:
        if isinstance(argument, Tensor):
            self.tensors.append(argument.view(-1).view(torch.uint8).numpy())
            return [np.array([len(self.tensors) << BASE_BITS], np.uint64)]
        if isinstance(argument, Described):  # the map, the sizes and the strides
            sizes = [np.array([n], np.uint32) for n in argument.matrix.shape]
            return [np.zeros(1, np.uint64), *sizes, *(np.array([n], np.uint64) for n in argument.matrix.stride())]
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
        if ptx_hopper.serves(opcode):
            return ptx_hopper.step(self, opcode, operands, where)
        if name in ("ldmatrix", "stmatrix"):
            return self._matrices(name, "trans" in modifiers, operands)
        if name in ("ld", "st"):
            return self._memory(name, modifiers, operands, where)
        if name == "bar" or opcode.startswith(("cp.async.commit", "cp.async.wait")):
            return None
        if opcode.startswith("cp.async"):  # at once
            return self._copied(operands, where)
        if name == "mma":
            return self._multiplied(modifiers, operands)
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
            result = _arithmetic(name, modifiers[:-1], kind, self._sources(name, modifiers, sources), self.seed)
        return self.write(target, result, where)

    def _sources(self, name: str, modifiers: list[str], sources: list[str]) -> list[np.ndarray]:
        """Typed by the instruction's last modifier; what differs from that in a few instructions is handled here."""
        kind = modifiers[-1]
        sizes = [_size(kind)] * len(sources)
        if kind == "pred":
            return [self.registers[o] if o in self.registers else np.array([bool(int(o))]) for o in sources]
        if name == "selp":
            return [*(self.read(o, sizes[0]) for o in sources[:2]), self.registers[sources[2]]]
        if name in ("shl", "shr", "bfe"):
            sizes[1:] = [4] * (len(sources) - 1)
        elif "wide" in modifiers and name == "mad":
            sizes[2] *= 2
        values = [self.read(o, s) for o, s in zip(sources, sizes, strict=True)]
        return [_typed(v, kind) if v.dtype.itemsize == _size(kind) else v for v in values]

    def _memory(self, name: str, modifiers: list[str], operands: list, where: np.ndarray | None) -> None:
        space, kind = modifiers[0], modifiers[-1]
        if space == "param":
            which = self.read(operands[1][1:-1], 4)
            first, last = which.min(), which.max()
            return self.write(operands[0], np.choose(which - first, self.parameters[first : last + 1]), where)
        size = _size(kind)
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

    def _copied(self, operands: list, where: np.ndarray | None) -> None:
        """The first of so many bytes, zeros for the rest, from global to shared memory."""
        target, source, size, given = operands
        registers = [f"%copied{i}" for i in range(int(size, 0) // 4)]
        for register in registers:
            self.registers[register] = np.zeros(len(self.program), np.uint32)
        given = np.broadcast_to(self.read(given, 4), self.program.shape)
        whole = given == int(size, 0)
        assert (whole | (given == 0)).all(), "only a part of some bytes is copied"
        self._memory("ld", ["global", "b32"], [registers, source], whole if where is None else whole & where)
        self._memory("st", ["shared", "b32"], [target, registers], where)

    def _multiplied(self, modifiers: list[str], operands: list[list[str]]) -> None:
        """d = a b + c of 16 x 16 and 16 x 8: sums in fp64, rounded once to fp32."""
        assert modifiers[:5] == ["sync", "aligned", "m16n8k16", "row", "col"] and modifiers[5] == modifiers[8] == "f32"
        lane = np.arange(32)
        group, pair = lane // 4, lane % 4 * 2

        def fragments(names: list[str]) -> np.ndarray:  # [registers, warps, lanes]
            return np.stack([np.broadcast_to(self.read(n, 4), self.program.shape).reshape(-1, 32) for n in names])

        warps = len(self.program) // 32
        a, b, c = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
        for i, bits in enumerate(fragments(operands[1])):
            for k, half in enumerate(_typed(bits.reshape(-1), modifiers[6] + "x2")):
                a[:, group + i % 2 * 8, pair + i // 2 * 8 + k] = half.reshape(-1, 32)
        for i, bits in enumerate(fragments(operands[2])):
            for k, half in enumerate(_typed(bits.reshape(-1), modifiers[7] + "x2")):
                b[:, pair + i * 8 + k, group] = half.reshape(-1, 32)
        for i, bits in enumerate(fragments(operands[3])):
            c[:, group + i // 2 * 8, pair + i % 2] = bits.view(np.float32)
        d = (a @ b + c).astype(np.float32)
        for i, name in enumerate(operands[0]):
            self.write(name, _bits(d[:, group + i // 2 * 8, pair + i % 2].reshape(-1), "f32"), None)

    def _matrices(self, name: str, transposed: bool, operands: list) -> None:
        """8 x 8 matrices of 16 bits; lanes 8 i to 8 i + 7 have the addresses of the i-th one's rows."""
        pointer, registers = operands if name == "stmatrix" else operands[::-1]
        address = self.address(pointer) + self.program * self.shared.shape[1]
        assert not (address % 16).any(), f"misaligned {name}"
        row_of_8 = address.reshape(-1, 32)
        memory, lane = self.shared.reshape(-1).view(np.uint16), np.arange(32)
        for i, register in enumerate(registers):
            if transposed:  # a lane has elements (2 (lane % 4), lane // 4) and the one below
                halves = [row_of_8[:, 8 * i + lane % 4 * 2 + k] // 2 + lane // 4 for k in (0, 1)]
            else:
                halves = [row_of_8[:, 8 * i + lane // 4] // 2 + lane % 4 * 2 + k for k in (0, 1)]
            place = np.stack([h.reshape(-1) for h in halves], 1)
            if name == "ldmatrix":
                self.write(register, np.ascontiguousarray(memory[place]).view(np.uint32)[:, 0], None)
            else:
                value = np.broadcast_to(self.read(register, 4), self.program.shape)
                memory[place] = np.ascontiguousarray(value)[:, None].view(np.uint16)

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
            values = [_typed(np.ascontiguousarray(h[:, i]), kind) for h in halves]
            self.write(operands[i], _COMPARISONS[modifiers[0]](*values), None)

    def _converted(self, modifiers: list[str], sources: list[str]) -> np.ndarray:
        to, source = modifiers[-2], modifiers[-1]
        values = [_typed(self.read(o, _size(source)), source) for o in sources]
        if to in _PAIRS:  # the first source is the upper half
            dtype = _PAIRS[to]
            halves = [torch.from_numpy(np.array(np.broadcast_to(v, self.program.shape))) for v in values]
            if dtype.itemsize == 1:  # .satfinite
                largest = torch.finfo(dtype).max
                halves = [h.clamp(-largest, largest) for h in halves]
            pair = torch.stack(halves[::-1], 1).to(dtype)
            return pair.view(torch.int16 if dtype.itemsize == 1 else torch.int32)[:, 0].numpy().view(
                np.uint16 if dtype.itemsize == 1 else np.uint32
            )  # fmt: skip
        return _bits(_cast(values[0], to), to)


_PAIRS = {
    "bf16x2": torch.bfloat16, "f16x2": torch.float16, "e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2,
}  # fmt: skip


def _size(kind: str) -> int:
    return 4 if kind.endswith("x2") else int(re.search(r"\d+", kind)[0]) // 8 if kind != "pred" else 1


def _typed(bits: np.ndarray, kind: str) -> np.ndarray:
    """Numbers of some bits: bf16 and f16 as fp32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind.endswith("x2"):
        return np.stack([_typed(np.ascontiguousarray(h), kind[:-2]) for h in bits[:, None].view(np.uint16).T])
    return bits.view({"f": np.float32, "s": f"i{_size(kind)}"}.get(kind[0], UNSIGNED[_size(kind)]))


def _bits(value: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of _typed; bf16 and f16 are rounded to nearest even."""
    if kind.endswith("x2"):
        low, high = (_bits(v, kind[:-2]).astype(np.uint32) for v in value)
        return low | high << 16
    if kind in ("bf16", "f16"):
        half = torch.from_numpy(np.ascontiguousarray(value, np.float32)).to(_PAIRS[kind + "x2"])
        return half.view(torch.int16).numpy().view(np.uint16)
    return np.ascontiguousarray(value).view(UNSIGNED[value.dtype.itemsize])


def _cast(value: np.ndarray, kind: str) -> np.ndarray:
    if kind[0] in "su":
        return value.astype(f"{'i' if kind[0] == 's' else 'u'}{_size(kind)}")
    return value.astype(np.float32)


_COMPARISONS: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": lambda a, b: ~(a == b), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "ltu": lambda a, b: ~(a >= b),
}  # fmt: skip


def _arithmetic(name: str, modifiers: list[str], kind: str, v: list[np.ndarray], seed: int | None) -> np.ndarray:
    """The bits of one instruction's result."""
    with np.errstate(all="ignore"):
        if name == "setp":
            return _COMPARISONS[modifiers[0]](*v)
        if name == "selp":
            return np.where(v[2], v[0], v[1])
        if "wide" in modifiers:
            wide = "i8" if kind[0] == "s" else "u8"
            product = v[0].astype(wide) * v[1].astype(wide)
            return _bits(product if name == "mul" else product + v[2].view(wide), "b64")
        if name in ("shl", "shr"):
            return _bits(np.left_shift(*_same(v)) if name == "shl" else np.right_shift(*_same(v)), kind)
        if name == "bfe":
            field = (v[0] >> v[1].astype(v[0].dtype)) & ((1 << int(v[2][0])) - 1)
            top = 1 << (int(v[2][0]) - 1)
            return _bits(((field ^ top) - top if kind[0] == "s" else field).astype(v[0].dtype), kind)
        if name == "prmt":
            return _permuted(*v)
        if name == "div" and kind[0] in "su":  # C's: towards zero
            return _bits(np.trunc(v[0].astype(np.float64) / v[1]).astype(v[0].dtype), kind)
        if "ftz" in modifiers:
            v = [_flushed(x) for x in v]
        result = _FUNCTIONS[name](*v)
        if name == "fma" and kind == "f32":
            result = (v[0].astype(np.float64) * v[1] + v[2]).astype(np.float32)
        if name in _SPECIAL and "rn" not in modifiers:
            result = _off(_SPECIAL[name](*(x.astype(np.float64) for x in v)), ULPS[name], seed)
            result = _flushed(result) if "ftz" in modifiers else result
        if name in ("max", "min") and "NaN" not in modifiers:
            result = {"max": np.fmax, "min": np.fmin}[name](*v)
        if result.dtype == bool:
            return result
        return _bits(result, kind)


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Each nibble of the selector takes one of the eight bytes of a and b, or its sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(1, np.uint64)
    for i in range(4):
        nibble = int(selector[0]) >> 4 * i & 15
        byte = both >> np.uint64(8 * (nibble & 7)) & np.uint64(255)
        byte = (byte >> np.uint64(7)) * np.uint64(255) if nibble & 8 else byte
        result = result | byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def _same(v: list[np.ndarray]) -> list[np.ndarray]:
    return [v[0], v[1].astype(v[0].dtype)]


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def _off(exact: np.ndarray, ulps: float, seed: int | None) -> np.ndarray:
    """exact (fp64) in fp32; with a seed, `ulps` up or down from there, always the same way for the same number."""
    rounded = exact.astype(np.float32)
    if seed is None:
        return rounded
    up = rounded.view(np.uint32) * np.uint32(2654435761 + 2 * seed) >> 31  # a hash
    moved = rounded + np.where(up, ulps, -ulps) * np.spacing(np.abs(rounded)).astype(np.float64)
    return np.where(np.isfinite(rounded) & (rounded != 0), moved, rounded).astype(np.float32)


_SPECIAL: dict[str, Callable] = {"ex2": np.exp2, "div": np.divide, "rsqrt": lambda x: 1 / np.sqrt(x)}
_FUNCTIONS: dict[str, Callable] = _SPECIAL | {
    "mov": lambda a: a, "cvta": lambda a: a, "abs": np.abs, "neg": np.negative, "not": np.invert,
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": lambda a, b, c: a * b + c,
    "mad": lambda a, b, c: a * b + c, "max": np.maximum, "min": np.minimum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
