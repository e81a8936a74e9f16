"""The nearest layout that fits, where the one asked for does not: what to set, and nothing that changes the training.

Searched are tensor, pipeline and context parallelism, the micro-batch and recomputation; the global batch stays. (Where
none of these helps, another batch that would is named apart.) Near means few and small changes, the cheapest in speed
first: the distances below are a judgement, not a measurement.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from itertools import product

from megatron_xact.pretraining import checks
from megatron_xact.pretraining.config import RunConfig
from megatron_xact.pretraining.planning import memory
from megatron_xact.pretraining.planning.hardware import Gpu
from megatron_xact.pretraining.planning.job import Job, with_layout

# How far away a factor of 2 in one of Megatron's variables is,
_DISTANCE = {"micro_batch_size": 1.0, "tensor_model_parallel_size": 2.0, "pipeline_model_parallel_size": 3.0,
             "context_parallel_size": 4.0}  # fmt: skip
# and recomputation: as the config has it, of the MLPs, of everything.
_RECOMPUTATION = (
    (0.0, {}),
    (2.5, {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
    (5.0, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
)


def fitting(config: RunConfig, args: Namespace, gpus: int, gpus_per_node: int, gpu: Gpu) -> Job:
    """The job as `args` ask for it. ValueError, in one line: why it cannot be, and the nearest that can."""
    try:
        job = with_layout(config, args, gpus, gpus_per_node)
        problem = misfit(job, gpu)
        if problem is None:
            return job
    except ValueError as error:
        problem = str(error)
    raise ValueError(f"{problem}; {_way_out(config, args, gpus, gpus_per_node, gpu)}")


def misfit(job: Job, gpu: Gpu) -> str | None:
    """In words, that the job needs more memory than a GPU has; None: it fits."""
    need = memory.heaviest(job)
    if need.total <= gpu.memory:
        return None
    return (
        f"pipeline stage {need.stage} needs {need.total / 1e9:.1f} GB per GPU ({need.allocated / 1e9:.1f} allocated "
        f"and {need.reserve / 1e9:.1f} in reserve), {gpu.name} has {gpu.memory / 1e9:.1f}"
    )


def nearest(config: RunConfig, args: Namespace, gpus: int, gpus_per_node: int, gpu: Gpu) -> dict[str, object] | None:
    """What to change in `args`, by Megatron's variables, so that the run is legal and fits; None: nothing helps."""
    candidates = sorted(_candidates(args, gpus, gpus_per_node), key=lambda pair: pair[0])
    for _, changes in candidates:
        if _works(config, Namespace(**(vars(args) | changes)), gpus, gpus_per_node, gpu):
            return {name: value for name, value in changes.items() if value != getattr(args, name)}
    return None


def _works(config: RunConfig, args: Namespace, gpus: int, gpus_per_node: int, gpu: Gpu) -> bool:
    """Is the layout that `args` ask for legal, and does it fit?"""
    try:
        return misfit(with_layout(config, args, gpus, gpus_per_node), gpu) is None
    except ValueError:
        return False


def _candidates(args: Namespace, gpus: int, gpus_per_node: int) -> Iterator[tuple[float, dict]]:
    """(distance, changes) of every layout worth a look, `args`' own among them."""
    powers = [2**i for i in range(int(math.log2(gpus)) + 1)]
    tensors = sorted({args.tensor_model_parallel_size, *(t for t in powers if t <= gpus_per_node)})
    pipelines = [p for p in range(1, args.num_layers + 3) if gpus % p == 0]
    contexts = sorted({args.context_parallel_size, *(c for c in powers if c <= 16)})
    # Where the config leaves it to Megatron, it follows from the layout asked for, and another would change it.
    batch = args.global_batch_size or args.micro_batch_size * max(1, gpus // checks.ranks_per_replica(args))
    micros = sorted({m for m in range(1, 2 * args.micro_batch_size + 1) if batch % m == 0})
    for t, p, c, m, (distance, recomputation) in product(tensors, pipelines, contexts, micros, _RECOMPUTATION):
        if gpus % (t * p * c) or batch % (m * (gpus // (t * p * c))):
            continue
        changes = {
            "tensor_model_parallel_size": t,
            "pipeline_model_parallel_size": p,
            "context_parallel_size": c,
            "micro_batch_size": m,
        }
        distance += sum(_DISTANCE[name] * abs(math.log2(v / getattr(args, name))) for name, v in changes.items())
        if t > 1:
            changes["sequence_parallel"] = True
        yield distance, changes | recomputation | {"global_batch_size": batch}


def _way_out(config: RunConfig, args: Namespace, gpus: int, gpus_per_node: int, gpu: Gpu) -> str:
    changes = nearest(config, args, gpus, gpus_per_node, gpu)
    there = f"{gpus} GPU" + "s" * (gpus > 1)
    told = f"nothing fits {there}" if changes is None else f"nearest that fits {there}: {_flags(changes)}"
    if changes is None and (batch := nearest_batch(config, args, gpus, gpus_per_node, gpu)):
        told += f" but another batch: --global-batch-size {batch}"
    nodes = nearest_nodes(config, args, gpus, gpus_per_node, gpu)
    return told if nodes is None else f"{told}; or the config as it is on --nodes {nodes}"


def nearest_batch(config: RunConfig, args: Namespace, gpus: int, gpus_per_node: int, gpu: Gpu) -> int | None:
    """The global batch, nearest to the one asked for, with which the layout asked for works; None: none does."""
    at_once = args.micro_batch_size * (gpus // checks.ranks_per_replica(args))
    if not at_once:
        return None
    batch = max(1, round((args.global_batch_size or at_once) / at_once)) * at_once
    changed = Namespace(**(vars(args) | {"global_batch_size": batch}))
    return batch if _works(config, changed, gpus, gpus_per_node, gpu) else None


def nearest_nodes(config: RunConfig, args: Namespace, gpus: int, gpus_per_node: int, gpu: Gpu) -> int | None:
    """The number of whole nodes, nearest to what there is, on which the layout asked for works; None: none does."""
    here = max(1, gpus // gpus_per_node)
    for nodes in sorted(range(1, 4 * here + 1), key=lambda n: abs(math.log2(n / here))):
        if _works(config, args, nodes * gpus_per_node, gpus_per_node, gpu):
            return nodes
    return None


def _flags(changes: dict[str, object]) -> str:
    """As words of a command line, which are keys of a config too."""

    def word(value: object) -> str:
        return "" if value is True else " " + (" ".join(value) if isinstance(value, list) else str(value))

    return " ".join(f"--{name.replace('_', '-')}{word(value)}" for name, value in changes.items())
