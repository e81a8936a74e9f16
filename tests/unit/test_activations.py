"""The activation records against what they did not compute: mpmath, torch.nn.functional, transformers.

`oracles.ORACLES` states every published formula once more, as the terms whose sum is the value, at 80 digits;
derivatives are numeric ones of that. `test_nothing_is_missing` says what a new record still needs; the others skip it.
"""

import dataclasses
import math
import pickle
import re

import mpmath
import pytest
import torch
from mpmath import mp, mpf
from oracles import ORACLES, oracle_of, unfit

from megatron_xact import activations

NAMES = activations.names()
SIZES = (1e-8, 1e-6, 1e-4, 0.01, 0.3, 0.999, 1.0, 1.001, 3.7, 12.0, 88.0, 1e3, 1e4)
EXTREMES = [sign * size for size in SIZES for sign in (-1, 1)]
ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
TRAINED = {"a_p": 1.37, "a_n": 2.2, "b": 0.3, "a": 0.45}  # effective values far from init, by symbol


@pytest.fixture(autouse=True)
def eighty_digits():
    with mp.workdps(80):
        yield


def effective(record, values, dtype=torch.float64):
    """Every parameter as a tensor (1,), at its init or at `values` by symbol."""
    return {q.symbol: torch.tensor([values.get(q.symbol, q.init)], dtype=dtype) for q in record.parameters}


def trained(record):
    """Effective values far from init, by symbol."""
    return {q.symbol: TRAINED.get(q.symbol, q.init + 0.37) for q in record.parameters}


def exact(record, p):
    """p by name, as numbers of 80 digits."""
    return {q.name: mpf(p[q.symbol].item()) for q in record.parameters}


def oracle(record, xs, p):
    """(values, largest terms), fp64 roundings of exact results."""
    terms = [oracle_of(record.name).terms(mpf(x), **exact(record, p)) for x in xs]
    pairs = [(float(sum(t)), float(max(map(abs, t)))) for t in terms]
    return torch.tensor(pairs, dtype=torch.float64).unbind(1)


def derivative(f, at):
    """Numeric, one part in 1e25 or better; the step stays on at's side of 0."""
    h = mpf(10) ** -15 * (abs(at) if at else 1)
    return (8 * (f(at + h) - f(at - h)) - (f(at + 2 * h) - f(at - 2 * h))) / (12 * h)


class Wrapped(torch.autograd.Function):
    """The record's forward and backward as autograd sees them; raw parameters go through `effective`."""

    @staticmethod
    def forward(ctx, x, record, *values):
        ctx.record = record
        ctx.save_for_backward(x, *values)
        return record.forward(x, dict(zip(symbols(record), values, strict=True)))

    @staticmethod
    def backward(ctx, dy):
        x, *values = ctx.saved_tensors
        p = dict(zip(symbols(ctx.record), values, strict=True))
        dx, grads = ctx.record.backward(x, p, dy)
        return dx, None, *(grads[s].reshape(1) for s in symbols(ctx.record))


def symbols(record):
    return [q.symbol for q in record.parameters]


def all_trainable(name, **init):
    return activations.get(name, trainable=[q.name for q in activations.get(name).parameters], **init)


def raw_tensors(record, dtype=torch.float64):
    return {n: torch.tensor([v], dtype=dtype, requires_grad=True) for n, v in record.initial_raw().items()}


def missing(record):
    """What a record still needs, in one line; None if nothing."""
    from megatron_xact.kernels.device_functions import MAX_PARAMETERS, device_function

    if reason := unfit(record):
        return reason
    if len(record.parameters) > MAX_PARAMETERS:
        return f"{record.name} has {len(record.parameters)} parameters; the kernels take up to {MAX_PARAMETERS}"
    if device_function(record) is None:
        return (
            f"{record.name} has no device function: write it in megatron_xact/kernels/device_functions.py"
            " and add it to _BY_MATHS there"
        )
    return None


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_missing(name):
    if reason := missing(activations.get(name)):
        pytest.fail(reason, pytrace=False)


