"""What lets Megatron 0.19.2 save a 16-bit model that has fp32 parameters; what it cannot save is refused."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args
from megatron.training.models.gpt import GPTModelConfig

from megatron_xact.layers.coverage import Unsupported


def make_savable(config: GPTModelConfig | TransformerConfig, name: str) -> None:
    """Called by the layer spec of the activation `name`, with what it is given, while the model is built.

    Unsupported: Megatron-Bridge would train from scratch without the hook, and die at its first save.
    """
    if hasattr(config, "post_wrap_hooks"):
        if put_fp32_first not in config.post_wrap_hooks:
            config.post_wrap_hooks.append(put_fp32_first)
        return
    # A provider of Megatron-Bridge, which has read its hooks by now. To load weights it does without the first values.
    missing = put_fp32_first not in getattr(config, "_post_wrap_hooks", ())
    if missing and (config.bf16 or config.fp16) and config.perform_initialization:
        raise Unsupported(
            "Megatron cannot save the fp32 alphas of a bf16 or fp16 model without a hook, which a provider of "
            f"Megatron-Bridge has to have before it builds: write `specs.into(cfg.model, {name!r})` in the place of "
            f"`cfg.model.transformer_layer_spec = specs.{name}`"
        )


def put_fp32_first(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """A post-wrap hook, called before the optimizer is built: the distributed one can then save fp32 parameters.

    In each parameter group it puts fp32 parameters before 16-bit ones, but looks them up, when it saves and loads, in
    the order of the data-parallel buffers, which have one dtype each: with fp32 first, the two orders agree. Of the
    chunks of virtual pipeline stages, the first one gets the fp32 buffers of all.

    Unsupported: it is another one, which numbers only the 16-bit parameters when it saves.
    """
    wrapped = [chunk for chunk in chunks if isinstance(chunk, DistributedDataParallel)]
    buffers = [buffer for chunk in wrapped for buffer in chunk.buffers]
    fp32 = [buffer for buffer in buffers if buffer.param_dtype == torch.float32]
    if not 0 < len(fp32) < len(buffers):
        return chunks
    if not wrapped[0].ddp_config.use_distributed_optimizer and _saves(wrapped[0].config):
        raise Unsupported(
            "bf16 and fp16 with a trainable activation need --use-distributed-optimizer and --optimizer adam, on one "
            "process too: Megatron's other 16-bit optimizers cannot save fp32 parameters among the others"
        )
    for chunk in wrapped:
        chunk.buffers = [buffer for buffer in chunk.buffers if buffer.param_dtype != torch.float32]
    wrapped[0].buffers = fp32 + wrapped[0].buffers
    return chunks


def _saves(config: TransformerConfig) -> bool:
    """Whether the run will save, as far as can be known here."""
    try:
        args = get_args()
    except AssertionError:
        args = None  # which is also what `python -O` gives
    if args is not None:
        return args.save is not None
    # Without Megatron's arguments: a run of Megatron-Bridge, or a program of somebody's own, which may never save.
    return hasattr(config, "transformer_layer_spec")
