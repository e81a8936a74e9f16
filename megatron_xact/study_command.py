"""`xact study`. Studies import no torch and no Megatron; what they need of the rooms that do is handed to them here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_xact.studies import cli
from megatron_xact.studies.outside import Asked, Layer, Model, Outside

if TYPE_CHECKING:
    import numpy as np

    from megatron_xact.pretraining.planning.job import Job


def main(args: argparse.Namespace) -> int | None:
    """The subcommand; see studies/cli.py."""
    return cli.main(args, Outside(activation_values, planned_model, planned_speed, asked_for))


def activation_values(name: str, values: dict[str, float], x: np.ndarray) -> np.ndarray:
    """f(x) [n], fp64, of an activation with these effective parameters; the others have their initial values."""
    import torch

    from megatron_xact import activations

    record = activations.get(name).configured(trainable=[], init=values)
    return record.value(torch.as_tensor(x, dtype=torch.float64), record.effective({})).numpy()


def planned_model(path: Path, layers: list[Layer]) -> Model:
    """What the trainer makes of a config with these layers over it, on as many GPUs as one copy of the model needs."""
    job = _planned(path, layers)
    return Model(job.config.activation.name, job.shape, job.layout.micro_batch, job.layout.gpus)


def planned_speed(path: Path, layers: list[Layer], kind: str, gpus: int) -> float:
    """Tokens per second on GPUs of a kind, as `xact plan` expects them."""
    from megatron_xact.pretraining.planning import costs
    from megatron_xact.pretraining.planning.hardware import GPUS

    if kind not in GPUS:
        raise ValueError(f"--gpu {kind}: it is known of {', '.join(GPUS)}")
    return costs.time(_planned(path, layers, gpus), GPUS[kind], GPUS[kind].mfu).tokens_per_second


def _planned(path: Path, layers: list[Layer], gpus: int | None = None) -> Job:
    """gpus: None for as many as one copy of the model needs."""
    from megatron_xact.pretraining import checks
    from megatron_xact.pretraining import config as config_file
    from megatron_xact.pretraining.planning import job

    config = config_file.load(path).with_layers(layers)
    args = job.describe(config)
    gpus = gpus or checks.ranks_per_replica(args)
    return job.with_layout(config, args, gpus, min(gpus, 8))


def asked_for(path: Path, sets: list[str]) -> Asked:
    """What a config with these overrides asks for."""
    from megatron_xact.pretraining import arguments
    from megatron_xact.pretraining import config as config_file

    config = config_file.load(path).with_overrides([], sets)
    args = arguments.parse(config.arguments())
    intervals = args.log_interval, config.xact.statistics_interval, args.save_interval
    return Asked(config.dump(), config.asks_for_fp8, args.train_iters, *intervals)
