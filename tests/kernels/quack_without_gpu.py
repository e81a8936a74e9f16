"""QuACK's kernels on a machine that has no GPU: compiled for Hopper, and their epilogues compiled for the CPU and run.

In processes of their own, two at a time: QuACK and CuTe read their environment when they are imported, and change what
they import. Only what asks the GPU is replaced: how many clusters fit on it, and the launch.
"""

# no `from __future__ import annotations`: CuTe reads the types of `run` at its definition
import atexit
import contextlib
import functools
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from compiled import BACKWARD, FORWARD, Binary, disassembled
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.kernels.device_functions import MAX_PARAMETERS, device_function
from megatron_xact.kernels.quack_functions import CuteVocabulary, translated

ROWS, HIDDEN, COLUMNS = 16384, 2048, 12288
THREADS = 128  # of a group of warps: it holds a tile's accumulator, or half of it where groups do not take turns


def submit(function: Callable, *args) -> Future:
    """The result of one of the functions below, to come."""
    return _pool().submit(function, *args)


@functools.cache
def _pool() -> ProcessPoolExecutor:
    cubins = tempfile.TemporaryDirectory(prefix="cubins-")
    atexit.register(cubins.cleanup)
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_prepare, initargs=(cubins.name,))
    atexit.register(pool.shutdown, cancel_futures=True)  # before the folder goes
    return pool


def _prepare(cubins: str) -> None:
    folder = Path(cubins, str(os.getpid()))
    folder.mkdir()
    os.environ |= {
        "QUACK_ARCH": "90",  # the GPU that QuACK is to believe in
        "CUTE_DSL_ARCH": "sm_90a",
        "QUACK_CACHE_ENABLED": "0",
        "CUTE_DSL_NO_CACHE": "1",
        "CUTE_DSL_KEEP_CUBIN": "1",
        "CUTE_DSL_DUMP_DIR": str(folder),
    }
    import quack.epilogue.frontend
    import quack.gemm_runtime.host

    quack.gemm_runtime.host.get_max_active_clusters = lambda size: 132 // size
    quack.epilogue.frontend.run_gemm_epi_plan = lambda *args, **kwargs: None
    torch.cuda.device = lambda device: contextlib.nullcontext()


