"""Are the kernels right on a GPU: against fp64, at every size, with the same bits twice, in the memory they need."""

from __future__ import annotations

import torch

from megatron_xact import activations
from tools.gpu.context import Context, Failure, Skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def accuracy(context: Context, data: dict) -> str:
    """Every function and derivative over [-1e4, 1e4] within the bound, and every kernel with bias and scale."""
    from accuracy import NAMES, excess, parameters, sample, truth

    worst = {}
    if context.device.type == "cuda":
        from probe import evaluate

        for name in NAMES:
            record = activations.get(name)
            for dtype in DTYPES:
                for moved in (False, True):
                    x, p = sample(dtype), parameters(record, moved)
                    ours = evaluate(record, x.to(context.device), p, exact=dtype == torch.float32)
                    for key, true in truth(record, x, p).items():
                        ratio, at = excess(record, key, x, p, ours[key].cpu(), true, dtype)
                        label = f"{name} {key} {dtype}"
                        worst[label] = max(worst.get(label, (0.0, 0.0)), (ratio, at))
    data["worst_over_bound"] = worst
    data["kernels"] = kernels = {}
    for name in activations.names():
        for dtype in DTYPES:
            kernels[f"{name} {dtype}"] = _kernel_error(context, name, dtype)
    over = [f"{label}: {ratio:.2f} x at x = {at}" for label, (ratio, at) in worst.items() if ratio > 1]
    over += [f"{label}: {ratio:.2f} x" for label, ratio in kernels.items() if ratio > 1]
    if over:
        raise Failure(f"{len(over)} over the bound, e.g. " + "; ".join(sorted(over)[:4]))
    return f"{len(worst)} functions and {len(kernels)} kernels within the bound"


def _kernel_error(context: Context, name: str, dtype: torch.dtype) -> float:
    """Largest error of all results with bias and scale, over (2 roundings + 1e-5 of the largest value)."""
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
    ratios = []
    for ours, true in ((back.y, exact.y), (back.dx, exact.dx), (back.bias, exact.bias), (back.scale, exact.scale)):
        rounding = (true.to(ours.dtype).double() - true).abs()
        ratios.append(((ours.double() - true).abs() / (2 * rounding + 1e-5 * true.abs().max())).max().item())
    return max(ratios)


def sums(context: Context, data: dict) -> str:
    """Parameter gradients of 2^26 elements: within 1e-5 of the sum, or 1e-6 of the sum of magnitudes."""
    n = 1 << (20 if context.quick else 26)
    worst = 0.0
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
                ratio = (value.double() - terms.sum()).abs().item() / bound
                data[f"{name} {symbol} {label}"] = ratio
                worst = max(worst, ratio)
    if worst > 1:
        raise Failure(f"a parameter gradient is off by {worst:.2f} x the bound")
    return f"worst error {worst:.3f} x the bound, {n:,} elements"


