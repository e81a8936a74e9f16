"""One tensor-parallel MLP on gloo ranks against its unsharded twin: plain torch in fp64, differentiated by autograd.

The twin shares nothing with the code under test: the formulas below are written from the papers, its weights are cut
into Megatron's shards here, and alpha's gradient is whatever autograd makes of the whole, unsharded computation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor

from megatron_xact import activations

pytestmark = pytest.mark.distributed

WORLD = 4
S, B, H, FFN = 8, 2, 16, 32
TENSORS, ALPHA = 1e-6, 1e-5  # bounds on |ours - twin| / |twin|: outputs, input and weight gradients; alpha gradients


# --- the formulas once more, of raw parameters ------------------------------------------------------------------------
def two_sided(power: int, negative: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def f(x, alpha_p, beta=0.5, **others):
        return torch.where(x > 0, F.softplus(alpha_p) * x**power + beta * x, negative(x, beta=beta, **others))

    return f


def exponential(x, alpha_n, beta):
    return (beta + F.softplus(alpha_n)) * (torch.expm1(x) - x) + beta * x


def square(x, alpha_n, beta):
    return F.softplus(alpha_n) * x * x + beta * x


def gate(g: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, alpha: g(x) * (1 + 2 * alpha) - alpha


def expanded(g: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, alpha: x * gate(g)(x, alpha)


def normal(x):
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def arctan(x):
    return torch.atan(x) / math.pi + 0.5


def expanded_elu(x, alpha):
    return (1 + 2 * alpha) * F.elu(x) - alpha * x


FORMULAS = {
    "xielu": two_sided(2, exponential),
    "xiprelu": two_sided(2, square),
    "xielu_cubic": two_sided(3, exponential),
    "xielu_neg_silu": two_sided(2, lambda x, beta: x * torch.sigmoid(x)),
    "xielu_neg_xsilu": two_sided(2, lambda x, beta, alpha: expanded(torch.sigmoid)(x, alpha)),
    "xielu_neg_zero": two_sided(2, lambda x, beta: 0 * x),
    "xsilu": expanded(torch.sigmoid),
    "xgelu": expanded(normal),
    "xatlu": expanded(arctan),
    "xelu": expanded_elu,
    "xsilu_glu1": gate(torch.sigmoid),
    "xgelu_glu1": gate(normal),
    "xatlu_glu1": gate(arctan),
    "xsilu_glu2": expanded(torch.sigmoid),
    "xgelu_glu2": expanded(normal),
    "xatlu_glu2": expanded(arctan),
    "xelu_glu2": expanded_elu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
}
GATED = {name for name in FORMULAS if name.endswith(("glu", "glu1", "glu2")) and name != "xatlu"}
# Learned parameters other than a record's own: beta moves a_n too; none at all leaves plain numbers.
LEARNED = {"xielu with beta": ("alpha_p", "alpha_n", "beta"), "xielu fixed": ()}


@dataclass(frozen=True)
class Case:
    activation: str
    tp: int
    sequence_parallel: bool
    bias: bool

    def __str__(self) -> str:
        words = [self.activation.replace(" ", "_"), f"tp{self.tp}"]
        return "-".join(words + ["sp"] * self.sequence_parallel + ["bias"] * self.bias)

    def record(self) -> activations.Activation:
        return activations.get(self.activation.split()[0], trainable=LEARNED.get(self.activation))


CASES = [
    Case(activation, tp, sequence_parallel, bias)
    for activation in (*activations.names(), *LEARNED)
    for tp, sequence_parallel in ((1, False), (2, False), (2, True), (4, False), (4, True))
    for bias in (False, True)
]
# The planted bug needs an activation that learns, and more than one rank.
PLANTED = [
    Case(activation, tp, sequence_parallel, False)
    for activation in ("xielu", "xiprelu", "xsilu", "xsilu_glu1", "xsilu_glu2")
    for tp in (2, 4)
    for sequence_parallel in (False, True)
]


# --- both sides of the comparison -------------------------------------------------------------------------------------
def whole(case: Case) -> dict[str, Tensor]:
    """Every number of the whole MLP, fp32, equal on all ranks. fc1 of a gated one: all gate rows, then all up rows."""
    # With this seed no case's alpha gradient is a small difference of large terms, which fp32 could not resolve.
    g = torch.Generator().manual_seed(0)
    rows = FFN * (2 if case.record().gated else 1)
    shapes = {"x": (S, B, H), "dy": (S, B, H), "w1": (rows, H), "w2": (H, FFN)}
    if case.bias:
        shapes |= {"b1": (rows,), "b2": (H,)}
    numbers = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    numbers["w1"] *= 1.5 / math.sqrt(H)
    for i, q in enumerate(case.record().trainable):
        numbers[q.name] = torch.tensor([0.3 + 0.4 * i])  # raw, away from every initial value
    return numbers


def twin(case: Case) -> dict[str, Tensor]:
    """The unsharded MLP in fp64: {"y": output, "dx": ..., "dw1": ..., "dalpha_p": ...}."""
    numbers = {name: value.double().requires_grad_(name != "dy") for name, value in whole(case).items()}
    formula = FORMULAS[case.activation.split()[0]]
    learned = {q.name: numbers[q.name] for q in case.record().trainable}
    if case.activation == "xielu fixed":  # effective 0.8 both
        learned = {"alpha_p": inverse_softplus(0.8), "alpha_n": inverse_softplus(0.3)}
    z = numbers["x"] @ numbers["w1"].T + numbers.get("b1", 0.0)
    if case.record().gated:
        a = formula(z[..., :FFN], **learned) * z[..., FFN:]
    else:
        a = formula(z, **learned)
    y = a @ numbers["w2"].T + numbers.get("b2", 0.0)
    y.backward(numbers["dy"])
    return {"y": y.detach()} | {f"d{name}": v.grad for name, v in numbers.items() if name != "dy"}


def inverse_softplus(value: float) -> Tensor:
    return torch.tensor(math.log(math.expm1(value)), dtype=torch.float64)


def ours(case: Case, groups) -> tuple[dict[str, Tensor], bool]:
    """The same quantities from ActivationMLP on the tensor-parallel ranks, joined to whole tensors.

    And whether alpha's gradients, which are not joined, have the same bits on every rank.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from tiny_gpt import transformer_config

    from megatron_xact.layers.mlp import ActivationMLP

    tp, rank, record = groups.tp, groups.tp.rank(), case.record()
    config = transformer_config(
        hidden_size=H,
        ffn_hidden_size=FFN,
        num_attention_heads=4,
        gated_linear_unit=record.gated,
        add_bias_linear=case.bias,
        sequence_parallel=case.sequence_parallel,
    )
    submodules = get_gpt_layer_local_submodules(normalization="RMSNorm").mlp.keywords["submodules"]
    mlp = ActivationMLP(config, submodules, ffn_hidden_size=FFN, tp_group=tp, activation=record)

    def rows_of_fc1(full: Tensor) -> Tensor:
        halves = full.chunk(2 if record.gated else 1)
        return torch.cat([half.chunk(case.tp)[rank] for half in halves])

    def join_fc1(shards: list[Tensor]) -> Tensor:
        halves = [shard.chunk(2 if record.gated else 1) for shard in shards]
        return torch.cat([torch.cat(half) for half in zip(*halves, strict=True)])

    def all_shards(tensor: Tensor) -> list[Tensor]:
        shards = [torch.empty_like(tensor) for _ in range(case.tp)]
        torch.distributed.all_gather(shards, tensor.contiguous(), group=tp)
        return shards

    numbers = whole(case)
    parameters = {"w1": mlp.linear_fc1.weight, "w2": mlp.linear_fc2.weight}
    if case.bias:
        parameters |= {"b1": mlp.linear_fc1.bias, "b2": mlp.linear_fc2.bias}
    parameters |= dict(mlp.activation_func.named_parameters())
    cut = {"w1": rows_of_fc1, "b1": rows_of_fc1, "w2": lambda full: full.chunk(case.tp, 1)[rank]}
    for name, parameter in parameters.items():
        parameter.data.copy_(cut.get(name, lambda full: full)(numbers[name]))

    split = case.sequence_parallel  # the sequence, over the same ranks
    x, dy = (numbers[name].chunk(case.tp)[rank] if split else numbers[name] for name in ("x", "dy"))
    x = x.clone().requires_grad_()
    y, bias = mlp(x)
    y = y if bias is None else y + bias
    y.backward(dy)

    results = {"y": y.detach(), "dx": x.grad} | {f"d{name}": p.grad for name, p in parameters.items()}
    if split:
        results |= {name: torch.cat(all_shards(results[name])) for name in ("y", "dx")}
        if case.bias:
            assert mlp.linear_fc2.bias.sequence_parallel  # Megatron's mark: training sums this gradient
            results["db2"] = torch.stack(all_shards(results["db2"])).sum(0)
    results["dw2"] = torch.cat(all_shards(results["dw2"]), 1)
    for name in ("dw1", "db1") if case.bias else ("dw1",):
        results[name] = join_fc1(all_shards(results[name]))
    replicated = all(
        torch.equal(replica, results[f"d{q.name}"])
        for q in record.trainable
        for replica in all_shards(results[f"d{q.name}"])
    )
    return results, replicated


