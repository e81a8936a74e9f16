"""Does a checkpoint fit the run that would load it? Told from what it says of itself, before anything starts.

Megatron asserts some of this, on every rank, once the model is built; of activations it knows nothing, and would
load one activation's alphas into another's that has parameters of the same names.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_xact.activations import Activation

# Megatron's variables that give the weights their shapes; a mismatch ends in a traceback of tensor sizes.
SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "swiglu",
         "add_bias_linear", "untie_embeddings_and_output_weights")  # fmt: skip


def identity(activation: Activation) -> dict[str, object]:
    """What a checkpoint must say about its activation for its alphas to mean anything."""
    return {
        "name": activation.name,
        "trainable": [q.name for q in activation.trainable],
        "fixed": {q.name: q.init for q in activation.parameters if not q.trainable},
        "eps": activation.eps,
    }


def refuse_misfit(checkpoint: Path, args: Namespace, activation: dict[str, object], engine: str) -> None:
    """ValueError, one line, for the first thing in which `checkpoint` (torch_dist) and the run contradict.

    args: Megatron's, as parsed; activation: the run's `identity`; engine: as in [xact]. Checkpoints that say
    nothing of a matter (weights alone; an activation that Megatron's own programs trained) are not refused for it, nor
    is `release` for its optimizer, of which Megatron loads the weights alone.
    """
    common = _common_state(checkpoint)
    saved = common.get("args")
    if saved is None:
        return
    theirs = getattr(saved, "xact_activation", None)
    if theirs is not None and theirs != activation:
        raise ValueError(
            f"checkpoint {checkpoint} was trained with activation {_words(theirs)}, but this run has "
            f"{_words(activation)}: make [activation] the same, or train in another folder"
        )
    if not args.use_checkpoint_args:
        _refuse_other_shape(checkpoint, saved, args)
    if not (args.finetune or args.no_load_optim or args.skip_train or checkpoint.name == "release"):
        _refuse_other_engine(checkpoint, getattr(saved, "xact_engine", "megatron"), engine)
        _refuse_other_optimizer(checkpoint, saved, common.get("content_metadata") or {}, args)
        schedule = common.get("opt_param_scheduler") or {}
        if engine == "megatron":
            _refuse_other_rates(checkpoint, schedule, args)
        if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
            _refuse_other_schedule(checkpoint, schedule, args)


def unreadable(checkpoint: Path) -> str | None:
    """Why what Megatron saved beside the tensors cannot be read; None: it can, or there is nothing of the kind."""
    if not (checkpoint / ".metadata").is_file():
        return None
    try:
        _common_state(checkpoint)
    except Exception as error:  # unpickling damaged bytes can raise anything
        return f"is damaged: its common state cannot be read ({type(error).__name__})"
    return None


def _common_state(checkpoint: Path) -> dict:
    """What Megatron saved beside the tensors; {} where it saved nothing."""
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import FileSystemReader

    keys = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    if not (checkpoint / "common.pt").is_file() and not any(key.startswith("common_state") for key in keys):
        return {}
    with warnings.catch_warnings(action="ignore"):  # "torch.distributed is uninitialized": there is nothing to share
        return dist_checkpointing.load_common_state_dict(checkpoint)


def _words(activation: dict) -> str:
    learned = ", ".join(activation["trainable"]) or "nothing"
    fixed = "".join(f", {name} = {value:g}" for name, value in activation["fixed"].items())
    eps = f", eps = {activation['eps']:g}" if activation["eps"] else ""
    return f"{activation['name']} ({learned} trainable{fixed}{eps})"


def _refuse_other_shape(checkpoint: Path, saved: Namespace, args: Namespace) -> None:
    for name in SHAPE:
        ours, theirs = getattr(args, name), getattr(saved, name, None)
        if ours is not None and theirs is not None and ours != theirs:  # None: Megatron derives it
            raise ValueError(
                f"checkpoint {checkpoint} has {name.replace('_', '-')} = {theirs}, but this run {ours}: "
                "make them equal, or train in another folder"
            )


def _refuse_other_engine(checkpoint: Path, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise ValueError(
            f"the optimizer's state in checkpoint {checkpoint} is that of engine = {theirs!r}, but this run has engine "
            f"= {ours!r} in [xact]: make it the same, or go on from the weights alone (no-load-optim = true)"
        )


def _refuse_other_optimizer(checkpoint: Path, saved: Namespace, metadata: dict, args: Namespace) -> None:
    if args.use_distributed_optimizer != saved.use_distributed_optimizer:
        kinds = {True: "the distributed", False: "a plain"}
        raise ValueError(
            f"checkpoint {checkpoint} holds the state of {kinds[saved.use_distributed_optimizer]} optimizer, but "
            f"this run has {kinds[args.use_distributed_optimizer]} one: set use-distributed-optimizer = "
            f"{str(saved.use_distributed_optimizer).lower()}, or load without it (no-load-optim = true)"
        )
    # With it, TransformerEngine saves 16 bits of most masters, and of fp32 parameters (alphas) their initial values.
    aware, saved_aware = (getattr(of, "use_precision_aware_optimizer", False) for of in (args, saved))
    if aware != saved_aware:
        raise ValueError(
            f"checkpoint {checkpoint} was saved {'with' if saved_aware else 'without'} use-precision-aware-optimizer, "
            f"but this run is {'with' if aware else 'without'} it, and would load other master weights than were "
            "trained: make it the same, or load without them (no-load-optim = true)"
        )
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    ours, theirs = ([getattr(of, name) for name in sizes] for of in (args, saved))
    if args.use_distributed_optimizer and ours != theirs:
        if metadata.get("distrib_optim_sharding_type") == "dp_reshardable":
            raise ValueError(
                f"the distributed optimizer's state in checkpoint {checkpoint} was saved for tensor x pipeline "
                f"= {theirs[0]} x {theirs[1]} and cannot be loaded at {ours[0]} x {ours[1]}: save it with "
                "dist-ckpt-optim-fully-reshardable = true, or load without it (no-load-optim = true)"
            )


def _refuse_other_rates(checkpoint: Path, saved: dict, args: Namespace) -> None:
    """Whichever schedule counts: by these Megatron looks for the state of each parameter group, and finds none."""
    for name, key, value in (("lr", "max_lr", args.lr), ("min-lr", "min_lr", args.min_lr)):
        if key in saved and value is not None and saved[key] != value:
            raise ValueError(
                f"checkpoint {checkpoint} was trained with {name} = {saved[key]}, but this run has {value}, with which "
                "Megatron cannot load the optimizer's state: make them equal, or load without it (no-load-optim = true)"
            )


def _refuse_other_schedule(checkpoint: Path, saved: dict, args: Namespace) -> None:
    ours = {"lr": ("max_lr", args.lr), "min-lr": ("min_lr", args.min_lr)}
    ours["lr-decay-style"] = ("lr_decay_style", args.lr_decay_style)
    if args.train_samples is not None:
        ours["lr-decay-samples"] = ("lr_decay_steps", args.lr_decay_samples or args.train_samples)
    elif args.global_batch_size is not None:  # the scheduler counts sequences
        decay = (args.lr_decay_iters or args.train_iters) * args.global_batch_size
        ours["lr-decay-iters x global-batch-size"] = ("lr_decay_steps", decay)
        if args.lr_warmup_fraction is None:
            warmup = args.lr_warmup_iters * args.global_batch_size
            ours["lr-warmup-iters x global-batch-size"] = ("lr_warmup_steps", warmup)
    for name, (key, value) in ours.items():
        if key in saved and value is not None and saved[key] != value:
            raise ValueError(
                f"checkpoint {checkpoint} was trained with {name} = {saved[key]}, but this run has {value}: make "
                "them equal, or say which counts: override-opt-param-scheduler = true (this run's schedule) or "
                "use-checkpoint-opt-param-scheduler = true (the checkpoint's)"
            )