def huge(context: Context, data: dict) -> str:
    """More than 2^31 elements: the same bits as the pieces on their own, and sums that agree with the pieces' sums."""
    n = (1 << 22) + 4097 if context.quick else (1 << 31) + 4097
    if context.device.type == "cuda" and torch.cuda.mem_get_info(context.device)[0] < 12 * n:
        raise Skip(f"{n:,} bf16 elements need {12 * n >> 30} GiB of free GPU memory")
    record = activations.get("xielu")
    p = context.parameters(record)
    x, dy = context.randn(n, dtype=torch.bfloat16), context.randn(n, seed=1, dtype=torch.bfloat16).abs_()
    y = context.backend.forward(record, x, p)
    back = context.backend.backward(record, x, p, dy)
    step = -(-n // 8 // 4096) * 4096
    totals = dict.fromkeys(back.parameters, 0.0)
    for start in range(0, n, step):
        part = slice(start, min(n, start + step))
        if not torch.equal(context.backend.forward(record, x[part], p), y[part]):
            raise Failure(f"y differs in elements {part.start:,} to {part.stop:,}")
        piece = context.backend.backward(record, x[part], p, dy[part])
        if not torch.equal(piece.dx, back.dx[part]):
            raise Failure(f"dx differs in elements {part.start:,} to {part.stop:,}")
        for symbol, value in piece.parameters.items():
            totals[symbol] += value.item()
    for symbol, value in back.parameters.items():
        data[symbol] = error = abs(value.item() - totals[symbol]) / abs(totals[symbol])
        if error > 1e-5:
            raise Failure(f"d {symbol} is off by {error:.1e} of the pieces' sum")
    return f"{n:,} elements"


def determinism(context: Context, data: dict) -> str:
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
        for _ in range(5):
            if not all(torch.equal(a, b) for a, b in zip(first, results(), strict=True)):
                raise Failure(f"{name}: two runs differ")
        if context.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = results()
            graph.replay()
            context.synchronize()
            if not all(torch.equal(a, b) for a, b in zip(first, captured, strict=True)):
                raise Failure(f"{name}: a CUDA graph's replay differs")
    return "six runs and a graph's replay have the same bits" if context.device.type == "cuda" else "six runs agree"


def memory(context: Context, data: dict) -> str:
    """Peak memory of forward and backward through autograd: x, y, dy, dx and less than 2 % more."""
    if context.device.type != "cuda":
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
    if peak > 1.02 * 4 * 2 * n:
        raise Failure(f"peak {peak:,} B is over 1.02 x the {8 * n:,} B of x, y, dy and dx")
    return f"peak {peak / (8 * n):.4f} x (x, y, dy, dx)"


def quantized(context: Context, data: dict) -> str:
    """FP8 forward and backward, every activation and way to scale, against fp64: the hardware's rounding included."""
    from megatron_xact.kernels import fp8, reference

    if context.device.type == "cuda" and torch.cuda.get_device_capability(context.device) < (8, 9):
        raise Skip("this GPU has no FP8")
    rows, columns = (256, 384) if context.quick else (1111 * 4, 1664)
    data["worst"] = worst = {}
    for name in activations.names():
        record = activations.get(name)
        x = (3 * context.randn(rows, columns * (1 + record.gated))).to(torch.bfloat16)
        dy = context.randn(rows, columns, seed=1).to(torch.bfloat16)
        bias = context.randn(x.shape[-1], seed=2)
        p = context.parameters(record)
        true = reference.backward(
            record, x.double(), context.parameters(record, torch.float64), dy.double(), bias.double(), emit_y=True
        )
        for dtype in fp8.DTYPES:
            amax = fp8.forward_amax(record, x, p, bias), fp8.backward_amax(record, x, p, dy, bias)
            current = [fp8.PerTensor(fp8.factor(a, dtype)) for a in amax]
            ways = {"blockwise": [fp8.Blockwise()] * 2, "any blockwise": [fp8.Blockwise(False)] * 2, "tensor": current}
            for way, scalings in ways.items():
                y = fp8.forward(record, x, p, scalings[0], dtype, bias=bias)
                back = fp8.backward(record, x, p, dy, scalings[1], dtype, bias=bias)
                found = max(_steps_off(y, true.y, dtype), _steps_off(back.dx, true.dx, dtype))
                worst[f"{name} {way} {dtype}"] = found
                for symbol, value in back.parameters.items():
                    magnitude = true.parameters[symbol].abs() + 1.0
                    if (value.double() - true.parameters[symbol]).abs() > 1e-4 * magnitude:
                        raise Failure(f"{name}: d {symbol} = {value.item()}, not {true.parameters[symbol].item()}")
    over = [f"{label}: {steps:.3f} steps" for label, steps in worst.items() if steps > 0.51]
    if over:
        raise Failure(f"{len(over)} round further than half a step, e.g. " + "; ".join(over[:4]))
    return f"{len(worst)} results within {max(worst.values()):.3f} steps of FP8 (0.5: correct rounding)"


def _steps_off(q, true: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest error of both copies over the distance of FP8 numbers there; 1e-5 of the largest value is free."""
    bits, smallest = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}[dtype]
    found = 0.0
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
        found = max(found, (error / step).max().item())
    return found
