"""PTX's arithmetic on bits of registers, for `ptx`: every instruction by numpy, rounded as a GPU rounds."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np
import torch

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SMALLEST_NORMAL = np.float32(2.0**-126)
# By how many ulps of its correctly rounded result a special function may be off: PTX ISA, sections on ex2.approx,
# div.full and rsqrt.approx (whose limit is 2^-22.9 of the result).
ULPS = {"ex2": 2.0, "div": 2.0, "rsqrt": 2.14}
# Modifiers that are minded below, or change nothing that is emulated.
KNOWN = {"lo", "rn", "approx", "ftz", "full", "NaN", "global", "param"}
PAIRS = {
    "bf16x2": torch.bfloat16, "f16x2": torch.float16, "e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2,
}  # fmt: skip


@functools.cache
def size_of(kind: str) -> int:
    return 4 if kind.endswith("x2") else int(re.search(r"\d+", kind)[0]) // 8 if kind != "pred" else 1


def typed(bits: np.ndarray, kind: str) -> np.ndarray:
    """Numbers of some bits: bf16 and f16 as fp32."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind.endswith("x2"):
        return np.stack([typed(np.ascontiguousarray(h), kind[:-2]) for h in bits[:, None].view(np.uint16).T])
    return bits.view({"f": np.float32, "s": f"i{size_of(kind)}"}.get(kind[0], UNSIGNED[size_of(kind)]))


def bits_of(value: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of typed; bf16 and f16 are rounded to nearest even."""
    if kind.endswith("x2"):
        low, high = (bits_of(v, kind[:-2]).astype(np.uint32) for v in value)
        return low | high << 16
    if kind in ("bf16", "f16"):
        half = torch.from_numpy(np.ascontiguousarray(value, np.float32)).to(PAIRS[kind + "x2"])
        return half.view(torch.int16).numpy().view(np.uint16)
    return np.ascontiguousarray(value).view(UNSIGNED[value.dtype.itemsize])


def cast(value: np.ndarray, kind: str) -> np.ndarray:
    if kind[0] in "su":
        return value.astype(f"{'i' if kind[0] == 's' else 'u'}{size_of(kind)}")
    return value.astype(np.float32)


COMPARISONS: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": lambda a, b: ~(a == b), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "ltu": lambda a, b: ~(a >= b),
}  # fmt: skip


def result_of(name: str, modifiers: list[str], kind: str, v: list[np.ndarray], seed: int | None) -> np.ndarray:
    """The bits of one instruction's result."""
    with np.errstate(all="ignore"):
        if name == "setp":
            return COMPARISONS[modifiers[0]](*v)
        if name == "selp":
            return np.where(v[2], v[0], v[1])
        if "wide" in modifiers:
            wide = "i8" if kind[0] == "s" else "u8"
            product = v[0].astype(wide) * v[1].astype(wide)
            return bits_of(product if name == "mul" else product + v[2].view(wide), "b64")
        if "hi" in modifiers:
            assert name == "mul" and kind == "u32", (name, kind)
            return (v[0].astype(np.uint64) * v[1].astype(np.uint64) >> np.uint64(32)).astype(np.uint32)
        assert set(modifiers) <= KNOWN, f"{name} {modifiers}: not emulated"
        if name in ("shl", "shr"):
            return bits_of(np.left_shift(*_same(v)) if name == "shl" else np.right_shift(*_same(v)), kind)
        if name == "bfe":
            field = (v[0] >> v[1].astype(v[0].dtype)) & ((1 << int(v[2][0])) - 1)
            top = 1 << (int(v[2][0]) - 1)
            return bits_of(((field ^ top) - top if kind[0] == "s" else field).astype(v[0].dtype), kind)
        if name == "prmt":
            return _permuted(*v)
        if name == "div" and kind[0] in "su":  # C's: towards zero
            return bits_of(np.trunc(v[0].astype(np.float64) / v[1]).astype(v[0].dtype), kind)
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
        return bits_of(result, kind)


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