def compared(case: Case, groups) -> tuple[dict[str, float], bool]:
    """Relative error (in norm) of every quantity; are alpha's gradients bit-equal on all ranks?"""
    (mine, replicated), truth = ours(case, groups), twin(case)
    assert mine.keys() == truth.keys()
    assert all(mine[name].shape == truth[name].shape and mine[name].dtype == torch.float32 for name in truth)
    return {name: ((mine[name] - truth[name]).norm() / truth[name].norm()).item() for name in truth}, replicated


def on_ranks() -> tuple[dict[Case, tuple], dict[Case, tuple]]:
    """`compared` for every case as it is, and for the PLANTED ones with the tensor-parallel sum removed."""
    from tiny_gpt import model_parallel

    from megatron_xact.layers import activation

    table, planted = {}, {}
    for tp in (1, 2, 4):
        with model_parallel(tp) as groups:
            table |= {case: compared(case, groups) for case in CASES if case.tp == tp}
            summed = activation.sum_gradients_over_tensor_parallel
            activation.sum_gradients_over_tensor_parallel = lambda p, group: p
            planted |= {case: compared(case, groups) for case in PLANTED if case.tp == tp}
            activation.sum_gradients_over_tensor_parallel = summed
    return table, planted


# --- the tests --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tables():
    """By rank: what `on_ranks` returns."""
    return run_ranks(on_ranks, WORLD)


def too_large(errors: dict[str, float], learned: set[str]) -> dict[str, float]:
    """The quantities outside their bounds (NaN is outside)."""
    return {name: error for name, error in errors.items() if not error <= (ALPHA if name in learned else TENSORS)}


def learned_gradients(case: Case) -> set[str]:
    return {f"d{q.name}" for q in case.record().trainable}


def test_every_activation_has_a_formula_here():
    assert set(FORMULAS) == set(activations.names())
    assert {name for name in FORMULAS if activations.get(name).gated} == GATED


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_unsharded_twin(tables, case):
    for table, _ in tables:
        errors, replicated = table[case]
        assert not too_large(errors, learned_gradients(case))
        assert replicated


@pytest.mark.parametrize("case", PLANTED, ids=str)
def test_a_missing_sum_is_noticed(tables, case):
    """The meta-test: without the tensor-parallel sum the comparison fails, in alpha's gradients and nowhere else."""
    for _, planted in tables:
        errors, replicated = planted[case]
        assert set(too_large(errors, learned_gradients(case))) == learned_gradients(case)
        assert not replicated