def test_what_is_missing_is_named():
    xielu = activations.get("xielu")
    assert missing(xielu) is None
    for changes, words in (
        ({"name": "mine"}, "mine has no oracle"),
        ({"maths": len}, "xielu has no device function"),
        ({"parameters": xielu.parameters + xielu.parameters[:1]}, "xielu has 4 parameters"),
        ({"parameters": xielu.parameters[1:]}, "xielu: above is {'alpha_n': 'beta'} by its record and {'alpha_p'"),
    ):
        assert words in missing(dataclasses.replace(xielu, **changes))


def test_every_oracle_has_a_record():
    assert set(ORACLES) <= set(NAMES)
    aliases = [a for n in NAMES for a in activations.get(n).aliases]
    assert len(set(NAMES) | set(aliases)) == len(NAMES) + len(aliases)


@pytest.mark.parametrize("name", NAMES)
def test_record_is_complete(name):
    record = activations.get(name)
    assert record.formula and "\n" not in record.formula and record.source
    assert record.gated == record.formula.endswith("* up"), "a gated record's formula ends in '* up', no other's does"
    # a gated one's may name an ungated one of the same maths
    formulas = " ".join(r.formula for r in map(activations.get, NAMES) if r.maths == record.maths)
    for q in record.parameters:
        assert re.search(rf"(?<![A-Za-z_]){q.symbol}(?![A-Za-z_])", formulas), (name, q.symbol)
    assert len(set(symbols(record))) == len(record.parameters)
    assert all(activations.get(a) == record for a in record.aliases)
    assert pickle.loads(pickle.dumps(record)) == record and hash(record) == hash(activations.get(name))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_input_and_raw_parameters(name):
    record = all_trainable(name)
    torch.manual_seed(1)
    x = (torch.randn(3, 8, dtype=torch.float64) * 2).requires_grad_()
    raw = {n: (v + 0.3).detach().requires_grad_() for n, v in raw_tensors(record).items()}

    def f(x, *values):
        p = record.effective(dict(zip(raw, values, strict=True)))
        return Wrapped.apply(x, record, *(p[s] for s in symbols(record)))

    assert torch.autograd.gradcheck(f, (x, *raw.values()), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("moved", [False, True], ids=["init", "trained"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_slopes_against_mpmath_from_1e_8_to_1e4(name, moved):
    """fp64: within 8 ulps of the largest term, of the formula and of its derivative."""
    record, expected = activations.get(name), oracle_of(name)
    p = effective(record, trained(record) if moved else {})
    x = torch.tensor(EXTREMES, dtype=torch.float64)
    truth, largest = oracle(record, EXTREMES, p)
    error = (record.value(x, p) - truth).abs()
    bound = 8 * ULP[torch.float64] * expected.conditioning(x) * largest + 1e-300
    assert (error <= bound).all(), x[error > bound]
    assert torch.equal(record.value(x[3], p), record.value(x, p)[3]), "0-dim input gives 0-dim output"

    slope, partials = record.slopes(x, p)
    assert set(partials) <= set(symbols(record)) and {q.symbol for q in record.trainable} <= set(partials)
    names, values = {q.symbol: q.name for q in record.parameters}, exact(record, p)
    of_product = not any(expected.terms(mpf(0), **values))
    for i, at in enumerate(map(mpf, EXTREMES)):
        terms = expected.terms(at, **values)
        parts = [derivative(lambda t, k=k: expected.terms(t, **values)[k], at) for k in range(len(terms))]
        scale = max(map(abs, parts))
        if of_product:  # the slope of x g(x) is g + x g', so g = term / x counts too
            scale = max(scale, *(abs(t / at) for t in terms))
        bound = 8 * ULP[torch.float64] * expected.conditioning(at) * scale + 1e-60
        assert abs(slope[i].item() - sum(parts)) <= bound, (name, float(at))
        for s, partial in partials.items():
            n = names[s]
            want = derivative(lambda t, n=n, at=at: sum(expected.terms(at, **values | {n: t})), values[n])
            tight = 8 * ULP[torch.float64] * abs(want)
            assert abs(partial[i].item() - want) <= tight + mpf(10) ** -320, (name, s, float(at))


def test_expm1_minus_x_is_accurate_to_a_few_ulps_everywhere():
    """df/da_n of xIELU, which cancels twice: dense over the series, its seam at -1, and the far side."""
    x = -torch.cat([torch.logspace(-12, 1, 500), torch.linspace(0.9, 1.1, 101)]).double()
    for dtype in (torch.float64, torch.float32):
        z = x.to(dtype)
        got = activations.get("xielu").slopes(z, {"a_p": 0.8, "a_n": 0.8, "b": 0.5})[1]["a_n"]
        want = torch.tensor([float(mp.expm1(mpf(v)) - mpf(v)) for v in z.tolist()], dtype=torch.float64)
        worst = ((got.double() - want).abs() / want / ULP[dtype]).max().item()
        assert got.dtype == dtype and worst <= 4, f"{worst:.2f} ulps in {dtype}"


@pytest.mark.parametrize("name", NAMES)
def test_slopes_equal_autograd_of_value(name):
    record = activations.get(name)
    p = {s: v.requires_grad_() for s, v in effective(record, trained(record)).items()}
    x = (torch.arange(-120, 121).double() / 20).requires_grad_()  # with 0: at a kink both take the left slope
    slope, partials = record.slopes(x, p)
    (by_autograd,) = torch.autograd.grad(record.value(x, p).sum(), x, retain_graph=True)
    torch.testing.assert_close(slope, by_autograd, rtol=1e-12, atol=1e-12)
    for s, partial in partials.items():
        (want,) = torch.autograd.grad(record.value(x, p).sum(), p[s])
        torch.testing.assert_close(partial.sum().reshape(1), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_at_0_the_value_is_that_of_both_sides_and_the_slope_that_of_the_left(name):
    """The slopes on both sides are compared with the oracle's, which says whether they are one."""
    record = activations.get(name)
    p = effective(record, {})
    x = torch.tensor([-1e-12, -0.0, 0.0, 1e-12], dtype=torch.float64)
    value, (slope, _) = record.value(x, p), record.slopes(x, p)
    assert (value - value[1]).abs().max() <= 1e-11
    assert (slope[:3] - slope[0]).abs().max() <= 1e-11, f"slopes around 0: {slope.tolist()}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("a", [0.0, 0.3, -0.3])
def test_infinities_and_nan(name, a):
    """The oracle's limits at -inf and +inf, wherever the parameters without a bound are; nan is never swallowed."""
    record, limits = activations.get(name), oracle_of(name).limits
    p = effective(record, {q.symbol: q.init + a for q in record.trainable if q.lower is None})
    *ours, nan = record.value(torch.tensor([-math.inf, math.inf, math.nan]), p).tolist()
    assert math.isnan(nan)
    for got, want in zip(ours, limits(**{q.name: p[q.symbol].item() for q in record.parameters}), strict=True):
        assert math.isclose(got, want, rel_tol=1e-6) or (math.isnan(got) and math.isnan(want)), f"{got} is not {want}"


def test_eps_inherits_nan_at_minus_infinity():
    record = activations.get("xielu", eps=-1e-6)
    assert record.value(torch.tensor([-math.inf]), effective(record, {}, torch.float32)).isnan().all()


def test_initial_raw_values_and_their_effective_ones():
    record = activations.get("xielu")
    raw = record.initial_raw()
    assert raw["alpha_p"] == pytest.approx(float(mp.log(mp.expm1(mpf("0.8")))), rel=1e-15)
    assert raw["alpha_n"] == pytest.approx(float(mp.log(mp.expm1(mpf("0.3")))), rel=1e-15)
    assert f"{raw['alpha_p']:.6f} {raw['alpha_n']:.6f}" == "0.203382 -1.050226"
    for name in NAMES:
        for init in (1e-3, 0.1, 0.8, 25.0, 300.0):
            start = {q.name: init + 0.5 for q in activations.get(name).parameters if q.lower is not None}
            record = activations.get(name, **start)
            p = record.effective({n: t.detach() for n, t in raw_tensors(record).items()})
            for q in record.trainable:
                assert p[q.symbol].item() == pytest.approx(q.init, rel=2.3e-16, abs=0), (name, q.name)


def test_effective_values_keep_their_constraints():
    record = activations.get("xielu", trainable=("alpha_p", "alpha_n", "beta"))
    for raw in (-30.0, -16.0, 0.0, 30.0, 1e4):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            alpha, beta = torch.tensor([raw], dtype=dtype), torch.tensor([0.5], dtype=dtype)
            p = record.effective({"alpha_p": alpha, "alpha_n": alpha, "beta": beta})
            assert p["a_p"] > 0 and p["a_p"].dtype == torch.promote_types(dtype, torch.float32)
            assert p["a_n"] > p["b"] or (raw < -17 and p["a_n"] == p["b"] and dtype != torch.float64)
    fixed = activations.get("xielu", trainable=(), alpha_n=1.5, beta=0.0)
    assert fixed.effective({}) == {"a_p": 0.8, "a_n": 1.5, "b": 0.0} and fixed.initial_raw() == {}
    beta = torch.tensor([0.7], requires_grad=True)
    p = record.effective({"alpha_p": beta, "alpha_n": torch.zeros(1), "beta": beta})
    assert torch.autograd.grad(p["a_n"], beta)[0].item() == 1.0, "alpha_n's bound carries beta's gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_rounding(name, dtype):
    """Error <= 2 x the error of rounding the exact result + 4 fp32 ulps of the largest term; dx alike."""
    record, conditioning = activations.get(name), oracle_of(name).conditioning
    p = effective(record, trained(record), torch.float32)
    torch.manual_seed(0)
    size = torch.logspace(-6, 4, 120)
    x = torch.cat([torch.randn(120) * 2, size, -size, torch.linspace(-0.01, 0.01, 41)]).to(dtype)
    truth, largest = oracle(record, x.tolist(), p)
    up = torch.ones_like(x)
    y = record.forward(torch.cat([x, up]) if record.gated else x, p)
    assert y.dtype == dtype
    bound = 2 * (truth.to(dtype).double() - truth).abs() + 1e-36  # and gates below fp32's normal range
    bound += 4 * ULP[torch.float32] * conditioning(x.double()) * largest
    overflow = truth.to(dtype).isinf()
    assert torch.equal(y[overflow], truth.to(dtype)[overflow])
    error = (y.double() - truth).abs()
    assert (error <= bound)[~overflow].all(), f"x = {x[(error > bound) & ~overflow]}"

    x64, dy = x.double(), torch.randn_like(x)
    slope = record.slopes(x64, effective(record, {s: v.item() for s, v in p.items()}))[0]
    dx, grads = record.backward(torch.cat([x, up]) if record.gated else x, p, dy)
    dx, want = dx[: x.numel()], slope * dy.double()
    scale = dy.double().abs() * (slope.abs() + 2)
    finite = ~want.to(dtype).isinf()
    bound = 2 * (want.to(dtype).double() - want).abs() + 8 * ULP[torch.float32] * scale
    assert dx.dtype == dtype and ((dx.double() - want).abs() <= bound)[finite].all()
    assert set(grads) == {q.symbol for q in record.trainable}
    assert all(g.dtype == torch.float32 and g.dim() == 0 for g in grads.values())


@pytest.mark.parametrize("name", NAMES)
def test_sign_of_every_small_bf16_input(name):
    bits = torch.arange(0, 0x3C24, dtype=torch.int16)  # 0 .. 0.01
    x = bits.view(torch.bfloat16)
    x = torch.cat([x, -x])
    record = activations.get(name)
    assert 0.0099 < x.max() < 0.0101 and len(x.unique()) == 2 * len(bits) - 1
    y = record.forward(torch.stack([x, torch.ones_like(x)], -1) if record.gated else x, effective(record, {}))
    truth = record.value(x.double(), effective(record, {})).bfloat16()
    assert torch.equal(y.reshape(-1).sign(), truth.sign())
    if name in ("xielu", "xiprelu", "silu", "gelu", "xsilu"):  # f(x) ~ x/2 there
        assert torch.equal(truth.sign()[truth != 0], x.sign()[truth != 0]) and (truth != 0).sum() > len(bits)


@pytest.mark.parametrize("name", [n for n in NAMES if activations.get(n).trainable])
def test_parameter_gradients_are_summed_in_fp32(name):
    record = activations.get(name)
    torch.manual_seed(3)
    x, p = torch.randn(64, 2048).bfloat16(), effective(record, {}, torch.float32)
    dy = torch.randn(64, 1024 if record.gated else 2048).bfloat16()
    _, grads = record.backward(x, p, dy)
    _, want = record.backward(x.double(), effective(record, {}), dy.double())
    gate, weight = (x[:, :1024], dy * x[:, 1024:]) if record.gated else (x, dy)
    for s, partial in record.slopes(gate.double(), effective(record, {}))[1].items():
        if s in want:
            magnitude = (weight.double() * partial).abs().sum()
            assert want[s].dtype == torch.float64 and (grads[s] - want[s]).abs() <= 1e-6 * magnitude


FUNCTIONAL = {  # what torch has itself
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "swiglu": torch.nn.functional.silu,
    "geglu": torch.nn.functional.gelu,
    "reglu": torch.relu,
    "xsilu_glu2": lambda x: torch.nn.functional.silu(x) * 1.9 - 0.45 * x,
    "xgelu_glu2": lambda x: torch.nn.functional.gelu(x) * 1.9 - 0.45 * x,
    "xelu_glu2": lambda x: torch.nn.functional.elu(x) * 1.9 - 0.45 * x,
}


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_equal_a_composition_of_torch_functions(name):
    """Gated: the first half of the last dimension is the gate, as in Megatron. Autograd differentiates the oracle."""
    record, terms = activations.get(name), oracle_of(name).terms
    p = effective(record, trained(record))
    by_name = {q.name: p[q.symbol] for q in record.parameters}
    function = FUNCTIONAL.get(name, lambda x: sum(terms(x, **by_name)))
    torch.manual_seed(4)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    gate, up = (x[..., :6], x[..., 6:]) if record.gated else (x, 1.0)
    want = function(gate) * up
    torch.testing.assert_close(record.forward(x, p), want, rtol=1e-13, atol=1e-14)
    dy = torch.randn_like(want)
    (dx,) = torch.autograd.grad(want, x, dy)
    torch.testing.assert_close(record.backward(x, p, dy)[0], dx, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [n for n in NAMES if activations.get(n).hf])
def test_agrees_with_transformers_by_its_name(name):
    from transformers.activations import ACT2FN

    record = activations.get(name)
    x = torch.linspace(-20, 20, 4001)
    gated = torch.stack([x, torch.ones_like(x)], -1) if record.gated else x
    theirs = ACT2FN[record.hf].float()
    raw = dict(theirs.named_parameters())  # raw alphas have their names; theirs start rounded to bf16
    assert raw.keys() == record.initial_raw().keys()
    assert all(abs(raw[n].item() - v) < 4e-3 for n, v in record.initial_raw().items())
    ours = record.forward(gated, record.effective(raw)).reshape(-1)
    torch.testing.assert_close(ours, theirs(x), rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("beta", [0.5, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eps_gives_the_bits_of_transformers(dtype, beta):
    from transformers.activations import XIELUActivation

    theirs = XIELUActivation(alpha_p_init=0.9, alpha_n_init=1.1, beta=beta, eps=-1e-6, dtype=dtype)
    record = activations.get("xielu", alpha_p=0.9, alpha_n=1.1, beta=beta, eps=-1e-6)
    torch.manual_seed(5)
    size = torch.logspace(-9, 4, 20_000)
    x = torch.cat([torch.randn(20_000), size, -size, torch.zeros(1)]).to(dtype)
    a_p = torch.nn.functional.softplus(theirs.alpha_p)
    a_n = theirs.beta + torch.nn.functional.softplus(theirs.alpha_n)
    want = theirs._xielu_python(x)
    assert torch.equal(record.forward(x, {"a_p": a_p, "a_n": a_n, "b": beta}), want)
    mixed = {"a_p": a_p.double(), "a_n": a_n.float(), "b": theirs.beta}
    assert torch.equal(record.value(x, mixed), want), "p's dtypes do not change the result's"
    if dtype == torch.float32:  # and through our own `effective`
        p = record.effective({"alpha_p": theirs.alpha_p, "alpha_n": theirs.alpha_n})
        assert torch.equal(record.forward(x, p), want)
    ours_exact = activations.get("xielu", beta=beta).forward(x, {"a_p": a_p, "a_n": a_n, "b": beta})
    assert not torch.equal(ours_exact, want), "without eps the bits differ, or this test sees nothing"


@pytest.mark.parametrize("eps", [0.0, -1e-6])
def test_slope_at_0_is_beta_where_transformers_autograd_is_wrong(eps):
    from transformers.activations import XIELUActivation

    theirs = XIELUActivation(dtype=torch.float64)
    record = activations.get("xielu", eps=eps)
    p = effective(record, {})
    x = torch.tensor([-3.0, -0.1, -2e-6, -5e-7, 0.0, 1e-7, 2.0], dtype=torch.float64, requires_grad=True)
    (wrong,) = torch.autograd.grad(theirs._xielu_python(x).sum(), x)
    dx, _ = record.backward(x.detach(), p, torch.ones_like(x))
    inside = torch.tensor([False, False, False, True, True, False, False])
    torch.testing.assert_close(dx[~inside], wrong[~inside], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(dx[inside], torch.full((2,), 0.5, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(wrong[inside], torch.full((2,), -0.3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: activations.get("xeilu"), "unknown activation 'xeilu'; did you mean .*xielu"),
        (lambda: activations.get("XIELU"), "did you mean xielu"),
        (lambda: activations.get("qqqq"), "known: xielu, xiprelu"),
        (lambda: activations.get("xielu", alpha_n=0.5), "alpha_n = 0.5 must be greater than beta = 0.5"),
        (lambda: activations.get("xielu", beta=0.9), "alpha_n = 0.8 must be greater than beta = 0.9"),
        (lambda: activations.get("xielu", alpha_p=0), "alpha_p = 0.0 must be greater than 0.0"),
        (lambda: activations.get("xielu", alpha_p=math.nan), "alpha_p = nan must be a finite number"),
        (lambda: activations.get("xielu", alpha_p="0.8"), "alpha_p = '0.8' must be a finite number"),
        (
            lambda: activations.get("xielu", alphap=0.8),
            "no parameter 'alphap', only: .*; did you mean 'alpha_p'",
        ),
        (lambda: activations.get("relu", alpha=0.8), "relu has no parameter 'alpha', only: none"),
        (lambda: activations.get("xielu", eps=1e-6), "eps = 1e-06 must be 0 .off. or a small negative"),
        (lambda: activations.get("xiprelu", eps=-1e-6), "eps = -1e-06 has no meaning here"),
        (lambda: activations.get("xielu", trainable=("alpha",)), "no parameter 'alpha'"),
        (lambda: activations.get("xielu", trainable="alpha_p"), "must be a list of parameter names"),
        (
            lambda: activations.get("swiglu").forward(torch.ones(2, 3), {}),
            r"last dimension in two; got shape \(2, 3\)",
        ),
    ],
)
def test_impossible_requests_end_in_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_traces_as_one_graph(name):
    """No graph break and no data-dependent Python, whatever the record; the numbers are the eager ones."""
    record = activations.get(name)
    torch.compiler.reset()  # all records share code, and dynamo stops recompiling one function after 8 times
    x, p = torch.randn(4, 16).bfloat16(), record.effective(raw_tensors(record, torch.float32))
    y = torch.compile(record.forward, fullgraph=True, backend="eager")(x, p)
    dx, grads = torch.compile(record.backward, fullgraph=True, backend="eager")(x, p, y)
    want_dx, want = record.backward(x, p, y)
    assert torch.equal(y, record.forward(x, p)) and torch.equal(dx, want_dx)
    assert grads.keys() == want.keys() and all(torch.equal(grads[s], want[s]) for s in want)


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["xielu", "xgelu_glu2", "xatlu"])
def test_inductor_agrees_with_eager(name):
    torch.compiler.reset()
    record = activations.get(name)
    torch.manual_seed(6)
    x = torch.cat([torch.randn(8, 256), torch.tensor([[-1e3, -1e-7, 0.0, math.nan]]).expand(8, 4)], 1)
    p = effective(record, {}, torch.float32)
    y = torch.compile(record.forward, fullgraph=True)(x, p)
    torch.testing.assert_close(y, record.forward(x, p), rtol=2e-6, atol=2e-6, equal_nan=True)
    x = x.nan_to_num(0.5)
    dy = torch.randn_like(record.forward(x, p))
    dx, grads = torch.compile(record.backward, fullgraph=True)(x, p, dy)
    want_dx, want = record.backward(x, p, dy)
    torch.testing.assert_close(dx, want_dx, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grads, want, rtol=1e-5, atol=1e-5)


def test_oracle_differentiates():
    """The numeric derivative that judges the slopes is itself right."""
    assert abs(derivative(mpmath.exp, mpf(-3)) - mp.exp(-3)) < mpf(10) ** -22