def compile_kernel(
    name: str,
    direction: str,
    tile: tuple | None = None,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    by_output: bool = False,
) -> Binary:
    """What `quack_gemm` compiles for 16384 x 2048 x 12288 when it is called with tensors that hold nothing.

    by_output: as for an activation that saves its output.
    """
    from megatron_xact.kernels import quack_gemm

    activation = activations.get(name)
    if by_output and direction == BACKWARD:
        activation = activation.of_output
    tile = quack_gemm.Tile(*tile) if tile else quack_gemm.candidates(direction, activation)[0]
    folder = Path(os.environ["CUTE_DSL_DUMP_DIR"])
    for cubin in folder.glob("*.cubin"):
        cubin.unlink()
    with FakeTensorMode():

        def matrix(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        p = {q.symbol: matrix(1, dtype=torch.float32) if q.trainable else q.init for q in activation.parameters}
        width = COLUMNS * (1 + activation.gated)
        added = matrix(width) if bias else None
        if direction == FORWARD:
            x, w1 = matrix(ROWS, HIDDEN), matrix(width, HIDDEN)
            pre, y = quack_gemm.forward(activation, x, w1, p, added, tile, with_pre=not by_output)
        else:
            dout, w2, pre = matrix(ROWS, HIDDEN), matrix(HIDDEN, COLUMNS), matrix(ROWS, width)
            back = quack_gemm.backward(activation, dout, w2, pre, p, added, tile, emit_y=not by_output)
            pre, y = back.dpre_MW, back.y_MF
            sums = [*back.parameters.values(), *([back.bias] if bias else [])]
            assert [v.shape for v in sums] == [()] * len(activation.trainable) + [(width,)] * bias
            assert all(v.dtype == torch.float32 for v in sums)
        made = [tuple(t.shape) for t in (pre, y) if t is not None]
        assert made == [(ROWS, width), (ROWS, COLUMNS)][: 2 - by_output]
    (cubin,) = folder.glob("*.cubin")
    accumulated = tile.m * tile.n // (THREADS * (1 if tile.pingpong else 2))
    pairs = activation.gated and direction == FORWARD  # two columns of the matrix product make one of y
    return disassembled(cubin.read_bytes(), elements=accumulated // (1 + pairs))


def identity(name: str, direction: str, bias: bool, dtype: torch.dtype, learned: tuple[int, ...]) -> str:
    """What QuACK calls an epilogue's kernels by, if it takes this package for an installed one."""
    import quack.gemm_runtime.identity

    from megatron_xact.kernels import quack_epilogues

    activation = activations.get(name)
    function, parameters = device_function(activation).__name__, len(activation.parameters)
    form = quack_epilogues.Form(function, parameters, learned, activation.gated, bias, dtype)
    make = getattr(quack_epilogues, f"{direction}_epilogue").__wrapped__  # not one made before
    with mock.patch.object(quack.gemm_runtime.identity, "_is_extern_function", lambda function: True):
        return make(form).semantic_digest


def evaluate(
    activation: Activation,
    direction: str,
    p: dict[str, float],
    inputs: dict[str, Tensor | tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.bfloat16,
    by_output: bool = False,
) -> dict[str, Tensor]:
    """The epilogue of one direction, compiled for this CPU by CuTe, at each element of fp32 vectors.

    inputs: by the epilogue's names, those of a pair as a tuple. Returns what it returns by name, before anything is
    stored; of a sum, its two factors as rows. Two words are the CPU's own: exp2 and rsqrt, instructions of a GPU.
    """
    import cutlass
    from cutlass import Float32, cute
    from cutlass.cute.runtime import from_dlpack

    from megatron_xact.kernels import quack_epilogues

    vocabulary = CuteVocabulary()
    vocabulary.exp2, vocabulary.math = cute.math.exp2, SimpleNamespace(rsqrt=cute.math.rsqrt)
    learned = tuple(range(len(activation.parameters)))
    function = device_function(activation).__name__
    form = quack_epilogues.Form(function, len(learned), learned, activation.gated, "bias" in inputs, dtype, by_output)
    make = quack_epilogues.forward_element if direction == FORWARD else quack_epilogues.backward_element
    with mock.patch.object(quack_epilogues, "cute_functions", lambda: translated(vocabulary)):
        element = make(form)
    rows, places = [], {}
    for name, given in inputs.items():
        vectors = given if isinstance(given, tuple) else (given,)
        places[name] = range(len(rows), len(rows) + len(vectors))
        rows += vectors
    names: list[tuple[str, int]] = []

    @cute.jit
    def run(
        table: cute.Tensor, out: cute.Tensor, n: cutlass.Int32, p0: cutlass.Float32, p1: cutlass.Float32,
        p2: cutlass.Float32,
    ):  # fmt: skip
        for i in cutlass.range(n):
            operands = {k: _values_of(table, place, i) for k, place in places.items()}
            flat = _flat(element(**operands, p0=p0, p1=p1, p2=p2), names)
            for j in cutlass.range_constexpr(len(flat)):
                out[j, i] = Float32(flat[j])

    table = torch.stack(rows)
    out = torch.full((16, table.shape[1]), torch.nan)
    values = [p[q.symbol] for q in activation.parameters] + [0.0] * (MAX_PARAMETERS - len(learned))
    run(from_dlpack(table), from_dlpack(out), table.shape[1], *values)
    found: dict[str, list[Tensor]] = {}
    for (name, _), row in zip(names, out, strict=False):
        found.setdefault(name, []).append(row)
    return {name: vectors[0] if len(vectors) == 1 else torch.stack(vectors) for name, vectors in found.items()}


def _values_of(table, place: range, i):
    values = tuple(table[j, i] for j in place)
    return values if len(values) > 1 else values[0]


def _flat(results: dict, names: list[tuple[str, int]]) -> list:
    """The values in a row; `names` is filled with the name of each and its place among the factors."""
    names.clear()
    values = []
    for name, value in results.items():
        factors = value if isinstance(value, tuple) else (value,)
        names += [(name, k) for k in range(len(factors))]
        values += factors
    return values
