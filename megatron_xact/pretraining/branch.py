"""Branching cooldowns: a checkpoint of a run's constant phase goes on into a decay of its own, in a folder of its own.

That is what the WSD schedule (warm-up, stable, decay) is for: one long run at a constant learning rate gives a finished
model at every length for the price of its decay. The branch continues weights, optimizer, random state and data
position; only the schedule's end moves: with S the step it leaves and N the length of the decay, it trains up to
S + N and the last N steps are the decay, in the trunk's own style.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from megatron_xact.pretraining import arguments, resume
from megatron_xact.pretraining import config as config_file
from megatron_xact.pretraining.checkpointing.folder import damage, name_of, saved_steps
from megatron_xact.pretraining.config import BranchConfig, RunConfig

_OF_THE_TRUNK = ("lr-warmup-fraction", "ckpt-step", "use-checkpoint-opt-param-scheduler")


def branch_of(config: RunConfig, words: list[str], sets: list[str], step: int, steps: int) -> RunConfig:
    """The config of the cooldown of `steps` steps that leaves the run of `config` after `step` steps.

    words, sets: the command line's overrides. `--load` in them is the trunk's folder (default: the config's save, or
    load), `--save` the branch's (default: branches/step-S+N in the trunk's). The same call with the branch begun gives
    the same config, which then resumes it. ValueError, FileNotFoundError: the first reason why there is no such branch.
    """
    if config.branch.trunk:
        raise ValueError(f"{config.source} is itself a branch of {config.branch.trunk}: branch from that run")
    given = replace(config, megatron={}).with_overrides(words, sets).megatron
    where = given.get("load") or config.megatron.get("save") or config.megatron.get("load")
    if where is None:
        raise ValueError("branch-from: which run? its config has neither save nor load; name its folder with --load")
    trunk = Path(where).resolve()
    folder = Path(given["save"]) if "save" in given else Path(where) / "branches" / f"step-{step}+{steps}"
    whole = config.with_overrides(words, sets)
    schedule = _schedule(arguments.parse(whole.arguments()), step, steps)
    megatron = {key: value for key, value in whole.megatron.items() if key not in _OF_THE_TRUNK}
    if "tensorboard-dir" not in given:
        megatron.pop("tensorboard-dir", None)  # the trunk's: its curves are not to be continued there
    megatron |= {"save": str(folder), "load": str(folder)} | schedule
    branch = replace(whole, megatron=megatron, branch=BranchConfig(str(trunk), step, whole.megatron["train-iters"]))
    if not _is_begun(folder, branch):
        if folder.resolve() == trunk:
            raise ValueError(f"save = {str(folder)!r} is the trunk's own folder; a branch needs another one")
        _refuse_start(trunk, step, whole)
    return branch


def _schedule(args: Namespace, step: int, steps: int) -> dict[str, int]:
    """The branch's, from the trunk's arguments. ValueError: the trunk has no constant phase at this step to leave."""
    if args.lr_decay_style != "WSD":
        raise ValueError(
            f"branch-from needs lr-decay-style = 'WSD', whose constant phase can be left at any step; this run has "
            f"{args.lr_decay_style!r}"
        )
    if args.train_iters is None:
        raise ValueError("branch-from needs a run that counts in train-iters, not train-samples")
    if args.weight_decay_incr_style != "constant":
        raise ValueError("branch-from needs weight-decay-incr-style = 'constant': others depend on the run's length")
    if steps < 1:
        raise ValueError(f"cooldown-steps = {steps} must be at least 1")
    end = args.lr_decay_iters or args.train_iters
    warmup = args.lr_warmup_iters if args.lr_warmup_fraction is None else int(args.lr_warmup_fraction * end)
    decay = end - args.lr_wsd_decay_iters
    if not max(warmup, 1) <= step <= decay:
        phase = "warm-up" if step < warmup else "decay" if step > decay else "very beginning"
        raise ValueError(
            f"branch-from = {step} lies in the run's {phase}; its learning rate is constant from step "
            f"{max(warmup, 1)} to step {decay}"
        )
    if step + steps > args.train_iters:
        raise ValueError(
            f"cooldown-steps = {steps} would lead past train-iters = {args.train_iters}, for which the order of the "
            f"data is made: from step {step} at most {args.train_iters - step}"
        )
    last = step + steps
    return {"train-iters": last, "lr-decay-iters": last, "lr-wsd-decay-iters": steps, "lr-warmup-iters": warmup}


def _is_begun(folder: Path, branch: RunConfig) -> bool:
    """Whether this branch was begun in `folder`. ValueError: something else was."""
    if not (folder / "config.toml").is_file():
        if saved_steps(folder):
            raise ValueError(f"save = {str(folder)!r} has checkpoints of another training; choose another folder")
        return False
    there = config_file.load(folder / "config.toml")
    if (there.branch, there.megatron.get("train-iters")) != (branch.branch, branch.megatron["train-iters"]):
        theirs = "another run"
        if there.branch.trunk:
            cooldown = there.megatron["train-iters"] - there.branch.step
            theirs = f"the branch from step {there.branch.step} of {there.branch.trunk} with {cooldown} cooldown steps"
        raise ValueError(f"save = {str(folder)!r} belongs to {theirs}; choose another folder")
    return True


def _refuse_start(trunk: Path, step: int, whole: RunConfig) -> None:
    """ValueError or FileNotFoundError: the trunk has no whole checkpoint of this step, or it is of another config."""
    if damage(trunk / name_of(step)) is not None:
        others = ", ".join(str(s) for s in saved_steps(trunk) if damage(trunk / name_of(s)) is None) or "none"
        raise ValueError(f"branch-from: no whole checkpoint of step {step} in {trunk}; there are: {others}")
    args, activation = arguments.parse(whole.arguments()), whole.activation.identity()
    resume.refuse_misfit(trunk / name_of(step), args, activation, whole.xact.engine)
