"""The device functions as functions of a CuTe-DSL epilogue: the same source with another vocabulary.

Of Triton's language, `device_functions` uses a few words (`tl.where`, `tl.exp2`, ...), and a Triton function keeps the
Python function it was made from. Here those Python functions get other globals, in which `tl` holds the same words for
CuTe values and every name of another device function stands for its translation. So each formula and each fitted
polynomial exists once, for both compilers, and what is added there is there for QuACK too. A word that the vocabulary
lacks ends a translation in an AttributeError that names it.

Nothing of QuACK or CuTe is imported before a kernel is wanted: the package is an optional one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType, SimpleNamespace

import torch
import triton

from megatron_xact.kernels import device_functions, source


def translated(vocabulary: object) -> dict[str, FunctionType]:
    """Every device function by name, with `vocabulary` in the place of triton.language."""
    names = {"__name__": __name__, "__builtins__": __builtins__, "tl": vocabulary}
    for name, value in vars(device_functions).items():
        if isinstance(value, triton.JITFunction):
            plain = value.fn
            names[name] = FunctionType(plain.__code__, names, name, plain.__defaults__)
    return {name: value for name, value in names.items() if isinstance(value, FunctionType)}


@functools.cache
def cute_functions() -> dict[str, FunctionType]:
    """For CuTe's fp32 scalars: (x, p0, p1, p2) -> (f, df/dx, df/dp0, df/dp1, df/dp2)."""
    return translated(CuteVocabulary())


class CuteVocabulary:
    """What `device_functions` says with `tl`, for CuTe's fp32 scalars. Both values of `where` are computed.

    exp2 and rsqrt are the GPU's instructions. CuTe's `fastmath` gives the same two, but lets the compiler take for
    granted that there is no inf and no nan.
    """

    constexpr = object
    PropagateNan = SimpleNamespace(ALL=True)

    def __init__(self):
        import cutlass
        from cutlass import Float32, cute

        self.where = lambda condition, a, b: Float32(cutlass.select_(condition, Float32(a), Float32(b)))
        self.exp2 = lambda x: cute.math.exp2(x, approx=True, ftz=True)
        self.abs = cute.math.abs
        self.maximum = lambda x, y, propagate_nan: cute.math.max(x, Float32(y), propagate_nan)
        self.minimum = lambda x, y, propagate_nan: cute.math.min(x, Float32(y), propagate_nan)
        self.math = SimpleNamespace(rsqrt=lambda x: cute.math.rsqrt(x, approx=True, ftz=True))

    def __quack_semantic_key__(self) -> str:
        return source_digest()


def rounding(dtype: torch.dtype) -> Callable:
    """fp32 scalar -> the fp32 scalar that is its nearest number of `dtype`, bf16 or fp16."""
    from cutlass import BFloat16, Float16, Float32, cute

    def to_fp16(x):
        return x.to(Float16).to(Float32)

    def to_bf16(x):
        # The upper half of an fp32 is a bf16. Converting the pair (0, x) is one instruction, the one that stores use,
        # and leaves the answer in place; converting x alone is another (F2F), and a shift after it.
        pair = cute.make_rmem_tensor(2, Float32)
        pair[0], pair[1] = Float32(0.0), x
        halves = cute.make_rmem_tensor(2, BFloat16)
        halves.store(pair.load().to(BFloat16))
        return cute.recast_tensor(halves, Float32)[0]

    return {torch.bfloat16: to_bf16, torch.float16: to_fp16}[dtype]


def source_digest() -> str:
    """Changes with the source of everything an epilogue is made from.

    QuACK keeps compiled kernels on disk under a fingerprint of the epilogue's source, but for functions of installed
    packages (as this one may be) it takes their names only.
    """
    return source.digest("device_functions", "quack_functions", "quack_epilogues")
