"""Which device a run uses here, and the Megatron arguments that follow from it and from what is installed."""

from __future__ import annotations

import math
import os

import torch

from megatron_xact.installed import present
from megatron_xact.pretraining import cpu_platform, mends
from megatron_xact.pretraining.arguments import Value
from megatron_xact.pretraining.config import RunConfig


def prepare(config: RunConfig) -> dict[str, Value]:
    """Make this process ready to train `config`; returns the arguments to add to it (the config's own win).

    ValueError: the config asks for what this machine lacks.
    """
    # One queue of work per device, for Megatron's overlap of tensor-parallel communication. CUDA reads it when it
    # starts, which asking for a device may make it do.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not torch.cuda.is_available():
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
