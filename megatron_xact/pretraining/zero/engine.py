"""One DeepSpeed engine around Megatron's model, with the interface that Megatron's training loop expects of a chunk.

Written for DeepSpeed 0.19.8. ZeRO has everything but the alphas: its stage 3 flattens all parameters into one buffer of
one dtype, and alphas are fp32 beside bf16 weights. They are hidden from it, and `ZeroOptimizer` updates them.

What DeepSpeed averages over data-parallel ranks it never sums over tensor-parallel ones, and Megatron's own sum is not
called, because it wants `main_grad` buffers. So what needs a sum must have it in autograd: alphas have it by
construction (layers/tensor_parallel.py); the norms of queries and keys get it here.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from megatron.core import mpu
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_xact.layers.activation import TrainableActivation
from megatron_xact.pretraining import cpu_platform
from megatron_xact.pretraining.config import DeepSpeedConfig
from megatron_xact.pretraining.zero.whole import whole


class ZeroModel(torch.nn.Module):
    """The model after `deepspeed.initialize`: forward passes through the engine, whole tensors for checkpoints."""

    def __init__(
        self, module: torch.nn.Module, base: torch.optim.Optimizer, settings: DeepSpeedConfig, args: Namespace
    ):
        """module: as Megatron builds it, without DDP; base: over its parameters. A collective; both are taken over."""
        super().__init__()
        deepspeed = import_deepspeed()
        _sum_shared_gradients(module)
        for part in module.modules():
            if isinstance(part, TrainableActivation):
                part.hide()
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=base, config=_config(settings, args), mpu=_process_groups(),
            dist_init_required=False,
        )  # fmt: skip
        self.module = module
        self._engine = [engine]  # in a list: an nn.Module here would be a second copy of the model
        self._stage3 = settings.zero_stage == 3

    @property
    def engine(self):
        return self._engine[0]

    def forward(self, *args, **kwargs) -> Tensor:
        return self.engine(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around all microbatches of a step but the last: ZeRO 1 waits with its reduction, 2 and 3 add up shards."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def zero_grad_buffer(self) -> None:
        """Megatron's loop asks; DeepSpeed has dropped the gradients at the end of the step before."""

    def sharded_state_dict(self, *args, **kwargs) -> ShardedStateDict:
        """As Megatron's model gives it, in host memory under ZeRO 3, where no rank holds whole parameters for long."""
        with whole(self.module.parameters()):
            state = self.module.sharded_state_dict(*args, **kwargs)
            return dict_list_map_inplace(_to_host, state) if self._stage3 else state


def import_deepspeed():
    """The package, told which device it drives where Megatron's CPU platform stands in for CUDA."""
    if cpu_platform.is_active():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import logger

    if cpu_platform.is_active():
        # A collective for inference, which it would compile first, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel("WARNING")
    return deepspeed


def _config(settings: DeepSpeedConfig, args: Namespace) -> dict:
    """DeepSpeed's own config. It says nothing of bf16: the model is already, and ZeRO makes fp32 masters of its own."""
    on_host = {"device": "cpu", "pin_memory": not cpu_platform.is_active()}
    zero = {"stage": settings.zero_stage, "overlap_comm": not cpu_platform.is_active()}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = on_host
    if settings.offload_parameters:
        zero["offload_param"] = on_host
    return {
        "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "gradient_accumulation_steps": 1,  # Megatron's schedule counts microbatches, and divides the loss by them
        "gradient_clipping": 0.0,  # ZeroOptimizer clips: the alphas count too
        "communication_data_type": "fp32",  # as Megatron reduces bf16 gradients
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _process_groups() -> SimpleNamespace:
    """What `initialize(mpu=...)` calls, in the older names that Megatron has left behind. PP is 1, so MP is TP."""
    tensor = {
        f"get_{name}_parallel_{what}": getattr(mpu, f"get_tensor_model_parallel_{what}")
        for name in ("model", "tensor_model")
        for what in ("rank", "world_size", "group", "src_rank")
    }
    data = {f"get_data_parallel_{what}": getattr(mpu, f"get_data_parallel_{what}") for what in ("rank", "world_size")}
    return SimpleNamespace(**tensor, **data, get_data_parallel_group=mpu.get_data_parallel_group)


def _sum_shared_gradients(module: torch.nn.Module) -> None:
    """Over tensor-parallel ranks, of the norms of queries and keys: one copy each, applied to that rank's heads."""
    group = mpu.get_tensor_model_parallel_group()
    if group.size() == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=group)
        return gradient

    for name, parameter in module.named_parameters():
        if "q_layernorm" in name or "k_layernorm" in name:  # Megatron's own rule, by name
            parameter.register_hook(summed)


def _to_host(value: object) -> object:
    if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and value.data is not None:
        value.data = value.data.detach().to("cpu", copy=True)
    return value
