"""Which device a run uses here, and the Megatron arguments that follow from it and from what is installed."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch

from megatron_xact.installed import present
from megatron_xact.pretraining import cpu_platform, mends
from megatron_xact.pretraining.arguments import Value
from megatron_xact.pretraining.config import RunConfig
from megatron_xact.pretraining.status import host_name

if TYPE_CHECKING:
    from megatron_xact.pretraining.checkpointing.choice import Ranks


def prepare(config: RunConfig) -> dict[str, Value]:
    """Make this process ready to train `config`; returns the arguments to add to it (the config's own win).

    ValueError: the config asks for what this machine lacks.
    """
    if torch.cuda.is_available():
        _refuse_more_ranks_than_gpus()
    else:
        _refuse_to_leave_gpus_idle()
        cpu_platform.activate()
    mends.apply()
    has_gpu = not cpu_platform.is_active()
    arguments = missing_arguments(has_gpu, has_te=present("transformer_engine"))
    for key, value in arguments.items():
        if key in config.megatron and config.megatron[key] != value:
            _refuse(config, key, value)
    arguments |= _for_async_saves(config)
    if config.xact.engine == "deepspeed":
        # Its parameters have no main_grad, into which Megatron's fused kernel and TransformerEngine's modules add.
        arguments |= missing_arguments(has_gpu, has_te=False) | {"no-gradient-accumulation-fusion": True}
    return {key: value for key, value in arguments.items() if key not in config.megatron}


def _for_async_saves(config: RunConfig) -> dict[str, Value]:
    """What `async-save` needs besides: without the first, Megatron 0.19 drops it and saves synchronously."""
    if not config.megatron.get("async-save"):
        return {}
    if config.megatron.get("async-strategy") == "nvrx" and not present("nvidia_resiliency_ext"):
        raise ValueError("async-strategy = 'nvrx' needs the package nvidia-resiliency-ext; without it: 'mcore'")
    strategy = "nvrx" if present("nvidia_resiliency_ext") else "mcore"
    return {"use-persistent-ckpt-worker": True, "async-strategy": strategy}


def missing_arguments(has_gpu: bool, has_te: bool) -> dict[str, Value]:
    """What a config needs beside itself where there is no GPU, no TransformerEngine or no apex."""
    arguments: dict[str, Value] = {}
    if not present("fused_weight_gradient_mlp_cuda"):
        # apex's. TransformerEngine's layers do without it, but the output layer is Megatron's own beside them too.
        arguments["no-gradient-accumulation-fusion"] = True
    if not has_te:
        arguments |= {
            "transformer-impl": "local",
            "no-persist-layer-norm": True,
            "no-rope-fusion": True,
            "no-masked-softmax-fusion": True,
        }
    if not has_gpu:
        arguments |= {"distributed-backend": "gloo", "use-cpu-initialization": True}
    return arguments


def _refuse_more_ranks_than_gpus() -> None:
    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= gpus:
        raise ValueError(
            f"a rank needs a GPU of its own: this one is number {rank} on its machine, from 0, and sees {gpus}; start "
            "fewer (--nproc-per-node)"
        )


def _refuse_to_leave_gpus_idle() -> None:
    """Of a job that got GPUs which torch cannot use, the driver being too old for it: it would train on the CPU."""
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if gpus == "0" or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    try:
        torch.cuda.init()
        why = "it sees none"
    except (RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split())
    raise ValueError(
        f"this job has {gpus} GPU(s) here that torch {torch.__version__} cannot use: {why} (`nvidia-smi` and `xact "
        "doctor` tell more; CUDA_VISIBLE_DEVICES= is for training on the CPU)"
    )


def refuse_a_node_without_gpus(ranks: Ranks) -> None:
    """ValueError, the same on every rank: some of them see no GPU, and would train on the CPU, the others on theirs.

    A collective.
    """
    seen = ranks.to_first("gpu seen", [host_name(), torch.cuda.is_available()])

    def compare() -> None:
        blind = sorted({host for host, gpu in seen if not gpu})
        if blind and any(gpu for _, gpu in seen):
            raise ValueError(
                f"no GPU is seen on {', '.join(blind)}, but on other nodes there is (`nvidia-smi` there may tell why): "
                "leave such a node out, with SLURM by sbatch --exclude"
            )

    ranks.first_does("gpus compared", compare)


def default_processes(config: RunConfig) -> int:
    """Processes to start on this machine: every GPU there is, else as many as one copy of the model is split into."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    sizes = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size")
    return math.prod(config.megatron.get(name, 1) for name in sizes)


def _refuse(config: RunConfig, key: str, value: Value) -> None:
    of_a_gpu = dict.fromkeys(("distributed-backend", "use-cpu-initialization"), "a GPU")
    lacking = (of_a_gpu | {"no-gradient-accumulation-fusion": "apex"}).get(key, "TransformerEngine (or apex)")
    raise ValueError(
        f"{key} = {config.megatron[key]!r} needs {lacking}, which this machine lacks (`xact doctor`); "
        f"leave {key} out, and it will be {value!r} here"
    )
