"""One tensor-parallel MLP on gloo ranks against its unsharded twin: plain torch in fp64, differentiated by autograd.

The twin shares nothing with the code under test: the formulas (`oracles`) are written from the papers, its weights are
cut into Megatron's shards here, and alpha's gradient is whatever autograd makes of the whole, unsharded computation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from oracles import ORACLES, oracle_of, unfit
from ranks import run_ranks
from torch import Tensor

from megatron_xact import activations

pytestmark = pytest.mark.distributed

WORLD = 4
S, B, H, FFN = 8, 2, 16, 32
TENSORS, ALPHA = 1e-6, 1e-5  # bounds on |ours - twin| / |twin|: outputs, input and weight gradients; alpha gradients


# Of raw parameters, plain torch.
FORMULAS = {name: oracle.of_raw for name, oracle in ORACLES.items()}
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

    @property
    def name(self) -> str:
        return self.activation.split()[0]

    def record(self) -> activations.Activation:
        return activations.get(self.name, trainable=LEARNED.get(self.activation))


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
    formula = FORMULAS[case.name]
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


def on_ranks(cases: list[Case], without_sum: list[Case]) -> tuple[dict[Case, tuple], dict[Case, tuple]]:
    """`compared` for cases as they are, and for others with the tensor-parallel sum removed."""
    from tiny_gpt import model_parallel

    from megatron_xact.layers import activation

    table, planted = {}, {}
    for tp in (1, 2, 4):
        with model_parallel(tp) as groups:
            table |= {case: compared(case, groups) for case in cases if case.tp == tp}
            summed = activation.sum_gradients_over_tensor_parallel
            activation.sum_gradients_over_tensor_parallel = lambda p, group: p
            planted |= {case: compared(case, groups) for case in without_sum if case.tp == tp}
            activation.sum_gradients_over_tensor_parallel = summed
    return table, planted


# --- the tests --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tables(request):
    """By rank: what `on_ranks` returns for the cases of the tests that were selected."""
    selected = {test_equals_the_unsharded_twin: [], test_a_missing_sum_is_noticed: []}
    for item in request.session.items:
        if getattr(item, "function", None) in selected:
            selected[item.function].append(item.callspec.params["case"])
    fit = [[case for case in cases if not unfit(activations.get(case.name))] for cases in selected.values()]
    return run_ranks(on_ranks, WORLD, *fit)


def too_large(errors: dict[str, float], learned: set[str]) -> dict[str, float]:
    """The quantities outside their bounds (NaN is outside)."""
    return {name: error for name, error in errors.items() if not error <= (ALPHA if name in learned else TENSORS)}


def learned_gradients(case: Case) -> set[str]:
    return {f"d{q.name}" for q in case.record().trainable}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_unsharded_twin(tables, case):
    oracle_of(case.name)
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
