"""The MLP with FP8 products (`[xact] mlp = "fp8"`): its casts, cuBLASLt's products, the whole of it, and how fast."""

from __future__ import annotations

import importlib.util
import statistics
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.kernels import fp8, fp8_product, mlp_timing
from megatron_xact.kernels.benchmark import clock
from megatron_xact.kernels.mlp_timing import Operands, Shape
from tools.gpu.context import Context, Failure, Skip

NAMES = ("xielu", "relu2", "xsilu_glu2")
FP8_ERROR = 0.12  # of a result whose operands were rounded to FP8, relative, in norm
WIDTHS = {False: (2048, 12288), True: (2048, 8192)}  # hidden, ffn by gated


def fp8_mlp(context: Context, data: dict) -> str:
    if context.device.type == "cuda" and torch.cuda.get_device_capability(context.device) < (8, 9):
        raise Skip("this GPU has no FP8")
    _casts(context)
    data["product_error"] = _product_error(context)
    if not data["product_error"] <= 1e-5:
        raise Failure(f"FP8 products are {data['product_error']:.1e} from fp64's of the same operands")
    products = f"products within {data['product_error']:.1e} of fp64"
    if not importlib.util.find_spec("megatron"):
        return f"{products}; no MLP was run: megatron-core is not installed"
    data["errors"], data["times"] = {}, []
    for name in NAMES:
        for smooth in (False, True):
            data["errors"][f"{name}{' smooth' * smooth}"] = _errors(context, activations.get(name), smooth)
    worst = max(max(errors.values()) for errors in data["errors"].values())
    if not worst <= FP8_ERROR:
        raise Failure(f"a result of the FP8 MLP is {worst:.3f} from fp64's, relative; bound {FP8_ERROR}")
    for name in NAMES:
        _time(context, activations.get(name), data["times"])
    return f"{products}, MLPs within {worst:.3f}"


def _casts(context: Context) -> None:
    """The kernels' casts have the bits of torch's, whose rounding tests compare with fp64."""
    x = context.randn(1111, 1664).to(torch.bfloat16)
    multiplier = torch.exp2(context.randn(1664, seed=1).round())
    if not torch.equal(fp8.amax(x, by_column=True), x.abs().amax(0).float()):
        raise Failure("the largest of the columns are not torch's")
    for dtype in fp8.DTYPES:
        scaling = fp8_product.scaling_for(fp8.amax(x), dtype)
        for factors in (None, multiplier):
            value = x.float() if factors is None else x.float() * factors
            ours = fp8.cast(x, scaling, dtype, multiplier=factors)
            theirs = fp8.quantize(value, scaling, dtype)
            for a, b in ((ours.rows_RC, theirs.rows_RC), (ours.columns_CR, theirs.columns_CR)):
                if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                    raise Failure(f"casts to {dtype} are not torch's")


def _product_error(context: Context) -> float:
    m, n, k = (48, 32, 64) if context.quick else (4096, 3072, 2048)
    worst = 0.0
    for kind in fp8.DTYPES:
        a = fp8_product.quantized(context.randn(m, k).to(torch.bfloat16), kind, rows=True)
        b = fp8_product.quantized(context.randn(n, k, seed=1).to(torch.bfloat16), fp8_product.VALUES, rows=True)
        ours = fp8_product.product(a.rows_RC, a.row_scale_inv, b.rows_RC, b.row_scale_inv, torch.float32)
        true = (a.rows_RC.double() * a.row_scale_inv) @ (b.rows_RC.double() * b.row_scale_inv).T
        worst = max(worst, ((ours - true).norm() / true.norm()).item())
    return worst


def _errors(context: Context, record: Activation, smooth: bool) -> dict[str, float]:
    """Of out, dx, dw1, dw2 beside fp64's, relative, in norm. Failure: two runs differ."""
    shape = Shape(*((48, 32, 64) if context.quick else (2048, 1024, 3072)), torch.bfloat16)
    o = mlp_timing.operands(record, shape, context.device)
    found, again = _run(o, smooth), _run(o, smooth)
    if not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
        raise Failure(f"{record.name}: two runs of the FP8 MLP differ")
    wide = {key: value.double().detach() for key, value in
            {"x": o.x_MH, "w1": o.w1_WH, "w2": o.w2_HF, "dout": o.dout_MH}.items()}  # fmt: skip
    p = {s: v.double().detach() if isinstance(v, Tensor) else v for s, v in o.p.items()}
    leaves = [wide[key].requires_grad_() for key in ("x", "w1", "w2")]
    out = record.forward(wide["x"] @ wide["w1"].T, p) @ wide["w2"].T
    true = [out, *torch.autograd.grad(out, leaves, wide["dout"])]
    names = ("out", "dx", "dw1", "dw2")
    return {name: ((ours - exact).norm() / exact.norm()).item()
            for name, ours, exact in zip(names, found, true, strict=False)}  # fmt: skip


def _run(o: Operands, smooth: bool) -> list[Tensor]:
    """[out, dx, dw1, dw2, d parameters], as a layer on one rank calls it."""
    from megatron_xact.layers import fp8_mlp as layer
    from megatron_xact.layers.parallel_linear import Call

    call = Call(o.activation, SimpleNamespace(size=lambda: 1), False, False, tell_hooks=None, hooked=False)
    layer.select(layer.Settings(smooth=smooth))
    out = layer.function()(o.x_MH, o.w1_WH, None, o.w2_HF, call, *o.learned)
    return [out, *torch.autograd.grad(out, [o.x_MH, o.w1_WH, o.w2_HF, *o.learned], o.dout_MH)]


def _time(context: Context, record: Activation, found: list) -> None:
    """Forward and backward beside the same MLP in bf16 and its six products alone."""
    hidden, ffn = (32, 64) if context.quick else WIDTHS[record.gated]
    o = mlp_timing.operands(record, Shape(64 if context.quick else 16384, hidden, ffn, torch.bfloat16), context.device)
    with torch.no_grad():
        pre = o.x_MH @ o.w1_WH.T
        y = record.forward(pre, o.p)
    calls = {
        "bf16 GEMMs alone": lambda: mlp_timing.gemms(o, pre, y),
        "bf16": lambda: mlp_timing.unfused(o),
        "fp8": lambda: _run(o, False),
        "fp8 smooth": lambda: _run(o, True),
    }
    entry = {"activation": record.name, "hidden": hidden, "ffn": ffn, "tokens": o.x_MH.shape[0], "seconds": {}}
    for label, call in calls.items():
        entry["seconds"][label] = clock(call, context.device, 3 if context.quick else 20)
    found.append(entry)
    floor = statistics.median(entry["seconds"]["bf16"])
    print(f"{record.name} {o.x_MH.shape[0]} x {hidden} x {ffn}: " + ", ".join(
        f"{label} {statistics.median(s) * 1e3:.3f} ms ({statistics.median(s) / floor:.2f})"
        for label, s in entry["seconds"].items()
    ), flush=True)  # fmt: skip
