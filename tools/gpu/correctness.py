"""Are the kernels right on a GPU: against fp64, at every size, with the same bits twice, in the memory they need."""

from __future__ import annotations

import torch

from megatron_xact import activations
from tools.gpu.context import Context, Entries, Skip, as_error, over_bound

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def accuracy(context: Context, data: Entries) -> str:
    """Every function and derivative over [-1e4, 1e4] within the bound, and every kernel with bias and scale."""
    from accuracy import NAMES

    data["functions"], data["kernels"] = {}, {}  # error over its bound
    for name in context.mine(NAMES) if context.on_gpu else ():
        data["functions"] |= _function_errors(context, name)
        data.save()
    for name in context.mine(activations.names()):
        for dtype in DTYPES:
            data["kernels"][f"{name} {dtype}"] = _kernel_error(context, name, dtype)
            data.save()
    data.all_at_most("error over its bound", 1.0, data["functions"] | data["kernels"])
    return f"{len(data['functions'])} functions and {len(data['kernels'])} kernels"


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


def _kernel_error(context: Context, name: str, dtype: torch.dtype) -> float:
    """Largest error of all results with bias and scale, over its bound."""
    record = activations.get(name)
    rows, columns = (37, 1001) if context.quick else (517, 3001)
    width = columns * (1 + record.gated)
    x = (3 * context.randn(rows, width)).to(dtype)
    dy, bias = context.randn(rows, columns, seed=1).to(dtype), context.randn(width, seed=2).to(dtype)
    scale = context.randn(rows, seed=3)
    back = context.backend.backward(record, x, context.parameters(record), dy, bias, scale, emit_y=True)
    p64 = context.parameters(record, torch.float64)
    from megatron_xact.kernels import reference

    exact = reference.backward(record, x.double(), p64, dy.double(), bias.double(), scale.double(), emit_y=True)
    pairs = ((back.y, exact.y), (back.dx, exact.dx), (back.bias, exact.bias), (back.scale, exact.scale))
    return max(over_bound(ours, true) for ours, true in pairs)


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
    n = (1 << 22) + 4097 if context.quick else (1 << 31) + 4097
    if context.on_gpu and torch.cuda.mem_get_info(context.device)[0] < 12 * n:
        raise Skip(f"{n:,} bf16 elements need {12 * n >> 30} GiB of free GPU memory")
    record = activations.get("xielu")
    p = context.parameters(record)
    x, dy = context.randn(n, dtype=torch.bfloat16), context.randn(n, seed=1, dtype=torch.bfloat16).abs_()
    y = context.backend.forward(record, x, p)
    back = context.backend.backward(record, x, p, dy)
    step = -(-n // 8 // 4096) * 4096
    totals = dict.fromkeys(back.parameters, 0.0)
    data["differ"] = differ = []
    for start in range(0, n, step):
        part = slice(start, min(n, start + step))
        piece = context.backend.backward(record, x[part], p, dy[part])
        results = {"y": (context.backend.forward(record, x[part], p), y[part]), "dx": (piece.dx, back.dx[part])}
        differ += [f"{what} from {start:,}" for what, (ours, whole) in results.items() if not torch.equal(ours, whole)]
        for symbol, value in piece.parameters.items():
            totals[symbol] += value.item()
    data.target("pieces whose bits differ", len(differ), at_most=0)
    errors = {s: abs(value.item() - totals[s]) / abs(totals[s]) for s, value in back.parameters.items()}
    data.all_at_most("gradient beside the sum of the pieces'", 1e-5, errors)
    return f"{n:,} elements"


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
    from megatron_xact.kernels import fp8

    context.needs_fp8()
    data["steps"], data["gradients"] = {}, {}  # of FP8: 0.5 is correct rounding; error over its bound
    for name in context.mine(activations.names()):
        for dtype in fp8.DTYPES:
            _quantized(context, name, dtype, data)
            data.save()
    data.all_at_most("steps of FP8 from the exact value", 0.51, data["steps"])
    if data["gradients"]:
        data.all_at_most("parameter gradient's error over its bound", 1.0, data["gradients"])
    return f"{len(data['steps'])} results"


def _quantized(context: Context, name: str, dtype: torch.dtype, data: Entries) -> None:
    from megatron_xact.kernels import fp8, reference

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
