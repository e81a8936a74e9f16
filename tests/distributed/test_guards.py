"""The replica guard on TP=2 x PP=2: silent while replicas are equal, loud and exact about a single bit that is not."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter

import pytest
import torch
from ranks import run_ranks

from megatron_xact import activations

pytestmark = pytest.mark.distributed

STEP = 1700
ALPHA_P = "mlp.activation_func.alpha_p"


def bits(parameter: torch.Tensor, index: int, pattern: int) -> None:
    """Overwrite one element by this bit pattern."""
    as_integer = {4: torch.int32, 2: torch.int16}[parameter.element_size()]
    parameter.data.reshape(-1).view(as_integer)[index] = pattern


def next_up(parameter: torch.Tensor, index: int = 0) -> None:
    """One ulp, away from zero."""
    as_integer = {4: torch.int32, 2: torch.int16}[parameter.element_size()]
    parameter.data.reshape(-1).view(as_integer)[index] += 1


# name: (pipeline stage, the parameter's name in that stage, what is done to it by tensor-parallel rank)
DAMAGE = {
    "none": (0, "decoder.layers.0." + ALPHA_P, {}),
    "one ulp of alpha, first stage": (0, "decoder.layers.1." + ALPHA_P, {1: next_up}),
    "one ulp of alpha, second stage": (1, "decoder.layers.1." + ALPHA_P, {1: next_up}),
    "one ulp of alpha, rank 0": (1, "decoder.layers.0." + ALPHA_P, {0: next_up}),
    "minus zero": (
        0,
        "decoder.layers.0." + ALPHA_P,
        {0: lambda p: bits(p, 0, 0), 1: lambda p: bits(p, 0, -(2**31))},
    ),
    "two patterns of nan": (
        0,
        "decoder.layers.0." + ALPHA_P,
        {0: lambda p: bits(p, 0, 0x7FC00000), 1: lambda p: bits(p, 0, 0x7FC00001)},
    ),
    "the same nan everywhere": (
        0,
        "decoder.layers.0." + ALPHA_P,
        dict.fromkeys((0, 1), lambda p: bits(p, 0, 0x7FC00000)),
    ),
    "norm weight": (1, "decoder.layers.0.pre_mlp_layernorm.weight", {1: lambda p: next_up(p, 5)}),
    "final norm": (1, "decoder.final_layernorm.weight", {1: lambda p: next_up(p, 63)}),
    "bias of a row-parallel layer": (0, "decoder.layers.1.mlp.linear_fc2.bias", {1: lambda p: next_up(p, 3)}),
    "a shard, different by nature": (0, "decoder.layers.1.mlp.linear_fc1.weight", {1: next_up}),
}
SILENT = ("none", "the same nan everywhere", "a shard, different by nature")


def on_ranks(bf16: bool) -> dict:
    """{"stage", "rank", "said": {damage: the guard's message, or None}, "values": {damage: element 0},
    "elements": (of the whole model, of this rank) by bytes of each}.
    """
    import tiny_gpt

    from megatron_xact.pretraining.checkpointing.keeper import _elements
    from megatron_xact.pretraining.guards import ReplicaMismatch, check_replicas

    with tiny_gpt.model_parallel(tp=2, pp=2) as groups:
        model = tiny_gpt.build(
            activations.get("xielu"),
            groups,
            num_layers=4,
            distributed_optimizer=bf16,
            add_bias_linear=True,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
        )
        parameters = {name.replace("module.", ""): p for name, p in model.named_parameters()}
        stage, rank = groups.pp.rank(), groups.tp.rank()
        found = {"stage": stage, "rank": rank, "said": {}, "values": {}}
        for damage, (where, name, by_rank) in DAMAGE.items():
            if where == stage:
                before = parameters[name].data.clone()
                by_rank.get(rank, lambda p: None)(parameters[name])
                found["values"][damage] = parameters[name].data.reshape(-1)[0].item()
            try:
                check_replicas([model], groups.tp, STEP)
                found["said"][damage] = None
            except ReplicaMismatch as error:
                found["said"][damage] = str(error)
            if where == stage:
                parameters[name].data.copy_(before)
        check_replicas([model], groups.tp, STEP)  # all is repaired
        here = Counter()
        for parameter in model.parameters():
            here[parameter.element_size()] += parameter.numel()
        found["elements"] = _elements([model]), here
        found["at the end"] = at_the_end(model, parameters["decoder.layers.0." + ALPHA_P], rank)
        return found


def at_the_end(model: torch.nn.Module, alpha: torch.Tensor, rank: int) -> str | None:
    """What a run says that ends after STEP steps, whose last one has moved the replicas apart."""
    from megatron.training.global_vars import set_args

    from megatron_xact.pretraining.guards import ReplicaMismatch
    from megatron_xact.pretraining.monitor import Monitor

    monitor = Monitor(None, sys.stderr, guard_interval=STEP + 1, telemetry_interval=0)
    monitor.model = [model]
    if rank == 1:
        next_up(alpha)
    set_args(Namespace(skip_train=False, iteration=STEP))
    try:
        monitor.close()
    except ReplicaMismatch as error:
        return str(error)
    finally:
        set_args(None)


def on_ranks_both() -> dict[bool, dict]:
    return {bf16: on_ranks(bf16) for bf16 in (False, True)}


@pytest.fixture(scope="module")
def by_rank():
    return run_ranks(on_ranks_both, 4)


@pytest.fixture(params=[False, True], ids=["fp32", "bf16"])
def found(by_rank, request):
    """What every rank of the world found: stage 0 on ranks 0 and 1, stage 1 on ranks 2 and 3."""
    return [results[request.param] for results in by_rank]


def test_the_world_is_as_assumed(found):
    assert [(rank["stage"], rank["rank"]) for rank in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("damage", SILENT)
def test_is_silent_while_replicas_are_equal(found, damage):
    assert [rank["said"][damage] for rank in found] == [None] * 4


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage not in SILENT])
def test_names_what_differs_on_every_rank_of_the_group(found, damage):
    """Layer numbers count from the start of the model; ranks are those of the world, as in the job's logs."""
    where, name, _ = DAMAGE[damage]
    if "layers." in name:
        layer = int(name.split(".")[2])
        name = name.replace(f"layers.{layer}.", f"layers.{layer + 2 * where}.")
    for rank in found:
        said = rank["said"][damage]
        if rank["stage"] != where:
            assert said is None
        else:
            assert said is not None, "not noticed"
            assert f"after {STEP} steps, {name}[" in said
            assert f"rank {2 * where} = " in said and f"rank {2 * where + 1} = " in said


def test_tells_the_values_to_the_last_bit(found):
    """`float` of what it prints is the value: nine digits tell two neighbouring fp32 numbers apart."""
    for damage in ("one ulp of alpha, first stage", "one ulp of alpha, second stage"):
        where = DAMAGE[damage][0]
        group = [rank for rank in found if rank["stage"] == where]
        values = [torch.tensor(rank["values"][damage], dtype=torch.float32) for rank in group]
        said = group[0]["said"][damage]
        told = [said.split(f"rank {2 * where + i} = ")[1].split(",")[0].split(". ")[0] for i in (0, 1)]
        assert [torch.tensor(float(number)) for number in told] == values
        assert values[0] != values[1]
    assert "rank 0 = 0, rank 1 = -0." in found[0]["said"]["minus zero"]


def test_the_last_step_is_checked_whatever_the_interval(found):
    assert all(f"after {STEP} steps, decoder.layers." in rank["at the end"] for rank in found)


def test_the_room_for_a_checkpoint_is_that_of_all_ranks(found):
    whole = sum((rank["elements"][1] for rank in found), Counter())
    assert [rank["elements"][0] for rank in found] == [whole] * 4


def test_names_the_element(found):
    assert "pre_mlp_layernorm.weight[5] " in found[2]["said"]["norm weight"]
    assert "final_layernorm.weight[63] " in found[3]["said"]["final norm"]
