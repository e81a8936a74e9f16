"""Two gloo ranks, and an MLP of TransformerEngine's operations over them, against the whole one."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing


def on_two_ranks(function: Callable[[int, Path], dict], folder: Path) -> list[dict]:
    """What function(rank, folder) returns on each of two ranks, forked from this process and joined in one group."""
    torch.multiprocessing.start_processes(_rank, (function, folder), nprocs=2, start_method="fork")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _rank(rank: int, function, folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(function(rank, folder)))
    torch.distributed.barrier()


def tensor_parallel(folder: Path) -> dict:
    """By way: errors (largest over ranks), whether both ranks have the same gradients of alphas, what TE ran."""
    first, second = on_two_ranks(_all_ways, folder)
    merged = {}
    for way in first:
        errors = {key: max(first[way]["errors"][key], second[way]["errors"][key]) for key in first[way]["errors"]}
        alphas = first[way]["alphas"] == second[way]["alphas"]
        merged[way] = {"errors": errors, "alphas": alphas, "ops": first[way]["ops"]}
    return merged


def _all_ways(rank: int, folder: Path) -> dict:
    import mlps
    import transformer_engine.pytorch.ops as ops

    from megatron_xact import activations
    from megatron_xact.layers.te.operation import ActivationOperation

    group = torch.distributed.group.WORLD
    rows, hidden, ffn = mlps.ROWS, mlps.HIDDEN, mlps.FFN
    x, dout = (mlps.randn(rows, 1, hidden, seed=seed) for seed in (0, 9))
    found = {}
    for name in ("xielu", "xsilu_glu2"):
        record = activations.get(name)
        exact = mlps.plain(record, x, dout, True)
        w1, b1, w2 = mlps.weights(record)
        halves = 1 + record.gated

        def shard(t, halves=halves, rank=rank):  # of fc1's rows: of each half of a gated layer
            return torch.cat([half.chunk(2)[rank] for half in t.detach().chunk(halves)])

        for sequence in (False, True):
            for way, fused in mlps.WAYS.items():
                options = {"device": "cpu", "tensor_parallel_group": group, "sequence_parallel": sequence}
                fc1 = ops.Linear(hidden, ffn * halves, tensor_parallel_mode="column", **options)
                fc2 = ops.Linear(ffn, hidden, bias=False, tensor_parallel_mode="row", **options)
                activation = ActivationOperation(record, group, fused_linear=fused)
                with torch.no_grad():
                    fc1.weight.copy_(shard(w1)), fc1.bias.copy_(shard(b1))
                    fc2.weight.copy_(w2.detach().chunk(2, 1)[rank])
                model = ops.Sequential(fc1, activation, fc2)

                def local(t, sequence=sequence, rank=rank):
                    return t.chunk(2)[rank] if sequence else t

                mine = local(x).clone().requires_grad_()
                y = model(mine)
                y.backward(local(dout))
                pairs = {
                    "y": (y.detach(), local(exact["y"])),
                    "x": (mine.grad, local(exact["x"])),
                    "w1": (fc1.weight.grad, shard(exact["w1"])),
                    "bias": (fc1.bias.grad, shard(exact["bias"])),
                    "w2": (fc2.weight.grad, exact["w2"].chunk(2, 1)[rank]),
                } | {key: (p.grad, exact[key]) for key, p in activation.named_parameters()}
                found[f"{name} {'sequence ' * sequence}{way}"] = {
                    "errors": {key: mlps.error(*pair) for key, pair in pairs.items()},
                    "alphas": [p.grad.item() for p in activation.parameters()],
                    "ops": mlps.forward_ops(model),
                }
    return found
