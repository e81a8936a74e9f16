"""One rank's real model, sharded, at any world size, in one process: what `xact plan --dry-run` builds.

Megatron's process groups are made over torch's "fake" backend, whose collectives do nothing, and the model (our spec,
our layers, Megatron's embedding and head) on the meta device, which has shapes but no memory. It is always the local
layer: TransformerEngine's has the same parameters but insists on a device of its own choice.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from megatron_xact.pretraining import arguments
from megatron_xact.pretraining.planning import counts
from megatron_xact.pretraining.planning.job import Job


@dataclass(frozen=True)
class Built:
    """A rank as it was built, and as the plan has it."""

    rank: int
    gpus: int
    coordinates: dict[str, tuple[int, int]]  # kind of parallelism -> (this rank's place, their number)
    layers: tuple[int, ...]  # numbers in the whole model, from 1
    parameters: dict[str, int]
    replicated: dict[str, int]
    """Of `parameters`, what other ranks of this model copy hold too: on every tensor-parallel rank, or a tied head."""
    planned: dict[str, int]

    @property
    def agrees(self) -> bool:
        return self.parameters == self.planned


def of_rank(job: Job, rank: int) -> Built:
    """Builds and measures. ValueError: no such rank, or what Megatron refuses; the process groups are gone again."""
    if not 0 <= rank < job.layout.gpus:
        raise ValueError(f"--rank {rank} does not exist among {job.layout.gpus:,} GPUs: they are counted from 0")
    args = validated(job, rank)
    with process_groups(args):
        return _built(job, rank, args)


def validated(job: Job, rank: int) -> Namespace:
    """Megatron's arguments, filled in by its own validation as on `rank`. ValueError: what it asserts."""
    from megatron_xact.pretraining import cpu_platform, platform

    if not torch.cuda.is_available():
        cpu_platform.activate()  # the validation asks for the GPU's generation
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's demand, which it only means for GPUs
    local = arguments.command_line(platform.missing_arguments(has_gpu=False, has_te=False))
    args = arguments.parse([*job.config.arguments(), *local, "--fake-process-group"])
    args.rank, args.world_size, args.local_rank = rank, job.layout.gpus, 0
    args.padded_vocab_size = job.shape.vocab
    arguments.fill_in(args)
    return args


@contextlib.contextmanager
def process_groups(args: Namespace) -> Iterator[None]:
    """All of a run's, as rank `args.rank` has them, while inside."""
    from megatron.core import mpu
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_xact.pretraining import gpt  # noqa: F401  (its imports, before groups exist)

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=args.rank, world_size=args.world_size)
    try:
        mpu.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
            create_gloo_process_groups=False,
        )
        yield
    finally:
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _built(job: Job, rank: int, args: Namespace) -> Built:
    from megatron.core import mpu

    chunks = build(job, args)
    first, last = (f(ignore_virtual=True) for f in (mpu.is_pipeline_first_stage, mpu.is_pipeline_last_stage))
    stage = mpu.get_pipeline_model_parallel_rank()
    parameters, replicated = _count(chunks, tied_copy=job.shape.tied and last and not first)
    return Built(
        rank=rank,
        gpus=job.layout.gpus,
        coordinates={
            "tensor": (mpu.get_tensor_model_parallel_rank(), job.layout.tensor),
            "pipeline": (stage, job.layout.pipeline),
            "context": (mpu.get_context_parallel_rank(), job.layout.context),
            "data": (mpu.get_data_parallel_rank(), job.layout.data),
        },
        layers=tuple(layer.layer_number for chunk in chunks for layer in chunk.decoder.layers),
        parameters=parameters,
        replicated=replicated,
        planned=counts.stage_parameters(job.shape, job.layout.tensor, job.layout.stages[stage], first=first, last=last),
    )


def build(job: Job, args: Namespace, device: str = "meta") -> list[torch.nn.Module]:
    """This rank's GPTModel, one per virtual stage. `args`: validated; the process groups exist."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_xact.layers.specs import decoder_block

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        config = gpt_config_from_args(args)
        config.transformer.use_cpu_initialization = True
        config.transformer.perform_initialization = device != "meta"
        config.transformer.context_parallel_size = 1  # splits no parameter; the local attention refuses it
        config.transformer_layer_spec = partial(decoder_block, activation=job.config.activation.record())
        groups = ProcessGroupCollection.use_mpu_process_groups()
        stages = range(job.layout.virtual) if job.layout.virtual > 1 else (None,)
        with torch.device(device):
            return [GPTModelBuilder(config).build_model(groups, vp_stage=stage) for stage in stages]


def _count(chunks: list[torch.nn.Module], tied_copy: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters by group, and the replicated among them."""
    held, shared = (dict.fromkeys(counts.GROUPS, 0) for _ in range(2))
    seen: set[int] = set()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            group = _group(name)
            held[group] += parameter.numel()
            whole = not getattr(parameter, "tensor_model_parallel", False)
            if whole or (tied_copy and group == "head"):
                shared[group] += parameter.numel()
    return held, shared


def _group(name: str) -> str:
    if "activation_func" in name:
        return "activation"
    if "norm" in name:
        return "norms"
    for part, group in (
        (".mlp.", "mlp"),
        (".self_attention.", "attention"),
        ("output_layer.", "head"),
        ("embedding.", "embedding"),
    ):
        if part in f".{name}":
            return group
    raise AssertionError(f"parameter {name} is in no group")


def as_dict(built: Built) -> dict:
    return {**asdict(built), "agrees": built.agrees}


def text(built: Built) -> str:
    places = ", ".join(f"{kind} {place} of {number}" for kind, (place, number) in built.coordinates.items())
    layers = f"{built.layers[0]} to {built.layers[-1]}" if built.layers else "none"
    lines = [
        f"rank {built.rank:,} of {built.gpus:,}: {places}",
        f"layers {layers} ({len(built.layers)}); built on the meta device over a fake process group",
        f"  {'':<12}{'built':>16}{'planned':>16}{'replicated':>16}",
    ]
    for group in counts.GROUPS:
        numbers = (built.parameters[group], built.planned[group], built.replicated[group])
        lines.append(f"  {group:<12}" + "".join(f"{n:>16,}" for n in numbers))
    totals = (sum(d.values()) for d in (built.parameters, built.planned, built.replicated))
    lines.append(f"  {'total':<12}" + "".join(f"{n:>16,}" for n in totals))
    lines.append("as planned" if built.agrees else "NOT as planned: please report this, with the config")
    return "\n".join(lines)
