"""How accurate an activation must be: the bound promised to users, as numbers for one function at many x."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# the gated ones apply one of these functions to the gate; first-order units have functions of their own
NAMES = [name for name in activations.names() if not activations.get(name).gated or name.endswith("glu1")]
# away from the initial values, where a coefficient may be 0 or 1
MOVED = {"alpha_p": 0.3, "alpha_n": 1.7, "alpha": 0.21}
SMALLEST_NORMAL = 2.0**-126
ULPS = 4  # of the formula's largest term, beside twice the rounding of the exact result


def sample(dtype: torch.dtype) -> Tensor:
    """x in [-1e4, 1e4]: every bf16 or fp16 number; of fp32 100,000 ones, dense in |x| < 0.01 and around -1 and 0."""
    if dtype != torch.float32:
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        return every[every.double().abs() <= 1e4]
    g = torch.Generator().manual_seed(0)
    magnitudes = [10 ** (torch.rand(20_000, generator=g) * 16 - 12), torch.linspace(0, 0.01, 15_000)]
    magnitudes += [torch.rand(15_000, generator=g) * 20]
    x = torch.cat(magnitudes)
    return torch.cat([x, -x])


def parameters(record: Activation, moved: bool) -> dict[str, float]:
    return {q.symbol: MOVED.get(q.name, q.init) if moved else q.init for q in record.parameters}


def truth(record: Activation, x: Tensor, p: dict[str, float]) -> dict[str, Tensor]:
    """{"f", "slope", symbol: derivative}, fp64. Parameters as the fp32 numbers that a kernel is given."""
    p = {symbol: torch.tensor([value], dtype=torch.float32).double() for symbol, value in p.items()}
    slope, partials = record.slopes(x.double(), p)
    return {"f": record.value(x.double(), p), "slope": slope} | {
        q.symbol: partials[q.symbol] for q in record.parameters
    }


def excess(
    record: Activation, key: str, x: Tensor, p: dict[str, float], ours: Tensor, true: Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """(largest error / bound, the x where it is). ours: fp32, true: fp64; both are rounded to `dtype` here."""
    rounded, exact = ours.to(dtype).double(), true.to(dtype).double()
    finite = exact.isfinite()
    assert torch.equal(rounded[~finite], exact[~finite]) or not record.smooth  # overflow to the same infinity
    terms = ULPS * ulp(largest_term(record.name, key, x.double(), p, true))
    bound = 2 * (exact - true).abs() + terms + SMALLEST_NORMAL
    ratio = torch.where(finite, (rounded - true).abs() / bound, 0.0).nan_to_num(nan=torch.inf)
    at = int(ratio.argmax())
    return float(ratio[at]), float(x[at])


def ulp(magnitude: Tensor) -> Tensor:
    """Distance of fp32 numbers around a magnitude, fp64."""
    return torch.exp2(torch.floor(torch.log2(magnitude.clamp(min=SMALLEST_NORMAL))) - 23)


def largest_term(name: str, key: str, x: Tensor, p: dict[str, float], true: Tensor) -> Tensor:
    """Magnitude of the largest thing that the formula of f (or slope, or a derivative) adds up."""
    a = p.get("a", 0.0)
    neg, e = x.clamp(max=0.0), torch.expm1(x.clamp(max=0.0))
    terms = [true.abs()]
    if name in ("xielu", "xielu_cubic") and "a_n" in p:
        linear, unit = {"f": (x, e * p["a_n"]), "slope": (torch.ones_like(x), e * p["a_n"])}.get(key, (0 * x, e))
        terms += [p["b"] * linear.abs(), unit.abs(), neg.abs() * (p["a_n"] if key == "f" else key == "a_n")]
    elif name == "xiprelu" and key in ("f", "slope"):
        terms += [p["b"] * (x if key == "f" else torch.ones_like(x)).abs()]
    elif name == "xelu":
        terms += [{"f": (1 + 2 * a) * e, "slope": (1 + 2 * a) * (e + 1), "a": 2 * e}[key].abs()]
        terms += [a * (x.abs() if key == "f" else 1) + 0 * x, neg.abs() * (key == "a")]
    elif key == "slope" and not name.endswith("glu1"):  # g + x g'
        expanded = gate(name, x) * (1 + 2 * a)
        terms += [0 * x + a, expanded, (true - (expanded - a)).abs()]
    elif key == "f":
        terms += [a * (x.abs() if not name.endswith("glu1") else 1) + 0 * x]
        terms += [gate(name, x) * (1 + 2 * a) * (x.abs() if not name.endswith("glu1") else 1)]
    if name == "gelu_tanh":  # (1 + tanh v) / 2
        terms += [x.abs() / 2 if key == "f" else torch.where(x.abs() < 15, 0.5, 0.0)]
    return torch.stack(terms).amax(0)


def gate(name: str, x: Tensor) -> Tensor:
    if "gelu" in name and name != "gelu_tanh":
        return 0.5 * torch.special.erfc(-x / 2**0.5)
    if "atlu" in name:
        return torch.atan2(torch.ones_like(x), -x) / torch.pi
    if "silu" in name:
        return torch.sigmoid(x)
    return 0 * x
