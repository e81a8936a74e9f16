"""The learning-rate multiplier and weight decay of activation parameters.

Megatron's `pretrain` builds its parameter groups itself and takes no override, and groups of our own would change the
layout of optimizer checkpoints. Adam's and SGD's updates are linear in the learning rate, though, and do not depend on
the value of a parameter without decay. So torch's optimizer hooks can apply the policy exactly: alpha is 0 during the
step, which leaves the bare update in it, and then, with m the multiplier and w the decay,

    alpha <- alpha_before + m update - m lr w alpha_before

Without a policy (m = 1, w = 0, the default: Megatron never decays tensors with one dimension) no hook is installed.
"""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
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
    before: dict[int, Tensor] = {}

    def updated_by(optimizer: Optimizer) -> list[tuple[torch.nn.Parameter, float]]:
        """Those of `parameters` in `optimizer`, with their group's lr. Found by address: it may hold views of them."""
        at = {p.data_ptr(): p for p in parameters}
        held = ((q.data_ptr(), group["lr"]) for group in optimizer.param_groups for q in group["params"])
        return [(at[address], lr) for address, lr in held if address in at]

    @torch.no_grad()
    def remember(optimizer: Optimizer, args, kwargs) -> None:
        for p, _ in updated_by(optimizer):
            before[id(p)] = p.detach().clone()
            p.data.zero_()  # alpha_after - alpha_before would carry alpha's rounding, m times enlarged, at every step

    @torch.no_grad()
    def scale(optimizer: Optimizer, args, kwargs) -> None:
        # The activation's own group has none: the run's decay is that of the groups which are decayed.
        decay = weight_decay_mult * max(group["weight_decay"] for group in optimizer.param_groups)
        for p, lr in updated_by(optimizer):
            old = before.pop(id(p))
            p.data.copy_(old + lr_mult * (p.detach() - lr * decay * old))

    register_optimizer_step_pre_hook(remember)
    register_optimizer_step_post_hook(scale)


def make_16_bit_runs_savable(chunks: list[torch.nn.Module]) -> None:
    """Let Megatron's distributed optimizer save fp32 alphas among bf16 or fp16 parameters. Call before it is built.

    In each parameter group it puts fp32 parameters before 16-bit ones, but looks them up, when it saves and loads, in
    the order of the data-parallel buffers, which have one dtype each: with fp32 first, the two orders agree.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel):
            chunk.buffers.sort(key=lambda buffer: buffer.param_dtype != torch.float32)
