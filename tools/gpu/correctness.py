"""Are the kernels right on a GPU: against fp64, at every size, with the same bits twice, in the memory they need."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.activations.record import Values
from megatron_xact.kernels import fp8, reference
from tools.gpu.context import Context, Entries, Skip, as_error, over_bound

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def accuracy(context: Context, data: Entries) -> str:
    """Every function and derivative over [-1e4, 1e4] within the bound; every kernel, with bias and scale or without."""
    from accuracy import NAMES

    data["functions"], data["kernels"] = {}, {}  # error over its bound
    for name in context.mine(NAMES) if context.on_gpu else ():
        data["functions"] |= _function_errors(context, name)
        data.save()
    for name in context.mine(activations.names()):
        for dtype in DTYPES:
            with data.trying(f"{name} {dtype}"):
                data["kernels"] |= _kernel_errors(context, name, dtype)
    if context.part == 0:
        data["unusual inputs"] = _unusual_inputs(context)
        data.target("unusual inputs with another result", len(data["unusual inputs"]), at_most=0)
    data.all_at_most("error over its bound", 1.0, data["functions"] | data["kernels"])
    return f"{len(data['functions'])} functions and {len(data['kernels'])} results of kernels"


def _function_errors(context: Context, name: str) -> dict[str, float]:
    from accuracy import excess, parameters, sample, truth
    from probe import evaluate

    record, found = activations.get(name), {}
    for dtype in DTYPES:
        for moved in (False, True):
            x, p = sample(dtype), parameters(record, moved)
            ours = evaluate(record, x.to(context.device), p, exact=dtype != torch.bfloat16)
            for key, true in truth(record, x, p).items():
                ratio, at = excess(record, key, x, p, ours[key].cpu(), true, dtype)
                found[f"{name} {key}{' moved' * moved} {dtype} at x = {at:g}"] = ratio
    return found


def _kernel_errors(context: Context, name: str, dtype: torch.dtype) -> dict[str, float]:
    """Error over its bound of every result, by what it is: without bias and scale, which are kernels of their own, and
    with them."""
    record = activations.get(name)
    rows, columns = (37, 1001) if context.quick else (517, 3001)
    width = columns * (1 + record.gated)
    x = (3 * context.randn(rows, width)).to(dtype)
    dy, bias = context.randn(rows, columns, seed=1).to(dtype), context.randn(width, seed=2).to(dtype)
    scale = context.randn(rows, seed=3)
    p, p64 = context.parameters(record), context.parameters(record, torch.float64)
    found = {}
    for way, fused in (("", ()), (" with bias and scale", (bias, scale))):
        y = context.backend.forward(record, x, p, *fused)
        back = context.backend.backward(record, x, p, dy, *fused, emit_y=bool(fused))
        exact = reference.backward(record, x.double(), p64, dy.double(), *(t.double() for t in fused), emit_y=True)
        pairs = {"y": (y, exact.y), "dx": (back.dx, exact.dx)}
        if fused:
            pairs |= {
                "y again": (back.y, exact.y),
                "d bias": (back.bias, exact.bias),
                "d scale": (back.scale, exact.scale),
            }
        errors = {what: over_bound(ours, true) for what, (ours, true) in pairs.items()}
        # bounds as of `sums`; magnitudes: what sums of the same terms without their signs would be
        terms = _magnitudes(record, x, p64, dy, *fused)
        for symbol, value in back.parameters.items():
            true = exact.parameters[symbol]
            bound = torch.maximum(1e-5 * true.abs(), 1e-6 * terms[symbol])
            errors[f"d {symbol}"] = as_error((value.double() - true).abs() / bound)
        found |= {f"{name} {dtype} {what}{way}": error for what, error in errors.items()}
    return found


def _magnitudes(record: Activation, x: Tensor, p64: Values, dy: Tensor, bias=None, scale=None) -> dict[str, Tensor]:
    """Sums of what the parameters' gradients are sums of, all taken as positive."""
    x = x.double() if bias is None else x.double() + bias
    dy = dy.double() if scale is None else dy.double() * scale.unsqueeze(-1)
    if record.gated:
        x, up = x.chunk(2, -1)
        dy = dy * up
    _, partials = record.maths.slopes(x, p64)
    return {symbol: (dy * partial).abs().sum() for symbol, partial in partials.items()}


