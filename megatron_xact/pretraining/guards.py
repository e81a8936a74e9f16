"""Are replicated parameters really equal on every tensor-parallel rank? Bit for bit, at an interval, or stop.

Replicas that drift apart raise no error by themselves: only tensor-parallel rank 0 is written to a checkpoint, so the
other ranks' values are lost at the next resume and the exported model is one that was never trained. The comparison is
one MIN and one MAX over a few ten thousand integers, so it costs next to nothing at an interval of 100 steps.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from megatron_xact.layers.activation import TrainableActivation
from megatron_xact.pretraining.zero.whole import whole


class ReplicaMismatch(RuntimeError):
    """A replicated parameter differs between tensor-parallel ranks."""


@torch.no_grad()
def check_replicas(model_chunks: list[torch.nn.Module], tp_group: torch.distributed.ProcessGroup, step: int) -> None:
    """Raise ReplicaMismatch, on every rank of the group, naming the first parameter that differs and its values.

    Compared are all parameters that Megatron does not shard over tensor-parallel ranks: activation parameters, norms,
    biases of row-parallel layers. A collective: every rank of `tp_group` calls it at the same step.
    """
    if tp_group.size() == 1:
        return
    names, parameters = _replicated(model_chunks)
    with whole(parameters):
        bits = torch.cat([_bits(p) for p in parameters])
        low, high = bits.clone(), bits
        torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN, group=tp_group)
        torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX, group=tp_group)
        if torch.equal(low, high):
            return
        at = (low != high).nonzero()[0].item()  # position among all compared elements, then within its parameter
        which = 0
        while at >= parameters[which].numel():
            at -= parameters[which].numel()
            which += 1
        value = parameters[which].detach().reshape(-1)[at : at + 1].float()
    values = [torch.empty_like(value) for _ in range(tp_group.size())]
    torch.distributed.all_gather(values, value, group=tp_group)
    ranks = torch.distributed.get_process_group_ranks(tp_group)
    told = ", ".join(f"rank {rank} = {v.item():.9g}" for rank, v in zip(ranks, values, strict=True))
    raise ReplicaMismatch(
        f"after {step} steps, {names[which]}[{at}] differs between tensor-parallel ranks: {told}. "
        "Its replicas must be equal: resume from the last checkpoint, and report how they came apart"
    )


def _replicated(model_chunks: list[torch.nn.Module]) -> tuple[list[str], list[Tensor]]:
    found = {}
    for chunk in model_chunks:
        modules = dict(chunk.named_modules())
        alphas = (
            (f"{name}.{key}", parameter)
            for name, module in modules.items()
            if isinstance(module, TrainableActivation)
            for key, parameter in module.raw().items()
        )
        for name, parameter in itertools.chain(chunk.named_parameters(), alphas):  # under ZeRO, the alphas are hidden
            if not getattr(parameter, "tensor_model_parallel", False):
                found[_with_global_layer(modules, name)] = parameter
    return list(found), list(found.values())


def _bits(parameter: Tensor) -> Tensor:
    """The parameter's bit pattern as a flat int32 tensor, so that -0.0, NaN and the last bit all count."""
    as_integer = {4: torch.int32, 2: torch.int16, 1: torch.int8}[parameter.element_size()]
    return parameter.detach().reshape(-1).view(as_integer).to(torch.int32)


def _with_global_layer(modules: dict[str, torch.nn.Module], name: str) -> str:
    """`module.decoder.layers.3.x` -> `decoder.layers.15.x`: the number within the model, not the pipeline stage."""
    words = [word for word in name.split(".") if word != "module"]
    if "layers" in words:
        at = words.index("layers")
        layer = modules[name.split(f".{words[at + 1]}.")[0] + f".{words[at + 1]}"]
        words[at + 1] = str(layer.layer_number - 1)
    return ".".join(words)
