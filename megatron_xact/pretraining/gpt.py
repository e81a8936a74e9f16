"""What Megatron's trainer asks of the program that calls it: batches, the loss, the datasets, the embedding ranks.

`pretrain_gpt.py` plays this role upstream but is not in the megatron-core wheel. This is its dense-pretraining part:
no packed or fine-tuning sequences, no distillation, no multi-token prediction.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers
from megatron.training.training import get_train_valid_test_num_samples
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_xact.layers.coverage import Unsupported

_BATCH = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def forward_step(data_iterator: Iterator | None, model: GPTModel) -> tuple[Tensor, partial]:
    """One microbatch through this pipeline stage: (its output; on the last, losses per token [b, s]), loss function."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = _batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss, batch["loss_mask"])


def _batch(data_iterator: Iterator | None, vp_stage: int | None) -> dict[str, Tensor | None]:
    """This rank's part of the next microbatch, [b, s/cp] each; all None on inner pipeline stages: they need none."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(_BATCH)
    args = get_args()
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) if sample.get(key) is not None else None for key in _BATCH}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


def loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the masked per-token losses (nats), number of tokens, and what Megatron reports from both.

    loss_mask, losses: [b, s]. Raises through Megatron's rerun machine when the loss is NaN or infinite.
    """
    masked = torch.sum(losses.float().view(-1) * loss_mask.float().view(-1))
    tokens = loss_mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for bad, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=masked,
                rejection_func=bad,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    return masked, tokens, {"lm loss": torch.stack([masked.detach(), tokens.to(masked.dtype)])}


def datasets_provider(samples: tuple[int, int, int], vp_stage: int | None = None):
    """(train, validation, test) GPT datasets with at least `samples` sequences each, built where they are consumed.

    Of the dataloader-type "external", which is DALI here, iterators over their batches.
    """
    args = get_args()
    args.consumed_valid_samples = _validated_until(args)
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=_with_eod(build_tokenizer(args), args.tokenizer_model),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def consumed_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    datasets = BlendedMegatronDatasetBuilder(kind, samples, consumed_here, config).build()
    if args.dataloader_type == "external":  # Megatron then expects iterators
        from megatron_xact.pretraining.data import dali

        return dali.loaders(datasets, args)
    return datasets


def _with_eod(tokenizer, path: str | None):
    """As it is. Unsupported: it names no token that ends documents, whose id Megatron's datasets need."""
    try:
        found = tokenizer.eod
    except (AttributeError, IndexError, NotImplementedError, TypeError):
        found = None
    if found is None:
        raise Unsupported(
            f"tokenizer-model = {path!r} has no eos_token to end documents with: name one of its tokens in its "
            "tokenizer_config.json"
        )
    return tokenizer


# Every rank calls the provider: the builder decides from `consumed_here` who opens files.
datasets_provider.is_distributed = True


def _validated_until(args: Namespace) -> int:
    """The validation samples that a run with these settings has used when it comes to this step.

    Megatron goes on from the number in the checkpoint. After an evaluation that a signal ended, or with evaluations of
    another length or interval, that would be other samples than the uninterrupted run's, or more than there are.
    """
    evaluations = args.iteration // args.eval_interval - (args.start_eval_at_iter or 0) // args.eval_interval
    return max(0, evaluations) * args.eval_iters * args.eval_global_batch_size


def datasets_of(steps: int):
    """A `datasets_provider` that gives the samples, in their order, of a run of `steps` steps, whatever this one has.

    Megatron shuffles as many epochs as a run needs, together; fewer steps can mean fewer epochs and another order.
    """

    def provider(samples: tuple[int, int, int], vp_stage: int | None = None):
        args = get_args()
        args.train_iters, own = steps, args.train_iters
        try:
            samples = get_train_valid_test_num_samples()
        finally:
            args.train_iters = own
        return datasets_provider(samples, vp_stage)

    provider.is_distributed = True
    return provider


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The pipeline ranks that hold the word embedding: the first, and the last where input and output are tied."""
    tied_over_stages = len(pp_ranks) > 1 and not get_args().untie_embeddings_and_output_weights
    return [pp_ranks[0], pp_ranks[-1]] if tied_over_stages else [pp_ranks[0]]
