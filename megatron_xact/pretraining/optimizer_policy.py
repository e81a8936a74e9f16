"""The learning-rate multiplier and weight decay of activation parameters.

Megatron's `pretrain` builds its parameter groups itself and takes no override, and groups of our own would change the
layout of optimizer checkpoints. Adam's and SGD's updates are linear in the learning rate, though, and do not depend on
the value of a parameter without decay. So torch's optimizer hooks can apply the policy exactly: alpha is 0 during the
step, which leaves the bare update in it, and then, with m the multiplier and w the decay,

    alpha <- alpha_before + m update - m lr w alpha_before

Without a policy (m = 1, w = 0, the default: Megatron never decays tensors with one dimension) no hook is installed.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


def apply_policy(parameters: list[torch.nn.Parameter], lr_mult: float, weight_decay_mult: float) -> None:
    """Install the policy for `parameters` (fp32, (1,) each) in every optimizer of this process that updates them.

    weight_decay_mult multiplies the run's weight decay at that step. The parameters are fp32, so the optimizer, the
    distributed one included, updates them in place or through views of their memory; no master copy is bypassed.
    """
    if not parameters or (lr_mult == 1.0 and weight_decay_mult == 0.0):
        return
    before: dict[int, list[Tensor]] = {}
    found: WeakKeyDictionary[Optimizer, tuple[list, list]] = WeakKeyDictionary()

    def updated_by(optimizer: Optimizer) -> list[tuple[dict, list[torch.nn.Parameter]]]:
        """Its groups, with those of `parameters` in them: looked for once, since loading keeps the lists of a group."""
        lists = [group["params"] for group in optimizer.param_groups]
        known, held = found.get(optimizer, ([], []))
        if len(known) != len(lists) or any(a is not b for a, b in zip(known, lists, strict=True)):
            at = {p.data_ptr(): p for p in parameters}  # by address: the optimizer may hold views of them
            held = [[at[q.data_ptr()] for q in params if q.data_ptr() in at] for params in lists]
            found[optimizer] = lists, held
        return [(group, held) for group, held in zip(optimizer.param_groups, held, strict=True) if held]

    @torch.no_grad()
    def remember(optimizer: Optimizer, args, kwargs) -> None:
        groups = [held for _, held in updated_by(optimizer)]
        before[id(optimizer)] = [torch.cat(held) for held in groups]
        for held in groups:
            torch._foreach_zero_(held)  # alpha_after - alpha_before would carry alpha's rounding, m times enlarged

    @torch.no_grad()
    def scale(optimizer: Optimizer, args, kwargs) -> None:
        # The activation's own group has none: the run's decay is that of the groups which are decayed.
        decay = weight_decay_mult * max(group["weight_decay"] for group in optimizer.param_groups)
        for (group, held), old in zip(updated_by(optimizer), before.pop(id(optimizer)), strict=True):
            new = old + lr_mult * (torch.cat(held) - group["lr"] * decay * old)
            torch._foreach_copy_(held, new.split(1))

    register_optimizer_step_pre_hook(remember)
    register_optimizer_step_post_hook(scale)
