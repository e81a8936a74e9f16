"""The MLP with FP8 products (`[xact] mlp = "fp8"`): its casts, cuBLASLt's products, the whole of it, and how fast."""

from __future__ import annotations

import itertools
import statistics
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.kernels import fp8, fp8_product, mlp_timing
from megatron_xact.kernels.mlp_timing import Operands, Shape
from tools.gpu import timing
from tools.gpu.context import Context, Entries

NAMES = ("xielu", "relu2", "xsilu_glu2")
# Hopper's FP8 tensor cores keep 14 bits of a sum, and cuBLASLt moves it to fp32 every 128 products where fast
# accumulation is off, as it is here: of 2048 products, 1.5e-4 by simulation, and 7e-4 if it never did.
# https://github.com/deepseek-ai/DeepGEMM/issues/37, https://github.com/pytorch/pytorch/issues/147971
PRODUCT_ERROR = 1e-3
FP8_ERROR = 0.12  # of a result whose operands were rounded to FP8, relative, in norm
WIDTHS = {False: (2048, 12288), True: (2048, 8192)}  # hidden, ffn by gated


def correctness(context: Context, data: Entries) -> str:
    context.needs_fp8()
    data["casts unlike torch's"] = _casts(context)
    data.target("casts whose bits are not torch's", len(data["casts unlike torch's"]), at_most=0)
    data["product_error"] = _product_errors(context)
    data.all_at_most("error of a product", PRODUCT_ERROR, data["product_error"])
    context.needs("megatron")  # for MLPs; the casts and products count all the same
    data["errors"] = {}
    for name in NAMES:
        for smooth in (False, True):
            label = f"{name}{' smooth' * smooth}"
            errors, same = _errors(context, activations.get(name), smooth)
            data["errors"] |= {f"{what} of {label}": error for what, error in errors.items()}
            data.target(f"{label}: of 2 runs, those that differ", 0 if same else 2, at_most=0)
    data.all_at_most("error of the MLP", FP8_ERROR, data["errors"])
    return f"casts, products and {2 * len(NAMES)} MLPs"


def speed(context: Context, data: Entries) -> str:
    context.needs_fp8()
    context.needs("megatron")
    data["times"], data["absent"] = [], {}
    for name in NAMES:
        data["times"].append(_times(context, activations.get(name), data))
        data.save()
    return f"{len(NAMES)} activations, beside bf16"


def _casts(context: Context) -> list[str]:
    """Those of the kernels' casts without the bits of torch's, whose rounding tests compare with fp64."""
    multiplier = torch.exp2(context.randn(1664, seed=1).round())
    found = []
    for rows in (1111, 1112):  # transposed, bytes are written, and words
        x = context.randn(rows, 1664).to(torch.bfloat16)
        if not torch.equal(fp8.amax(x, by_column=True), x.abs().amax(0).float()):
            found.append(f"largest of the columns of {rows}")
        for dtype, factors in itertools.product(fp8.DTYPES, (None, multiplier)):
            scaling = fp8_product.scaling_for(fp8.amax(x), dtype)
            value = x.float() if factors is None else x.float() * factors
            ours = fp8.cast(x, scaling, dtype, multiplier=factors)
            theirs = fp8.quantize(value, scaling, dtype)
            for a, b in ((ours.rows_RC, theirs.rows_RC), (ours.columns_CR, theirs.columns_CR)):
                if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                    found.append(f"{rows} in {dtype}{'' if factors is None else ' with factors'}")
    return found


def _product_errors(context: Context) -> dict[str, float]:
    """Of an operand of each format with one in e4m3, beside fp64's product of the same FP8 numbers, in norm."""
    m, n, k = (48, 32, 64) if context.quick else (4096, 3072, 2048)
    found = {}
    for kind in fp8.DTYPES:
        a = fp8_product.quantized(context.randn(m, k).to(torch.bfloat16), kind, rows=True)
        b = fp8_product.quantized(context.randn(n, k, seed=1).to(torch.bfloat16), fp8_product.VALUES, rows=True)
        ours = fp8_product.product(a.rows_RC, a.row_scale_inv, b.rows_RC, b.row_scale_inv, torch.float32)
        true = (a.rows_RC.double() * a.row_scale_inv) @ (b.rows_RC.double() * b.row_scale_inv).T
        found[str(kind)] = ((ours - true).norm() / true.norm()).item()
    return found


def _errors(context: Context, record: Activation, smooth: bool) -> tuple[dict[str, float], bool]:
    """Of out, dx, dw1, dw2 beside fp64's, relative, in norm; whether two runs have the same bits."""
    shape = Shape(*((48, 32, 64) if context.quick else (2048, 1024, 3072)), torch.bfloat16)
    o = mlp_timing.operands(record, shape, context.device)
    found, again = _run(o, smooth), _run(o, smooth)
    wide = {key: value.double().detach() for key, value in
            {"x": o.x_MH, "w1": o.w1_WH, "w2": o.w2_HF, "dout": o.dout_MH}.items()}  # fmt: skip
    p = {s: v.double().detach() if isinstance(v, Tensor) else v for s, v in o.p.items()}
    leaves = [wide[key].requires_grad_() for key in ("x", "w1", "w2")]
    out = record.forward(wide["x"] @ wide["w1"].T, p) @ wide["w2"].T
    true = [out, *torch.autograd.grad(out, leaves, wide["dout"])]
    errors = {name: ((ours - exact).norm() / exact.norm()).item()
              for name, ours, exact in zip(("out", "dx", "dw1", "dw2"), found, true, strict=False)}  # fmt: skip
    return errors, all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def _run(o: Operands, smooth: bool) -> list[Tensor]:
    """[out, dx, dw1, dw2, d parameters], as a layer on one rank calls it."""
    from megatron_xact.layers import fp8_mlp as layer
    from megatron_xact.layers.parallel_linear import Call

    call = Call(o.activation, SimpleNamespace(size=lambda: 1), False, False, tell_hooks=None, hooked=False)
    layer.select(layer.Settings(smooth=smooth))
    out = layer.function()(o.x_MH, o.w1_WH, None, o.w2_HF, call, *o.learned)
    return [out, *torch.autograd.grad(out, [o.x_MH, o.w1_WH, o.w2_HF, *o.learned], o.dout_MH)]


def _times(context: Context, record: Activation, data: Entries) -> dict:
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
    seconds = timing.in_turns(context, calls, 3 if context.quick else 20, data)
    floor = statistics.median(seconds["bf16"])
    print(f"{record.name} {o.x_MH.shape[0]} x {hidden} x {ffn}: " + ", ".join(
        f"{label} {statistics.median(s) * 1e3:.3f} ms ({statistics.median(s) / floor:.2f})"
        for label, s in seconds.items()
    ), flush=True)  # fmt: skip
    return {"activation": record.name, "hidden": hidden, "ffn": ffn, "tokens": o.x_MH.shape[0], "seconds": seconds}