def _unusual_inputs(context: Context) -> list[str]:
    """Shapes, strides and values for which the kernels do not do what fp64 does, rounded."""
    shapes = {"no elements": (0, 256), "one element": (), "a vector": (7,), "four dimensions": (2, 3, 5, 8)}
    given = {what: context.randn(*shape) for what, shape in shapes.items()}
    given["transposed"] = context.randn(64, 48).T
    given["every other column"] = context.randn(33, 64)[:, ::2]
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1.0]
    given["special values"] = torch.tensor(values, device=context.device)
    found = []
    for name in ("xielu", "swiglu"):
        record = activations.get(name)
        p, p64 = context.parameters(record), context.parameters(record, torch.float64)
        for what, x in given.items():
            if record.gated and (x.dim() == 0 or x.shape[-1] % 2):
                continue
            dy = torch.ones(record.output_shape(x.shape), device=context.device)
            ours = context.backend.forward(record, x, p), context.backend.backward(record, x, p, dy).dx
            exact = reference.backward(record, x.double(), p64, dy.double(), emit_y=True)
            pairs = zip(ours, (exact.y, exact.dx), strict=True)
            if not all(torch.allclose(a, b.float(), rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in pairs):
                found.append(f"{name}, {what}")
    return found


def sums(context: Context, data: Entries) -> str:
    """Parameter gradients of 2^26 elements: within 1e-5 of the sum, or 1e-6 of the sum of magnitudes."""
    n = 1 << (20 if context.quick else 26)
    for name in ("xielu", "xiprelu", "xsilu", "xgelu", "xatlu", "xelu"):
        record = activations.get(name)
        p, p64 = context.parameters(record), context.parameters(record, torch.float64)
        x = 2 * context.randn(n)
        for label, dy in (("positive", context.randn(n, seed=1).abs()), ("cancelling", context.randn(n, seed=1))):
            ours = context.backend.backward(record, x, p, dy).parameters
            _, partials = record.slopes(x.double(), p64)
            for symbol, value in ours.items():
                terms = dy.double() * partials[symbol]
                bound = max(1e-5 * terms.sum().abs().item(), 1e-6 * terms.abs().sum().item())
                data[f"{name} {symbol} {label}"] = (value.double() - terms.sum()).abs().item() / bound
        data.save()
    data.all_at_most("error over its bound", 1.0, dict(data))
    return f"{len(data)} sums of {n:,} elements"


def huge(context: Context, data: Entries) -> str:
    """More than 2^31 elements: the same bits as the pieces on their own, and sums that agree with the pieces' sums."""
    beyond = 1 << (22 if context.quick else 31)
    wide = 96 if context.quick else 12288
    rows = beyond // (2 * wide) // 128 * 128 + 256
    # the first is a multiple of nothing, which is code of its own; and gated, with a bias, row by row
    cases = {"xielu": ((beyond + 4097,), (beyond + 4096,)), "swiglu": ((rows, 2 * wide),)}
    if context.on_gpu and torch.cuda.mem_get_info(context.device)[0] < 14 * beyond:
        raise Skip(f"{beyond:,} bf16 elements need {14 * beyond >> 30} GiB of free GPU memory")
    data["differ"] = []
    errors = {}
    for name, shapes in cases.items():
        for shape in shapes:
            with data.trying(f"{name} {shape}"):
                errors |= _huge(context, activations.get(name), shape, data["differ"])
    if not context.on_gpu or torch.cuda.get_device_capability(context.device) >= (8, 9):
        with data.trying("FP8"):
            data["differ"] += _huge_fp8(context, activations.get("xielu"), (2 * rows, wide))
    data.target("pieces whose bits differ", len(data["differ"]), at_most=0)
    data.all_at_most("gradient beside the sum of the pieces'", 1e-5, errors)
    return f"more than {beyond:,} elements"


def _huge(context: Context, record: Activation, shape: tuple[int, ...], differ: list[str]) -> dict[str, float]:
    """Relative errors of the parameters' gradients; pieces whose bits differ go into `differ`."""
    p, bias = context.parameters(record), None
    x = context.randn(*shape, dtype=torch.bfloat16)
    dy = context.randn(*record.output_shape(x.shape), seed=1, dtype=torch.bfloat16).abs_()
    if record.gated:
        bias = context.randn(shape[-1], seed=2, dtype=torch.bfloat16)
    y = context.backend.forward(record, x, p, bias)
    back = context.backend.backward(record, x, p, dy, bias)
    step = -(-shape[0] // 8 // 128) * 128
    totals = dict.fromkeys(back.parameters, 0.0)
    for start in range(0, shape[0], step):
        part = slice(start, min(shape[0], start + step))
        piece = context.backend.backward(record, x[part], p, dy[part], bias)
        pieces = {"y": (context.backend.forward(record, x[part], p, bias), y[part]), "dx": (piece.dx, back.dx[part])}
        differ += [f"{record.name} {shape} {what} from {start:,}" for what, (ours, whole) in pieces.items()
                   if not torch.equal(ours, whole)]  # fmt: skip
        for symbol, value in piece.parameters.items():
            totals[symbol] += value.item()
    return {f"{record.name} {shape} {s}": as_error(abs(value.item() - totals[s]) / abs(totals[s]))
            for s, value in back.parameters.items()}  # fmt: skip


def _huge_fp8(context: Context, record: Activation, shape: tuple[int, int]) -> list[str]:
    """Pieces of a matrix whose FP8 copies, blocks' factors left out, have other bits."""
    p, x = context.parameters(record), context.randn(*shape, dtype=torch.bfloat16)
    whole = fp8.forward(record, x, p, fp8.Blockwise())
    found, step = [], -(-shape[0] // 8 // 128) * 128
    for start in range(0, shape[0], step):
        part = slice(start, min(shape[0], start + step))
        piece = fp8.forward(record, x[part], p, fp8.Blockwise())
        pairs = {"rows": (piece.rows_RC, whole.rows_RC[part]), "columns": (piece.columns_CR, whole.columns_CR[:, part])}
        found += [f"FP8 {what} from {start:,}" for what, (ours, theirs) in pairs.items()
                  if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))]  # fmt: skip
    return found


def determinism(context: Context, data: Entries) -> str:
    """Two runs, and a CUDA graph's replay, give the same bits, sums included."""
    rows, columns = (64, 256) if context.quick else (16384, 6144)
    for name in ("xielu", "xsilu_glu2"):
        record = activations.get(name)
        p = context.parameters(record)
        x = context.randn(rows, columns * (1 + record.gated), dtype=torch.bfloat16)
        dy = context.randn(rows, columns, seed=1, dtype=torch.bfloat16)
        bias, scale = context.randn(x.shape[-1], seed=2), context.randn(rows, seed=3)

        def results(record=record, x=x, p=p, dy=dy, bias=bias, scale=scale):
            back = context.backend.backward(record, x, p, dy, bias, scale)
            return [context.backend.forward(record, x, p), back.dx, back.bias, back.scale, *back.parameters.values()]

        first = results()
        differ = sum(not _same(first, results()) for _ in range(5))
        data.target(f"{name}: of 5 more runs, those that differ", differ, at_most=0)
        if context.on_gpu:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = results()
            graph.replay()
            context.synchronize()
            data.target(f"{name}: replays of a CUDA graph that differ", not _same(first, captured), at_most=0)
    return "forward and backward with bias and scale"


def _same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def memory(context: Context, data: Entries) -> str:
    """Peak memory of forward and backward through autograd: x, y, dy, dx and less than 2 % more."""
    if not context.on_gpu:
        raise Skip("peak memory is CUDA's to tell")
    from megatron_xact.kernels.ops import apply_activation

    record = activations.get("xielu")
    n = 1 << (24 if context.quick else 28)
    p = {s: v.requires_grad_() if isinstance(v, torch.Tensor) else v for s, v in context.parameters(record).items()}
    for _ in range(2):  # the first compiles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(context.device)
        before = torch.cuda.memory_allocated(context.device)
        x = torch.ones(n, device=context.device, dtype=torch.bfloat16, requires_grad=True)
        y = apply_activation(record, x, p)
        y.backward(torch.ones_like(y))
        peak = torch.cuda.max_memory_allocated(context.device) - before
        del x, y
    data["peak_bytes"], data["ideal_bytes"] = peak, 4 * 2 * n
    data.target("peak beside x, y, dy and dx", peak / (4 * 2 * n), at_most=1.02)
    return f"{n:,} elements"


def quantized(context: Context, data: Entries) -> str:
    """FP8 forward and backward, every activation and way to scale, against fp64: the hardware's rounding included."""
    context.needs_fp8()
    data["steps"], data["gradients"] = {}, {}  # of FP8: 0.5 is correct rounding; error over its bound
    for name in context.mine(activations.names()):
        for dtype in fp8.DTYPES:
            with data.trying(f"{name} {dtype}"):
                _quantized(context, name, dtype, data)
    data.all_at_most("steps of FP8 from the exact value", 0.51, data["steps"])
    if data["gradients"]:
        data.all_at_most("parameter gradient's error over its bound", 1.0, data["gradients"])
    return f"{len(data['steps'])} results"


def _quantized(context: Context, name: str, dtype: torch.dtype, data: Entries) -> None:
    record = activations.get(name)
    rows, columns = (272, 400) if context.quick else (4448, 1680)  # no tile divides them
    if dtype == torch.float8_e5m2:
        rows -= 2  # nor do words of four: transposed, bytes are written
    if record.gated:  # whose blocks must not join gate and up
        columns -= columns % fp8.BLOCK
    x = (3 * context.randn(rows, columns * (1 + record.gated))).to(torch.bfloat16)
    dy = context.randn(rows, columns, seed=1).to(torch.bfloat16)
    bias = context.randn(x.shape[-1], seed=2)
    p, p64 = context.parameters(record), context.parameters(record, torch.float64)
    true = reference.backward(record, x.double(), p64, dy.double(), bias.double(), emit_y=True)
    amax = fp8.forward_amax(record, x, p, bias), fp8.backward_amax(record, x, p, dy, bias)
    current = [fp8.PerTensor(fp8.factor(a, dtype)) for a in amax]
    ways = {"blockwise": [fp8.Blockwise()] * 2, "any blockwise": [fp8.Blockwise(False)] * 2, "tensor": current}
    for way, (forward, backward) in ways.items():
        y = fp8.forward(record, x, p, forward, dtype, bias=bias)
        back = fp8.backward(record, x, p, dy, backward, dtype, bias=bias)
        label = f"{name} {way} {dtype}"
        data["steps"][label] = max(_steps_off(y, true.y, dtype), _steps_off(back.dx, true.dx, dtype))
        for symbol, value in back.parameters.items():
            exact = true.parameters[symbol]
            error = (value.double() - exact).abs() / (1e-4 * (exact.abs() + 1.0))
            data["gradients"][f"d {symbol} of {label}"] = as_error(error)


def _steps_off(q, true: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest error of both copies over the distance of FP8 numbers there; 1e-5 of the largest value is free."""
    bits, smallest = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}[dtype]
    found = []
    for values, scale_inv, exact in (
        (q.rows_RC, q.row_scale_inv, true),
        (q.columns_CR, q.column_scale_inv, true.T),
    ):
        if scale_inv.numel() > 1:  # [blocks, rows padded] -> a factor for every value
            scale_inv = scale_inv[:, : exact.shape[0]].T.repeat_interleave(128, 1)[:, : exact.shape[1]]
        scale_inv = scale_inv.double()
        exponent = torch.log2((exact / scale_inv).abs()).floor().clamp(min=smallest)
        step = torch.exp2(exponent - bits) * scale_inv
        error = (values.double() * scale_inv - exact).abs() - 1e-5 * exact.abs().max()
        found.append(as_error((error / step).max()))
    return max(found)
