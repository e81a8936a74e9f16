"""From a recipe to runs: matched widths, steps, batches, rates, and where cooldowns leave their trunk.

Parameters: N counts the matrices of the layers, norms, alphas and the output head; an untied input embedding is left
out. A gated activation gets two thirds of the ffn, so that its three matrices hold what the two of an ungated one do.

Budgets: per activation, size, seed and rate one run, the trunk, goes to the largest budget; each smaller one is a
cooldown that leaves it. A cooldown is the same share of every budget. Checkpoints to leave from lie at multiples of
one interval, for which budgets give way by at most 1 %.

Batch and rate are those of the largest budget of a size, the same for all activations but for factors of the rate that
the recipe gives them (a rate that suits one activation can spoil another).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_xact.pretraining.planning.counts import Shape, flops_per_token, parameters
from megatron_xact.studies.outside import Model
from megatron_xact.studies.recipe import LAW, Recipe, Size
from megatron_xact.studies.table import format_count

MATCHED = 0.005  # how far the parameters of activations of one size may differ
GIVES_WAY = 0.01  # how far a budget may differ from what was asked for
PARAMS_COUNT = "without-input-embedding"  # a tied embedding counts, as the head


@dataclass(frozen=True)
class Budget:
    """steps: of the whole run, trunk included. leaves: step at which the cooldown begins."""

    steps: int
    leaves: int

    @property
    def cooldown(self) -> int:
        return self.steps - self.leaves


@dataclass(frozen=True)
class Trunk:
    name: str
    activation: str
    size: str
    seed: int
    factor: float  # of the rate
    shape: Shape
    lr: float
    sequences: int  # per step
    warmup: int  # steps
    interval: int  # steps between checkpoints
    budgets: tuple[Budget, ...]  # ascending; the last one is the trunk's own
    evaluations: int  # batches of validation

    @property
    def params(self) -> int:
        return params(self.shape)

    @property
    def batch(self) -> int:
        """Tokens."""
        return self.sequences * self.shape.sequence

    @property
    def steps(self) -> int:
        """That are trained: the trunk's, and every cooldown's own."""
        return self.budgets[-1].steps + sum(b.cooldown for b in self.budgets[:-1])


@dataclass(frozen=True)
class Cell:
    """One finished model: a trunk at one of its budgets."""

    trunk: Trunk
    budget: Budget

    @property
    def is_branch(self) -> bool:
        return self.budget is not self.trunk.budgets[-1]

    @property
    def name(self) -> str:
        return f"{self.trunk.name} at {format_count(self.tokens)} tokens"

    @property
    def folder(self) -> str:
        """Relative to the study's."""
        leaf = f"/branches/step-{self.budget.leaves}+{self.budget.cooldown}" if self.is_branch else ""
        return f"runs/{self.trunk.name}{leaf}"

    @property
    def tokens(self) -> int:
        return self.budget.steps * self.trunk.batch

    @property
    def steps(self) -> int:
        """That this cell itself trains."""
        return self.budget.cooldown if self.is_branch else self.budget.steps

    @property
    def flops(self) -> int:
        """Of all training that the model has had."""
        return flops_per_token(self.trunk.shape) * self.tokens


def params(shape: Shape) -> int:
    count = parameters(shape)
    return sum(count.values()) - (0 if shape.tied else count["embedding"])


def cells(trunks: Sequence[Trunk]) -> list[Cell]:
    """Trunks first, then what leaves them."""
    own = [Cell(t, t.budgets[-1]) for t in trunks]
    return own + [Cell(t, b) for t in trunks for b in t.budgets[:-1]]


def build(recipe: Recipe, model_of: Callable[[str, Size], Model]) -> list[Trunk]:
    """model_of: (activation, size) -> what the trainer makes of it. ValueError: what does not go together."""
    trunks = []
    for size, sizes in recipe.sizes.items():
        models = [model_of(activation, sizes) for activation in recipe.activations]
        rates = [recipe.rates.get(activation, 1.0) for activation in recipe.activations]
        names = [m.activation for m in models]
        if len(set(names)) < len(names):
            raise ValueError(f"activations = {', '.join(recipe.activations)}: two of them are the same one")
        plain = replace(models[0].shape, ffn=sizes.ffn, gated=False, activation_parameters=0)
        common = _schedule(recipe, size, plain, models[0].micro_batch)
        for model, own in zip(models, rates, strict=True):
            shape = _matched(model.shape, plain, recipe.ffn_multiple, f"{model.activation} {size}")
            for seed in recipe.seeds:
                for factor in recipe.sweep:
                    rate = f"-lr{factor:g}x" if len(recipe.sweep) > 1 else ""
                    trunks.append(
                        Trunk(
                            name=f"{size}-{model.activation}-s{seed}{rate}",
                            activation=model.activation,
                            size=size,
                            seed=seed,
                            factor=factor,
                            shape=shape,
                            **common | {"lr": _digits(common["lr"] * own * factor)},
                        )
                    )
    return trunks


