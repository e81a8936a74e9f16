"""How accurate an activation must be: the bound promised to users, as numbers for one function at many x."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.kernels.device_functions import device_function

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Without those that have no device function, for which test_nothing_is_missing fails.
RECORDS = [record for record in map(activations.get, activations.names()) if device_function(record)]
SERVED = [record.name for record in RECORDS]
# One per device function: a gated record applies it to the gate, and most share it with an ungated one.
UNGATED = [record.maths for record in RECORDS if not record.gated]
NAMES = [record.name for record in RECORDS if not record.gated or record.maths not in UNGATED]
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
    """moved: what is trained away from its initial value."""
    others = {q.name: q.init + 0.21 * q.trainable for q in record.parameters}
    return {q.symbol: (others | MOVED)[q.name] if moved else q.init for q in record.parameters}


def truth(record: Activation, x: Tensor, p: dict[str, float]) -> dict[str, Tensor]:
    """{"f", "slope", symbol: derivative}, fp64. Parameters as the fp32 numbers that a kernel is given."""
    return results(record, x.double(), {s: torch.tensor([v], dtype=torch.float32).double() for s, v in p.items()})


def results(record: Activation, x: Tensor, p: dict[str, Tensor]) -> dict[str, Tensor]:
    slope, partials = record.slopes(x, p)
    return {"f": record.value(x, p), "slope": slope} | {q.symbol: partials[q.symbol] for q in record.parameters}


def excess(
    record: Activation, key: str, x: Tensor, p: dict[str, float], ours: Tensor, true: Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """(largest error / bound, the x where it is). ours: fp32, true: fp64; both are rounded to `dtype` here."""
    rounded, exact = ours.to(dtype).double(), true.to(dtype).double()
    finite = exact.isfinite()
    if not torch.equal(rounded[~finite], exact[~finite]):  # it must overflow to the same infinity
        return torch.inf, float(x[~finite][(rounded != exact)[~finite]][0])
    terms = ULPS * ulp(largest_term(record, key, x.double(), p, true))
    bound = 2 * (exact - true).abs() + terms + SMALLEST_NORMAL
    ratio = torch.where(finite, (rounded - true).abs() / bound, 0.0).nan_to_num(nan=torch.inf)
    at = int(ratio.argmax())
    return float(ratio[at]), float(x[at])


def ulp(magnitude: Tensor) -> Tensor:
    """Distance of fp32 numbers around a magnitude, fp64."""
    return torch.exp2(torch.floor(torch.log2(magnitude.clamp(min=SMALLEST_NORMAL))) - 23)


def largest_term(record: Activation, key: str, x: Tensor, p: dict[str, float], true: Tensor) -> Tensor:
    """Magnitude of the largest thing that the formula of f (or slope, or a derivative) adds up; fp64.

    Of a record that TERMS does not know: of what x and every parameter contribute, each times its derivative.
    """
    terms = TERMS[record.name](key, x, p, true) if record.name in TERMS else contributions(record, key, x, p)
    return torch.stack([true.abs(), *terms]).amax(0)


def contributions(record: Activation, key: str, x: Tensor, p: dict[str, float]) -> list[Tensor]:
    """|v d/dv| of f, slope or a derivative, for v = x and every parameter."""
    inputs = {"x": x.double()} | {s: torch.tensor([v], dtype=torch.float64) for s, v in p.items()}

    def result(v: Tensor, name: str) -> Tensor:
        x, *values = (inputs | {name: v}).values()
        return results(record, x, dict(zip(p, values, strict=True)))[key]

    def contribution(name: str, v: Tensor) -> Tensor:
        _, derivative = torch.func.jvp(lambda v: result(v, name), (v,), (torch.ones_like(v),))
        return (v * derivative).abs().nan_to_num(posinf=0.0)

    return [contribution(name, v) for name, v in inputs.items()]


def exponential(key: str, x: Tensor, p: dict[str, float], true: Tensor) -> list[Tensor]:
    neg, e = x.clamp(max=0.0), torch.expm1(x.clamp(max=0.0))
    linear, unit = {"f": (x, e * p["a_n"]), "slope": (torch.ones_like(x), e * p["a_n"])}.get(key, (0 * x, e))
    return [p["b"] * linear.abs(), unit.abs(), neg.abs() * (p["a_n"] if key == "f" else key == "a_n")]


def square(key: str, x: Tensor, p: dict[str, float], true: Tensor) -> list[Tensor]:
    return [p["b"] * (x if key == "f" else torch.ones_like(x)).abs()] if key in ("f", "slope") else []


def expanded_elu(key: str, x: Tensor, p: dict[str, float], true: Tensor) -> list[Tensor]:
    a, neg, e = p["a"], x.clamp(max=0.0), torch.expm1(x.clamp(max=0.0))
    terms = [{"f": (1 + 2 * a) * e, "slope": (1 + 2 * a) * (e + 1), "a": 2 * e}[key].abs()]
    return terms + [a * (x.abs() if key == "f" else 1) + 0 * x, neg.abs() * (key == "a")]


def only_itself(key: str, x: Tensor, p: dict[str, float], true: Tensor) -> list[Tensor]:
    return []


def product(gate: Callable[[Tensor], Tensor]) -> Callable[..., list[Tensor]]:
    """Of x (g (1 + 2a) - a), alone or on the negative side."""

    def terms(key: str, x: Tensor, p: dict[str, float], true: Tensor) -> list[Tensor]:
        a = p.get("a", 0.0)
        expanded = gate(x) * (1 + 2 * a)
        if key == "slope":  # g + x g'
            return [0 * x + a, expanded, (true - (expanded - a)).abs()]
        return [a * x.abs(), expanded * x.abs()] if key == "f" else []

    return terms


def bare(gate: Callable[[Tensor], Tensor]) -> Callable[..., list[Tensor]]:
    """Of g (1 + 2a) - a."""
    return lambda key, x, p, true: [p["a"] + 0 * x, gate(x) * (1 + 2 * p["a"])] if key == "f" else []


def half(key: str, x: Tensor, p: dict[str, float], true: Tensor) -> list[Tensor]:
    """Of x (1 + tanh v) / 2."""
    return [x.abs() / 2 if key == "f" else torch.where(x.abs() < 15, 0.5, 0.0)]


def normal(x: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-x / 2**0.5)


def arctan(x: Tensor) -> Tensor:
    return torch.atan2(torch.ones_like(x), -x) / torch.pi


# Tighter than `contributions`, which needs no formula.
TERMS = {
    **dict.fromkeys(["xielu", "xielu_cubic"], exponential),
    "xiprelu": square,
    "xelu": expanded_elu,
    **dict.fromkeys(["xielu_neg_silu", "xielu_neg_xsilu", "xsilu", "silu"], product(torch.sigmoid)),
    **dict.fromkeys(["xgelu", "gelu"], product(normal)),
    "xatlu": product(arctan),
    "xsilu_glu1": bare(torch.sigmoid),
    "xgelu_glu1": bare(normal),
    "xatlu_glu1": bare(arctan),
    "gelu_tanh": half,
    **dict.fromkeys(["xielu_neg_zero", "relu", "relu2"], only_itself),
}
