"""The two epilogues of every activation, as QuACK takes them: functions of one element of a tile, traced when compiled.

Such a function gets the accumulator and its operands by name, and returns by name what is to be stored ("D" is the
result of the matrix product) and what is to be summed, a product as its two factors. Names here: c, the element of the
pre-activation; p0, p1, p2, the activation's parameters in the record's order; bias; `_up` ends those of the up half.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_xact.kernels.device_functions import MAX_PARAMETERS
from megatron_xact.kernels.quack_functions import cute_functions, rounding, source_digest


class Form(NamedTuple):
    """All that tells one epilogue from another. function: name in `device_functions`; learned: indices of parameters
    that have a gradient; dtype: of the pre-activation; by_output: forward leaves out pre, backward y (ungated only)."""

    function: str
    parameters: int
    learned: tuple[int, ...]
    gated: bool
    bias: bool
    dtype: torch.dtype
    by_output: bool = False

    @property
    def scalars(self) -> tuple[str, ...]:
        return tuple(f"p{i}" for i in range(self.parameters))

    @property
    def halves(self) -> tuple[str, ...]:
        """What the names of the matrices end in."""
        return ("", "_up") if self.gated else ("",)


@functools.cache
def forward_epilogue(form: Form):
    """acc -> pre and y. Of a gated activation, acc is a pair of gate and up, stored in two matrices."""
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.ops import RowVecLoad, Scalar

    loads = {name: Scalar(name) for name in form.scalars} | ({"bias": RowVecLoad("bias")} if form.bias else {})
    declare = gemm_epilogue(
        outputs=("pre", "pre_up", "y") if form.gated else ("y",),
        ops=loads,
        mode="acc_pair" if form.gated else None,
    )
    return declare(_named("forward", form, loads, forward_element(form)))


@functools.cache
def backward_epilogue(form: Form):
    """acc = dy, c = pre -> dpre as D, y, and the factors of the sums."""
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.ops import ColVecReduce, RowVecLoad, RowVecReduce, Scalar, TileLoad

    loads = {name: Scalar(name) for name in form.scalars}
    loads |= {"c_up": TileLoad("c_up")} if form.gated else {}
    sums = {f"dp{i}": ColVecReduce(f"dp{i}", scaled=True) for i in form.learned}
    if form.bias:
        loads |= {f"bias{half}": RowVecLoad(f"bias{half}") for half in form.halves}
        sums |= {f"dbias{half}": RowVecReduce(f"dbias{half}", scaled=True) for half in form.halves}
    outputs = ("dpre_up",) * form.gated + ("y",) * (not form.by_output)
    declare = gemm_epilogue(outputs=outputs, ops=loads, reduces=sums)
    return declare(_named("backward", form, {"c": None} | loads, backward_element(form)))


def forward_element(form: Form) -> Callable[..., dict]:
    """The function of one element; what is computed with it is rounded as it is stored."""
    function, rounded = cute_functions()[form.function], rounding(form.dtype)

    def ungated(acc, **operands):
        pre = rounded(acc)
        z = pre + operands["bias"] if form.bias else pre
        return ({} if form.by_output else {"D": pre}) | {"y": function(z, *_values(operands))[0]}

    def gated(acc, **operands):
        pre, up = (rounded(lane) for lane in acc)
        z, z_up = (pre + operands["bias"][0], up + operands["bias"][1]) if form.bias else (pre, up)
        return {"pre": pre, "pre_up": up, "y": function(z, *_values(operands))[0] * z_up}

    return gated if form.gated else ungated


def backward_element(form: Form) -> Callable[..., dict]:
    function = cute_functions()[form.function]

    def ungated(acc, c, **operands):
        z = c + operands["bias"] if form.bias else c
        y, slope, *partials = function(z, *_values(operands))
        sums = {"dbias": (acc, slope)} if form.bias else {}
        results = {"D": acc * slope} | ({} if form.by_output else {"y": y})
        return results | sums | {f"dp{i}": (acc, partials[i]) for i in form.learned}

    def gated(acc, c, c_up, **operands):
        z, up = (c + operands["bias"], c_up + operands["bias_up"]) if form.bias else (c, c_up)
        f, slope, *partials = function(z, *_values(operands))
        df = acc * up
        sums = {"dbias": (df, slope), "dbias_up": (acc, f)} if form.bias else {}
        sums |= {f"dp{i}": (df, partials[i]) for i in form.learned}
        return {"D": df * slope, "dpre_up": acc * f, "y": f * up} | sums

    return gated if form.gated else ungated


def _values(operands: dict) -> list:
    return [operands.get(f"p{i}", 0.0) for i in range(MAX_PARAMETERS)]


def _named(direction: str, form: Form, operands: dict, element: Callable[..., dict]) -> Callable[..., dict]:
    """With the signature QuACK reads operands from, and a name that no other epilogue has: its caches go by name where
    this package is installed among others."""
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    element.__signature__ = inspect.Signature([inspect.Parameter(name, positional) for name in ("acc", *operands)])
    flags = [name for name in ("bias", "gated", "by_output") if getattr(form, name)]
    what = "_".join(map(str, (form.function, *form.learned, *flags)))
    dtype = str(form.dtype).removeprefix("torch.")
    element.__name__ = f"xact_{direction}_{what}_{form.parameters}_{dtype}_{source_digest()[:16]}"
    element.__qualname__ = element.__name__
    return element