def _matched(shape: Shape, plain: Shape, multiple: int, name: str) -> Shape:
    """The shape with the ffn size that gives it the parameters of the ungated one."""
    ffn = max(1, round(2 * plain.ffn / 3 / multiple)) * multiple if shape.gated else plain.ffn
    shape = replace(shape, ffn=ffn)
    off = params(shape) / params(plain) - 1
    if abs(off) > MATCHED:
        raise ValueError(
            f"{name}: with ffn = {ffn} instead of {plain.ffn} its parameters differ by {off:+.2%}, more than "
            f"{MATCHED:.1%}; make ffn a multiple of {multiple * 3 // 2 or 3}, or ffn-multiple smaller"
        )
    return shape


def _schedule(recipe: Recipe, size: str, plain: Shape, micro_batch: int) -> dict:
    """What all activations, seeds and rates of a size share."""
    N = params(plain)
    wanted = sorted(recipe.tokens or [r * N for r in recipe.tokens_per_parameter])
    C = flops_per_token(plain, head=False) * wanted[-1]
    lr = 0.3118 * C**-0.1250 if recipe.learning_rate == LAW else float(recipe.learning_rate)
    batch = 0.2920 * C**0.3271 if recipe.batch == LAW else recipe.batch
    multiple = recipe.batch_multiple or micro_batch
    if multiple % micro_batch:
        raise ValueError(f"batch-multiple = {multiple} must be a multiple of micro-batch-size = {micro_batch}")
    sequences = max(1, round(batch / plain.sequence / multiple)) * multiple
    tokens = sequences * plain.sequence
    interval, budgets = fit_budgets([D / tokens for D in wanted], recipe.cooldown, size)
    warmup = max(1, round(recipe.warmup * N / tokens))
    if warmup > budgets[0].leaves / 2:
        raise ValueError(
            f"{size}: a warm-up of {warmup} steps is more than half of the {budgets[0].leaves} steps before the "
            "first cooldown; make warmup smaller or the least budget larger"
        )
    return {
        "lr": lr, "sequences": sequences, "warmup": warmup, "interval": interval, "budgets": budgets,
        "evaluations": max(1, -int(-recipe.validation_tokens // tokens)),
    }  # fmt: skip


def fit_budgets(steps: Sequence[float], cooldown: float, size: str) -> tuple[int, tuple[Budget, ...]]:
    """The interval of checkpoints, as long as can be, and the budgets as whole steps that leave at multiples of it.

    steps: wanted, ascending.
    """
    leaves = [round(s * (1 - cooldown)) for s in steps]
    if leaves[0] < 2 or steps[0] * cooldown < 0.5:
        raise ValueError(f"{size}: the least budget is {steps[0]:.3g} steps, too few; make it larger or batch smaller")
    *branches, last = leaves
    if branches:  # 1 divides all of them
        interval = next(q for q in range(branches[0], 0, -1)
                        if all(abs(round(s / q) * q - s) <= GIVES_WAY * s for s in branches))  # fmt: skip
    else:
        interval = -(-last // 4)
    starts = [round(s / interval) * interval for s in branches] + [last]
    budgets = tuple(Budget(s + max(1, round(s * cooldown / (1 - cooldown))), s) for s in starts)
    if any(b.steps < 1.02 * a.steps for a, b in zip(budgets, budgets[1:], strict=False)):
        told = ", ".join(f"{s:.4g}" for s in steps)
        raise ValueError(f"{size}: budgets of {told} steps are too close to each other; leave some out")
    return interval, budgets


def _digits(value: float) -> float:
    return float(f"{value:.3g}")
