"""alpha's own lr multiplier and weight decay, in Megatron's optimizers, against AdamW with a group of its own.

The reference is the same model without DDP and without Megatron's optimizer: torch's AdamW over three groups (decayed,
not decayed, alpha with lr * multiplier and its decay), on the batches of both data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from ranks import run_ranks

from megatron_xact import activations

pytestmark = pytest.mark.distributed

STEPS = 20
EXACT = 1e-6  # relative, of every alpha after STEPS steps
WEIGHTS = 1e-5  # relative in norm, of everything else: the policy must not touch it


@dataclass(frozen=True)
class Case:
    lr_mult: float
    weight_decay_mult: float
    distributed_optimizer: bool

    def __str__(self) -> str:
        kind = "distributed" if self.distributed_optimizer else "plain"
        return f"lr{self.lr_mult:g}-decay{self.weight_decay_mult:g}-{kind}"


POLICIES = ((10.0, 0.5), (10.0, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0))
CASES = [Case(*policy, distributed) for distributed in (False, True) for policy in POLICIES]


def megatron(case: Case, groups, *, policy: bool = True) -> dict:
    """STEPS steps of Megatron's DDP and optimizer at DP=2, each rank with its own batches."""
    import tiny_gpt

    from megatron_xact.pretraining.optimizer_policy import apply_policy

    model = tiny_gpt.build(activations.get("xielu"), groups, distributed_optimizer=case.distributed_optimizer)
    if policy:
        apply_policy(list(tiny_gpt.alphas(model).values()), case.lr_mult, case.weight_decay_mult)
    optimizer, scheduler = tiny_gpt.optimizer_of(model, use_distributed_optimizer=case.distributed_optimizer)
    for step in range(STEPS):
        tiny_gpt.train_step(model, optimizer, scheduler, tiny_gpt.batch(2 * step + groups.dp.rank()), groups)
    return {name.replace("module.", ""): p.detach().clone() for name, p in model.named_parameters()}


def by_hand(case: Case, groups) -> dict:
    import tiny_gpt

    model = tiny_gpt.build(activations.get("xielu"), groups, ddp=False)
    alphas = list(tiny_gpt.alphas(model).values())
    others = [p for p in model.parameters() if not any(p is alpha for alpha in alphas)]
    settings = [
        ([p for p in others if p.dim() > 1], 1.0, 1.0),
        ([p for p in others if p.dim() == 1], 1.0, 0.0),
        (alphas, case.lr_mult, case.weight_decay_mult),
    ]
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": tiny_gpt.DECAY * decay} for params, _, decay in settings],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    for step in range(STEPS):
        for group, (_, lr_mult, _) in zip(optimizer.param_groups, settings, strict=True):
            group["lr"] = tiny_gpt.LR * (1 - step / tiny_gpt.LR_STEPS) * lr_mult
        optimizer.zero_grad()
        losses = [model(**tiny_gpt.batch(2 * step + rank)).mean() for rank in (0, 1)]
        (sum(losses) / 2).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def first_step_in_bf16(groups) -> dict:
    """alpha before and after one step of the distributed optimizer on a bf16 model, lr_mult 10, decay 0.5."""
    import tiny_gpt

    from megatron_xact.pretraining.optimizer_policy import apply_policy

    half = {"bf16": True, "params_dtype": torch.bfloat16}
    model = tiny_gpt.build(activations.get("xielu"), groups, distributed_optimizer=True, **half)
    apply_policy(list(tiny_gpt.alphas(model).values()), 10.0, 0.5)
    optimizer, scheduler = tiny_gpt.optimizer_of(model, use_distributed_optimizer=True, **half)
    before = {name: p.detach().clone() for name, p in tiny_gpt.alphas(model).items()}
    tiny_gpt.train_step(model, optimizer, scheduler, tiny_gpt.batch(groups.dp.rank()), groups)
    return {name: (before[name], p.detach().clone()) for name, p in tiny_gpt.alphas(model).items()}


