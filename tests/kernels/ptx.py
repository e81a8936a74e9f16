"""Runs a compiled kernel on the CPU: the PTX that a GPU would get, by numpy, every instruction for all threads at once.

Triton's interpreter runs the source. This runs what the compiler made of it: fused multiply-adds, the approximate
special functions and their flushed underflow, rounding to bf16, 128-bit accesses, shuffles. A read or write outside of
its tensor, a misaligned one, and two threads that write different values to one place are errors. All threads of
a program go in step, so a missing barrier is not seen; nor are branches, which no kernel of an activation has.

A special function is as far off as NVIDIA allows, by `Errors`: PTX ISA 9.0, sections on ex2, rsqrt and div.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
BASE_BITS = 40  # the i-th argument that is a tensor lies at (i + 1) << 40
SMALLEST_NORMAL = np.float32(2.0**-126)


@dataclass(frozen=True)
class Errors:
    """What a special function adds to its correctly rounded result, in ulps of it."""

    ex2: float = 0.0  # at most 2
    div: float = 0.0  # at most 2
    rsqrt: float = 0.0  # 2^-22.9 of the result: at most 1.07


# the worst that is allowed, in every direction
WORST = [Errors(ex2, div, rsqrt) for ex2 in (2, -2) for div, rsqrt in ((2, 1.07), (-2, -1.07))]


def run(ptx: str, programs: int, arguments: list[Tensor | float | int | None], errors: Errors = Errors()) -> None:
    """Launches the only kernel in `ptx`; arguments: all but compile-time ones. Tensors (on the CPU) are written to."""
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    machine = _Machine(programs, threads, arguments, errors)
    for predicate, opcode, operands in _instructions(ptx):
        machine.step(predicate, opcode, operands)


def _instructions(ptx: str):
    """(predicate or "", opcode, operands) of each instruction in order; an operand in braces is a list."""
    body = ptx[ptx.index("{", ptx.index(".entry")) :]
    body = re.sub(r"//[^\n]*", "", body[: body.index("\n}")])
    for statement in re.split(r"[;\n]|^\s*{\s*$", body, flags=re.M):
        statement = statement.strip()
        found = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", statement)
        if found and found[2] != "ret":
            operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s|][^,|]*", found[3])
            yield found[1] or "", found[2], [_operand(o.strip()) for o in operands]


def _operand(text: str) -> str | list[str]:
    return [o.strip() for o in text[1:-1].split(",")] if text[0] == "{" else text


class _Machine:
    def __init__(self, programs: int, threads: int, arguments: list, errors: Errors):
        self.programs, self.threads, self.errors = programs, threads, errors
        self.tensors: list[np.ndarray] = []
        nothing = np.zeros(1, np.uint64)  # Triton's two own pointers, to scratch memory and profile
        self.parameters = [*(self._parameter(a) for a in arguments if a is not None), nothing, nothing]
        self.shared = np.zeros((programs, 232448), np.uint8)  # what a Hopper program may have
        thread, program = np.arange(programs * threads) % threads, np.arange(programs * threads) // threads
        self.program = program
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": thread.astype(np.uint32),
            "%ctaid.x": program.astype(np.uint32),
            "%nctaid.x": np.full(len(program), programs, np.uint32),
            "global_smem": np.zeros(1, np.uint32),
        }

    def _parameter(self, argument: Tensor | float | int) -> np.ndarray:
        if isinstance(argument, Tensor):
            self.tensors.append(argument.view(-1).view(torch.uint8).numpy())
            return np.array([len(self.tensors) << BASE_BITS], np.uint64)
        return np.array([argument], np.float32 if isinstance(argument, float) else np.int32).view(np.uint32)

    # --- operands -----------------------------------------------------------------------------------------------------
    def read(self, operand: str, size: int) -> np.ndarray:
        """Bits of a register or a number, [threads] or [1]."""
        if operand.startswith("-%") or operand.startswith("!"):
            raise NotImplementedError(operand)
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("0f"):
            return np.array([int(operand[2:], 16)], np.uint32)
        if "_param_" in operand:  # a parameter's address is its number
            return np.array([int(operand.rpartition("_")[2])], UNSIGNED[size])
        return np.array([int(operand, 0)], np.int64).view(np.uint64).astype(UNSIGNED[size])

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
        if name in ("ld", "st"):
            return self._memory(name, modifiers, operands, where)
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
            result = _arithmetic(name, modifiers[:-1], kind, self._sources(name, modifiers, sources), self.errors)
        return self.write(target, result, where)

    def _sources(self, name: str, modifiers: list[str], sources: list[str]) -> list[np.ndarray]:
        """Typed by the instruction's last modifier; what differs from that in a few instructions is handled here."""
        kind = modifiers[-1]
        sizes = [_size(kind)] * len(sources)
        if kind == "pred":
            return [self.registers[o] for o in sources]
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
            return self.write(operands[0], np.choose(which - which.min(), self.parameters[which.min() : which.max() + 1]), where)
        size = _size(kind)
        pointer, data = (operands[1], operands[0]) if name == "ld" else (operands[0], operands[1])
        data = data if isinstance(data, list) else [data]
        register, _, offset = pointer[1:-1].partition("+")
        address = self.read(register.strip(), 8).astype(np.int64) + int(offset or 0)
        address = np.broadcast_to(address, self.program.shape)
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
                value = np.zeros(len(address), UNSIGNED[size])
                value[active] = memory[index]
                self.write(register, value, active if where is not None else None)
            else:
                value = np.broadcast_to(self.read(register, size), address.shape)[active]
                memory[index] = value
                assert (memory[index] == value).all(), "threads write different values to one place"

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
        assert modifiers[1] == "bfly" and clamp == "31", modifiers
        value = np.broadcast_to(self.read(value, 4), self.program.shape)
        return value.reshape(-1, 32)[:, np.arange(32) ^ int(lane)].reshape(-1)

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
            halves = [torch.from_numpy(np.ascontiguousarray(np.broadcast_to(v, self.program.shape))) for v in values]
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


