"""`pretrain` for ZeRO: Megatron's own set-up, loop, evaluation and checkpoints, around a ZeRO model and optimizer.

Megatron's `pretrain` wraps the model in its DDP and makes its own optimizer; there is no hook to do otherwise. This
calls the same parts of it in the same order (0.19.2), without the ones for what `engine = "deepspeed"` refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_wandb_writer
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.checkpointing import load_checkpoint
from megatron.training.config.container import PretrainConfigContainer
from megatron.training.training import (
    build_train_valid_test_data_iterators,
    evaluate_and_print_results,
    get_optimizer_param_scheduler,
    initialize_megatron,
    save_checkpoint_and_time,
    set_jit_fusion_options,
    train,
)

from megatron_xact.pretraining.config import RunConfig
from megatron_xact.pretraining.zero.engine import ZeroModel
from megatron_xact.pretraining.zero.optimizer import ZeroOptimizer


def pretrain(
    run: RunConfig,
    container: PretrainConfigContainer,
    datasets_provider: Callable,
    forward_step: Callable,
    get_embedding_ranks: Callable,
    store: torch.distributed.Store | None,
) -> None:
    """Train as `run` says; the other arguments are those of Megatron's `pretrain`. SystemExit as from there."""
    initialize_megatron(get_embedding_ranks=get_embedding_ranks, store=store)
    args = get_args()
    set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)
    model, optimizer, scheduler = _set_up(run, container)
    config = get_model_config(model)
    config.no_sync_func = model.no_sync
    built = build_train_valid_test_data_iterators(datasets_provider)
    iterators = dict(zip(("train", "valid", "test"), built, strict=True))

    step = args.iteration
    if not args.skip_train:
        step = args.curr_iteration = 0
        if args.do_train and args.train_iters:
            step, flops = train(
                forward_step, [model], optimizer, scheduler, iterators["train"], iterators["valid"],
                None, config, {}, None,
            )  # fmt: skip
            if args.save and step and step % args.save_interval:
                save_checkpoint_and_time(
                    step, [model], optimizer, scheduler, flops, {}, train_data_iterator=iterators["train"]
                )
    for name, wanted, what in (("valid", args.do_valid, "validation"), ("test", args.do_test, "test")):
        if wanted:
            evaluate_and_print_results(
                f"iteration {step} on {what} set", forward_step, iterators[name], [model], step, None, config,
                verbose=True, write_to_tensorboard=not args.skip_train,
            )  # fmt: skip
    if wandb := get_wandb_writer():
        wandb.finish()
    maybe_finalize_async_save(blocking=True, terminate=True)


def _set_up(run: RunConfig, container: PretrainConfigContainer) -> tuple:
    """(model, optimizer, scheduler), loaded where there is something to load."""
    args = get_args()
    builder = container.model.get_builder_cls()(container.model)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    (bare,) = builder.build_distributed_models(
        pg_collection=groups, ddp_config=container.ddp, wrap_with_ddp=False,
        data_parallel_random_init=container.rng.data_parallel_random_init,
    )  # fmt: skip
    optimizer = ZeroOptimizer(bare, run.activation, run.deepspeed, args)
    scheduler = get_optimizer_param_scheduler(optimizer)
    args.iteration, args.num_floating_point_operations_so_far = 0, 0
    if args.load is not None or args.pretrained_checkpoint is not None:
        # Before ZeRO flattens and shards: it makes its masters from these weights.
        args.iteration, args.num_floating_point_operations_so_far = load_checkpoint([bare], optimizer, scheduler)
    model = ZeroModel(bare, optimizer.base, run.deepspeed, args)
    optimizer.take_over(model)
    return model, optimizer, scheduler