def reloaded(times: int) -> list[list[float]]:
    """Two alphas after each of STEPS steps at lr_mult 10 and decay 0.5, with the optimizer's state loaded so often.

    In groups of their own, beside one that is decayed; lr changes at every step.
    """
    from torch.optim import optimizer as hooked

    from megatron_xact.pretraining.optimizer_policy import apply_policy

    alphas = [torch.nn.Parameter(torch.tensor([value])) for value in (0.7, 0.3)]
    weight = torch.nn.Parameter(torch.ones(4))
    groups = [{"params": [alpha], "weight_decay": 0.0} for alpha in alphas] + [{"params": [weight]}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    before = set(hooked._global_optimizer_pre_hooks), set(hooked._global_optimizer_post_hooks)
    apply_policy(alphas, 10.0, 0.5)
    found = []
    for step in range(STEPS):
        if step and step % (STEPS // (times + 1)) == 0 and times:
            optimizer.load_state_dict(optimizer.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (STEPS - step)
        for p in (*alphas, weight):
            p.grad = torch.sin(p.detach() * (step + 1))
        optimizer.step()
        found.append([alpha.item() for alpha in alphas])
    for hooks_there, known in zip((hooked._global_optimizer_pre_hooks, hooked._global_optimizer_post_hooks), before,
                                  strict=True):  # fmt: skip
        for key in set(hooks_there) - known:
            del hooks_there[key]
    return found


def default_groups(groups) -> dict[str, float]:
    """alpha's name -> the weight decay of its group, as Megatron sets it up without any policy."""
    import tiny_gpt

    model = tiny_gpt.build(activations.get("xielu"), groups)
    optimizer, _ = tiny_gpt.optimizer_of(model)
    of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert tiny_gpt.DECAY in of.values()
    return {name: of[id(p)] for name, p in tiny_gpt.alphas(model).items()}


def hooks() -> int:
    from torch.optim import optimizer

    return len(optimizer._global_optimizer_pre_hooks) + len(optimizer._global_optimizer_post_hooks)


def on_ranks() -> dict:
    import tiny_gpt

    from megatron_xact.pretraining.optimizer_policy import apply_policy

    found = {"megatron": {}, "by hand": {}}
    with tiny_gpt.model_parallel(1) as groups:
        # First, while no hook is there: training without ever having heard of a policy.
        default = Case(1.0, 0.0, False)
        found["untouched"] = megatron(default, groups, policy=False)
        found["default groups"] = default_groups(groups)
        apply_policy([torch.nn.Parameter(torch.ones(1))], 1.0, 0.0)
        apply_policy([], 10.0, 1.0)
        found["hooks by default"] = hooks()
        for case in CASES:
            found["megatron"][case] = megatron(case, groups)
            if not case.distributed_optimizer:
                found["by hand"][case.lr_mult, case.weight_decay_mult] = by_hand(case, groups)
        found["hooks"] = hooks()
        found["bf16"] = first_step_in_bf16(groups)
    found["reloaded"] = reloaded(0), reloaded(3)
    return found


@pytest.fixture(scope="module")
def results():
    """By data-parallel rank: what `on_ranks` returns."""
    return run_ranks(on_ranks, 2)


def is_alpha(name: str) -> bool:
    return ".activation_func." in name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_adamw_with_a_group_of_its_own(results, case):
    for found in results:
        mine, truth = found["megatron"][case], found["by hand"][case.lr_mult, case.weight_decay_mult]
        assert mine.keys() == truth.keys()
        for name, value in mine.items():
            error = (value - truth[name]).norm() / truth[name].norm()
            assert error <= (EXACT if is_alpha(name) else WEIGHTS), f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_data_parallel_ranks_agree(results, case):
    first, second = (found["megatron"][case] for found in results)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != (1.0, 0.0)], ids=str)
def test_the_references_differ(results, policy):
    """A policy without effect would pass the comparison above if its reference had none either."""
    plain, other = (results[0]["by hand"][key] for key in ((1.0, 0.0), policy))
    for name in filter(is_alpha, plain):
        assert (plain[name] - other[name]).norm() > 100 * EXACT * plain[name].norm()


def test_default_installs_nothing_and_changes_nothing(results):
    for found in results:
        assert found["hooks by default"] == 0 < found["hooks"]
        with_default = found["megatron"][Case(1.0, 0.0, False)]
        assert all(torch.equal(value, with_default[name]) for name, value in found["untouched"].items())


def test_alpha_is_not_decayed_by_default(results):
    for found in results:
        assert len(found["default groups"]) == 4
        assert set(found["default groups"].values()) == {0.0}


def test_bf16_with_the_distributed_optimizer(results):
    """Adam's first step is the learning rate: alpha - 10 lr (+-1 + 0.05 alpha), on both ranks."""
    for found in results:
        assert len(found["bf16"]) == 4
        for name, (before, after) in found["bf16"].items():
            assert torch.equal(after, results[0]["bf16"][name][1])
            step = (before - after).item() / (10 * 1e-3) - 0.05 * before.item()
            assert abs(step) == pytest.approx(1.0, rel=1e-3)


def test_goes_on_with_the_groups_that_loading_makes(results):
    """torch puts new groups in the place of those the policy has seen; their learning rates are the ones that count."""
    for found in results:
        whole, resumed = found["reloaded"]
        assert whole == resumed and whole[0] != whole[-1]
        for before, after in zip((0.7, 0.3), whole[0], strict=True):  # of what the third group is decayed by, half
            assert abs((before - after) / (10 * 2e-2) - 0.05 * before) == pytest.approx(1.0, rel=1e-3)