def _arithmetic(name: str, modifiers: list[str], kind: str, v: list[np.ndarray], errors: Errors) -> np.ndarray:
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
        if name == "div" and kind[0] in "su":  # C's: towards zero
            return _bits(np.trunc(v[0].astype(np.float64) / v[1]).astype(v[0].dtype), kind)
        if "ftz" in modifiers:
            v = [_flushed(x) for x in v]
        result = _FUNCTIONS[name](*v)
        if name == "fma" and kind == "f32":
            result = (v[0].astype(np.float64) * v[1] + v[2]).astype(np.float32)
        if name in _SPECIAL and "rn" not in modifiers:
            result = _off(_SPECIAL[name](*(x.astype(np.float64) for x in v)), getattr(errors, name))
            result = _flushed(result) if "ftz" in modifiers else result
        if name in ("max", "min") and "NaN" not in modifiers:
            result = {"max": np.fmax, "min": np.fmin}[name](*v)
        if result.dtype == bool:
            return result
        return _bits(result, kind)


def _same(v: list[np.ndarray]) -> list[np.ndarray]:
    return [v[0], v[1].astype(v[0].dtype)]


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def _off(exact: np.ndarray, ulps: float) -> np.ndarray:
    """exact (fp64) in fp32, `ulps` away from there; powers of two by ex2, and infinities, stay."""
    rounded = exact.astype(np.float32)
    moved = (rounded + ulps * np.spacing(np.abs(rounded)).astype(np.float64)).astype(np.float32)
    return np.where(np.isfinite(rounded) & (rounded != 0), moved, rounded)


_SPECIAL: dict[str, Callable] = {"ex2": np.exp2, "div": np.divide, "rsqrt": lambda x: 1 / np.sqrt(x)}
_FUNCTIONS: dict[str, Callable] = _SPECIAL | {
    "mov": lambda a: a, "abs": np.abs, "neg": np.negative, "not": np.invert, "add": np.add, "sub": np.subtract,
    "mul": np.multiply, "fma": lambda a, b, c: a * b + c, "mad": lambda a, b, c: a * b + c,
    "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
