"""What is added to a config for the machine it runs on, beside what Megatron says it needs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import layers

from megatron_xact.pretraining import arguments, cpu_platform, mends, platform
from megatron_xact.pretraining import config as config_file
from megatron_xact.pretraining.checkpointing.choice import Ranks
from megatron_xact.pretraining.platform import missing_arguments

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("has_te", [True, False], ids=["TransformerEngine", "local"])
def test_weight_gradients_are_accumulated_by_a_kernel_only_where_megatrons_own_linear_has_one(has_te):
    """Such a linear is the output layer beside TransformerEngine's layers, too; without apex it raises."""
    added = missing_arguments(has_gpu=True, has_te=has_te)
    args = arguments.parse(arguments.command_line(added))
    assert args.gradient_accumulation_fusion == layers._grad_accum_fusion_available


@pytest.mark.parametrize(("local_rank", "gpus"), [("4", 4), ("1", 1)])
def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch, local_rank, gpus):
    """Megatron would take GPU number LOCAL_RANK, and CUDA say "invalid device ordinal"."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(ValueError, match=f"number {local_rank} on its machine, from 0, and sees {gpus}; start fewer"):
        platform.prepare(None)


@pytest.mark.parametrize("blind", [(), (2,), (0, 1), (0, 1, 2, 3)], ids=str)
def test_ranks_on_gpus_do_not_wait_for_ranks_on_the_cpu(monkeypatch, blind):
    """Where a node has lost its GPUs, its ranks would start the CPU platform, over gloo, and the others NCCL."""
    store = torch.distributed.HashStore()

    def number() -> int:
        return int(threading.current_thread().name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: number() not in blind)
    monkeypatch.setattr(platform, "host_name", lambda: f"node-{number() // 2}")

    def rank(number: int) -> str | None:
        threading.current_thread().name = str(number)
        ranks = Ranks.__new__(Ranks)
        ranks.rank, ranks.size, ranks.store = number, 4, store
        try:
            return platform.refuse_a_node_without_gpus(ranks)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        (told,) = set(threads.map(rank, range(4)))
    nodes = ", ".join(sorted({f"node-{number // 2}" for number in blind}))
    assert told is None if len(blind) in (0, 4) else told.startswith(f"no GPU is seen on {nodes}, but on other nodes")


def test_a_job_with_gpus_does_not_train_on_the_cpu_unasked(monkeypatch):
    """Where the driver is too old for this torch, `is_available` is only False."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    for part, name in ((cpu_platform, "activate"), (mends, "apply")):
        monkeypatch.setattr(part, name, lambda: None)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = config_file.load(ROOT / "configs" / "quickstart.toml")
    with pytest.raises(ValueError, match=r"^this job has 8 GPU\(s\) here that torch .* cannot use: .* is too old \("):
        platform.prepare(config)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    platform.prepare(config)


def too_old() -> None:
    raise RuntimeError("The NVIDIA driver on your system\nis too old")
