"""An MLP of TransformerEngine's operations over two tensor-parallel ranks (gloo), against the whole one."""

import multiprocessing
from pathlib import Path

import torch


def tensor_parallel(folder: Path) -> dict:
    """By way: errors (largest over ranks), whether both ranks have the same gradients of alphas, what TE ran."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, folder, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [queue.get() for _ in ranks]
    for process in ranks:
        process.join()
    first, second = found
    merged = {}
    for way in first:
        errors = {key: max(first[way]["errors"][key], second[way]["errors"][key]) for key in first[way]["errors"]}
        alphas = first[way]["alphas"] == second[way]["alphas"]
        merged[way] = {"errors": errors, "alphas": alphas, "ops": first[way]["ops"]}
    return merged


def _rank(rank: int, folder: Path, queue) -> None:
    import mlps
    import transformer_engine.pytorch.ops as ops

    from megatron_xact import activations
    from megatron_xact.layers.te_ops import ActivationOperation

    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
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
    queue.put(found)
    torch.distributed.barrier()
