"""Megatron's GPT at toy size with our layer spec, and what tests need around it. Imported on ranks only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch import Tensor

from megatron_xact.activations import Activation
from megatron_xact.layers.specs import decoder_block

VOCABULARY, SEQUENCE = 64, 16
LR, LR_STEPS, DECAY = 1e-3, 100, 0.1


@contextlib.contextmanager
def model_parallel(tp: int, pp: int = 1) -> Iterator[ProcessGroupCollection]:
    """The groups of tp x pp model-parallel ranks; the ranks left over are data-parallel."""
    parallel_state.initialize_model_parallel(tp, pp)
    try:
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()


def transformer_config(**changes) -> TransformerConfig:
    """fp32, no dropout, no bias, none of the fusions that need CUDA."""
    settings = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "ffn_hidden_size": 128,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "pipeline_dtype": torch.float32,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "init_method_std": 0.1,  # with Megatron's 0.02, pre-activations this narrow hardly leave 0
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    return TransformerConfig(**settings | changes)


def build(
    activation: Activation,
    groups: ProcessGroupCollection,
    *,
    ddp: bool = True,
    distributed_optimizer: bool = False,
    ddp_settings: dict | None = None,
    tied: bool = False,
    **changes,
) -> torch.nn.Module:
    """This rank's part of the model, as `megatron.training` builds it; the weights do not depend on the parallelism."""
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
    config = transformer_config(gated_linear_unit=activation.gated, **changes)
    model = GPTModelConfig(
        transformer=config,
        transformer_layer_spec=partial(decoder_block, activation=activation),
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    )
    [chunk] = GPTModelBuilder(model).build_distributed_models(
        groups,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, **ddp_settings or {}
        ),
        wrap_with_ddp=ddp,
        mixed_precision_wrapper=Float16Module if config.bf16 else None,
    )
    return chunk


def optimizer_of(model: torch.nn.Module, **changes) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Megatron's optimizer over `model`, torch's AdamW here, and the scheduler that sets its lr and weight decay.

    The groups are Megatron's own: no decay for what has one dimension. lr is LR, from there linearly to 0 in LR_STEPS.
    """
    config = OptimizerConfig(**{"lr": LR, "min_lr": 0.0, "weight_decay": DECAY, "clip_grad": 0.0} | changes)
    optimizer = get_megatron_optimizer(config, [model], get_standard_config_overrides(config))
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=LR_STEPS,
        lr_decay_style="linear",
        start_wd=DECAY,
        end_wd=DECAY,
        wd_incr_steps=LR_STEPS,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def batch(step: int, rows: int = 2) -> dict[str, Tensor]:
    """Random tokens [rows, s], the same on every rank, and labels that can be learned: a function of the token."""
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (rows, SEQUENCE), generator=g)
    labels = (3 * tokens + 1) % VOCABULARY
    positions = torch.arange(SEQUENCE).expand(rows, SEQUENCE)
    return {"input_ids": tokens, "position_ids": positions, "attention_mask": None, "labels": labels}


def backward(model: torch.nn.Module, inputs: dict[str, Tensor], groups: ProcessGroupCollection) -> float:
    """Mean loss (nats); gradients are left in `main_grad`, reduced as training reduces them."""
    model.zero_grad_buffer()
    loss = model(**inputs).float().mean()
    loss.backward()
    finalize_model_grads([model], pg_collection=groups)
    return loss.item()


def train_step(
    model: torch.nn.Module,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    inputs: dict[str, Tensor],
    groups: ProcessGroupCollection,
) -> tuple[float, float]:
    """As Megatron's trainer does it; (loss before the step, gradient norm)."""
    optimizer.zero_grad()
    loss = backward(model, inputs, groups)
    updated, norm, _ = optimizer.step()
    assert updated
    scheduler.step(1)
    return loss, float(norm)


def alphas(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Activation parameters by name, without the wrappers' prefixes."""
    return {
        name.replace("module.", ""): parameter
        for name, parameter in model.named_parameters()
        if ".activation_func." in name
    }


def gathered(parameter: torch.nn.Parameter, tensor: Tensor, group) -> Tensor:
    """`tensor`, shaped as `parameter` is on this rank, as the whole model's: its shards joined as Megatron cut them."""
    if not parameter.tensor_model_parallel:
        return tensor.clone()
    shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(shards, tensor.contiguous(), group=group)
    dim, stride = parameter.partition_dim, parameter.partition_stride
    # stride 2, a gated fc1: each shard is [gate, up], the whole is [all gates, all ups].
    pieces = [shard.chunk(stride, dim) for shard in shards]
    return torch.cat([piece[i] for i in range(stride) for piece in pieces], dim)
