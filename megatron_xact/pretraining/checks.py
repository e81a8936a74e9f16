"""What must fit together before a run may start: sizes and ranks, data, tokenizer, checkpoint.

Megatron checks much of this too, but late, by assertion on every rank; and after a missing checkpoint or bad
tracker file it starts from random weights or exits with code 0. Here the first problem is told in one line.
"""

from __future__ import annotations

import math
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_xact import installed
from megatron_xact.layers import coverage
from megatron_xact.pretraining import arguments, resume
from megatron_xact.pretraining.checkpointing import choice
from megatron_xact.pretraining.checkpointing.folder import TRACKER, check_checkpoint, name_of, saved_steps
from megatron_xact.pretraining.data import indexed

if TYPE_CHECKING:
    from megatron_xact.pretraining.config import ActivationConfig, BranchConfig, RunConfig, XactConfig

REQUIRED = (
    "num-layers",
    "hidden-size",
    "num-attention-heads",
    "seq-length",
    "max-position-embeddings",
    "micro-batch-size",
)
POSITIVE = REQUIRED + (
    "train-iters",
    "train-samples",
    "global-batch-size",
    "ffn-hidden-size",
    "num-query-groups",
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "context-parallel-size",
    "log-interval",
    "eval-interval",
)
# From the first, to below the second. Megatron takes them all, and divides by zero or trains on nan.
RANGES = {
    "weight-decay": (0, math.inf),
    "clip-grad": (0, math.inf),
    "adam-beta1": (0, 1),
    "adam-beta2": (0, 1),
    "adam-eps": (1e-30, math.inf),
    "hidden-dropout": (0, 1),
    "attention-dropout": (0, 1),
    "init-method-std": (0, math.inf),
    "rotary-base": (1, math.inf),
    "eval-iters": (0, math.inf),
    "lr-warmup-iters": (0, math.inf),
    "lr-warmup-samples": (0, math.inf),
}


def validate(config: RunConfig, world_size: int | None = None) -> None:
    """ValueError or FileNotFoundError tells the first problem. `world_size`: default WORLD_SIZE, or 1."""
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args = arguments.parse(config.arguments())
    required(args)
    _seed(args)
    schedule(args)
    _batches(args)
    model(args, num_query_groups_given="num-query-groups" in config.megatron)
    parallel(args, world_size)
    _data(args)
    _loader(config)
    _mlp(config.mlp)
    if config.xact.sample_tokens and args.pipeline_model_parallel_size > 1:
        raise ValueError("sample-tokens needs pipeline-model-parallel-size = 1: set sample-tokens = 0 in [xact]")
    _fp8(args, config)
    _tokenizer(args)
    if config.xact.engine == "deepspeed":
        _deepspeed(args, config)
    else:
        optimizer(args, config.activation)
    _retention(args, config.xact)
    _layers(args, config.xact.engine)
    _trainer(args)
    _checkpoint(args, config.activation.identity(), config.branch, config.xact.engine)


def required(args: Namespace) -> None:
    """What every run has to say. ValueError: the first thing that is missing, or a number out of its range."""
    for name in REQUIRED:
        if getattr(args, name.replace("-", "_")) is None:
            raise ValueError(f"{name} is missing; every run needs it")
    if not args.skip_train:
        if (args.train_iters is None) == (args.train_samples is None):
            found = "both are" if args.train_iters is not None else "neither is"
            raise ValueError(f"set one of train-iters and train-samples; {found} set")
        if args.lr is None:
            raise ValueError("lr is missing; training needs a learning rate")
    for name in POSITIVE:
        value = getattr(args, name.replace("-", "_"))
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    for name, (least, below) in RANGES.items():
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not least <= value < below:
            end = "finite" if below == math.inf else f"below {below}"
            raise ValueError(f"{name} = {value} must be at least {least} and {end}")


def _seed(args: Namespace) -> None:
    """Megatron adds 100 for every pipeline stage (0.19, training/initialize.py), and NumPy takes 32 bits."""
    largest = 2**32 - 1 - 100 * (args.pipeline_model_parallel_size - 1)
    if not 1 <= args.seed <= largest:
        raise ValueError(f"seed = {args.seed} must be from 1 to {largest}")


def schedule(args: Namespace) -> None:
    """What Megatron's scheduler asserts, without a word, once the model is built."""
    if args.lr is None:
        return
    unit = "iters" if args.train_iters is not None else "samples"
    decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    warmup = getattr(args, f"lr_warmup_{unit}")
    if args.lr_warmup_fraction is not None:
        if not 0 <= args.lr_warmup_fraction < 1:
            raise ValueError(f"lr-warmup-fraction = {args.lr_warmup_fraction} must be at least 0 and below 1")
    elif warmup >= decay:
        raise ValueError(
            f"lr-warmup-{unit} = {warmup} must be less than lr-decay-{unit} = {decay} (default: train-{unit})"
        )
    if not 0 <= args.min_lr <= args.lr < math.inf:
        raise ValueError(f"min-lr = {args.min_lr} must lie between 0 and lr = {args.lr}, and that be finite")
    if args.lr_warmup_init > args.lr:
        raise ValueError(f"lr-warmup-init = {args.lr_warmup_init} must not exceed lr = {args.lr}")
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise ValueError(f"lr-decay-style = 'WSD' needs lr-wsd-decay-{unit}, the length of its final decay")


def _batches(args: Namespace) -> None:
    """Batches that vary: Megatron 0.19 ignores one of its two arguments for them, and counts the other's wrong."""
    if args.rampup_batch_size is not None:
        raise ValueError(
            "rampup-batch-size has no effect in Megatron 0.19, which would train with global-batch-size throughout: "
            "use step-batch-size-schedule = '0:256 2B:512' (tokens:batch) with train-samples, without global-batch-size"
        )
    if args.step_batch_size_schedule is not None and args.train_iters is not None:
        raise ValueError(
            "step-batch-size-schedule needs train-samples in the place of train-iters, from which Megatron would work "
            "out data and learning rates as if every batch had micro-batch-size x data-parallel size sequences"
        )


def _divides(size: int, size_name: str, total: int, total_name: str) -> None:
    if total % size:
        raise ValueError(f"{size_name} = {size} must divide {total_name} = {total}; change one of them")


def model(args: Namespace, num_query_groups_given: bool) -> None:
    """Sizes against each other. ValueError: what does not divide or has no effect."""
    heads, groups = args.num_attention_heads, args.num_query_groups
    if args.kv_channels is None:
        _divides(heads, "num-attention-heads", args.hidden_size, "hidden-size")
    if args.group_query_attention:
        _divides(groups, "num-query-groups", heads, "num-attention-heads")
    elif num_query_groups_given:
        raise ValueError(f"num-query-groups = {groups} has no effect without group-query-attention = true")
    if args.max_position_embeddings < args.seq_length:
        raise ValueError(
            f"max-position-embeddings = {args.max_position_embeddings} must be at least seq-length = {args.seq_length}"
        )


def parallel(args: Namespace, world_size: int) -> None:
    """Sizes against the ranks that share them. ValueError: what does not divide."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    tp_name, groups = "tensor-model-parallel-size", args.num_query_groups
    _divides(tp, tp_name, args.num_attention_heads, "num-attention-heads")
    if args.padded_vocab_size is not None:
        _divides(tp, tp_name, args.padded_vocab_size, "padded-vocab-size")
    if args.group_query_attention and groups % tp and tp % groups:
        raise ValueError(f"{tp_name} = {tp} must divide num-query-groups = {groups} or be a multiple of it")
    of = "" if args.ffn_hidden_size is not None else " (Megatron's default)"
    _divides(tp, tp_name, ffn_size(args), f"ffn-hidden-size{of}")
    if args.sequence_parallel and tp > 1:  # at tp = 1 Megatron switches it off and says so
        _divides(tp, f"sequence-parallel: {tp_name}", args.seq_length, "seq-length")
    if cp > 1:
        _divides(2 * cp, "2 x context-parallel-size", args.seq_length, "seq-length")
    uneven = (
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.pipeline_model_parallel_layout,
    )
    if all(setting is None for setting in uneven):
        extra = _layers_beside(args)
        counted = " (with embedding and loss)" if extra else ""
        _divides(pp, "pipeline-model-parallel-size", args.num_layers + extra, f"num-layers{counted}")

    replica = ranks_per_replica(args)
    if world_size % replica:
        raise ValueError(
            f"{world_size} process(es) cannot be split into tensor {tp} x pipeline {pp} x context {cp} "
            f"= {replica} parallel ranks; start a multiple of that (--nproc-per-node) or reduce these sizes"
        )
    dp, batch, micro = world_size // replica, args.global_batch_size, args.micro_batch_size
    if batch is not None and not args.decrease_batch_size_if_needed and batch % (micro * dp):
        raise ValueError(
            f"global-batch-size = {batch} must be a multiple of micro-batch-size x data-parallel size = "
            f"{micro} x {dp} = {micro * dp}"
        )
    if num_virtual_stages(args) > 1 and args.step_batch_size_schedule is None:
        _interleaved(args, 1 if batch is None else batch // (micro * dp))


def num_virtual_stages(args: Namespace) -> int:
    """Model chunks of a pipeline rank, as Megatron counts them. ValueError: its layers cannot be cut into these."""
    pipeline = args.pipeline_model_parallel_size
    if args.pipeline_model_parallel_layout is not None:
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        return PipelineParallelLayerLayout.get_num_stages_from_str(args.pipeline_model_parallel_layout) // pipeline
    if per_chunk := args.num_layers_per_virtual_pipeline_stage:
        per_stage = (args.num_layers + _layers_beside(args)) // pipeline
        _divides(per_chunk, "num-layers-per-virtual-pipeline-stage", per_stage, "layers of a pipeline stage")
        return per_stage // per_chunk
    return args.num_virtual_stages_per_pipeline_rank or 1


def _interleaved(args: Namespace, micro_batches: int) -> None:
    """What Megatron's interleaved schedule raises at the first step (0.19.2, core/pipeline_parallel/schedules.py)."""
    pipeline = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or pipeline
    if not pipeline <= group <= micro_batches or 0 < micro_batches % group < pipeline:
        raise ValueError(
            f"virtual pipeline stages run a step's micro-batches, here {micro_batches}, in groups of {group} "
            "(microbatch-group-size-per-virtual-pipeline-stage, by default pipeline-model-parallel-size), and every "
            f"group, the last too, must have at least pipeline-model-parallel-size = {pipeline}: change "
            "global-batch-size, micro-batch-size or the group's size"
        )


def _layers_beside(args: Namespace) -> int:
    """Embedding and loss count as a layer each where the config says so."""
    return args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split


def ranks_per_replica(args: Namespace) -> int:
    """Over how many ranks one copy of the model is split."""
    return args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size


def ffn_size(args: Namespace) -> int:
    """As given, or Megatron's: four times the hidden size, two thirds of that, in multiples of 64, for a gated MLP."""
    if args.ffn_hidden_size is not None:
        return args.ffn_hidden_size
    return int((4 * args.hidden_size * 2 / 3) / 64) * 64 if args.swiglu else 4 * args.hidden_size


def _data(args: Namespace) -> None:
    given = {name: getattr(args, name.replace("-", "_")) for name in arguments.DATA_PATHS}
    if not args.mock_data and not any(given.values()):
        raise ValueError(
            'no data: set data-path = "prefix" of .bin/.idx files (`xact data prepare` makes them) or mock-data'
        )
    for name in arguments.DATA_PREFIXES:
        for prefix in prefixes(given[name] or []):
            for suffix in (".bin", ".idx"):
                if "://" not in prefix and not Path(prefix + suffix).is_file():
                    raise FileNotFoundError(
                        f"{name}: no such file {prefix + suffix} (a data path is the common prefix of a .bin "
                        "and an .idx file; `xact data prepare` makes them)"
                    )
            if "://" not in prefix:
                indexed.read_index(Path(prefix))
    for name in arguments.DATA_LISTS:
        if given[name] is not None and not Path(given[name]).is_file():
            raise FileNotFoundError(f"{name}: no such file {given[name]}")


def _need(module: str, key: str, value: str, install: str) -> None:
    if not installed.present(module):
        raise ValueError(
            f"{key} = {value!r} in [xact] needs the package {module}, which is not installed: {install}, or leave "
            f"{key} out"
        )


# What the DALI loader does not do; its batches reach Megatron as those of an external loader.
NOT_WITH_DALI = (
    "dataloader-type",
    "full-validation",
    "multiple-validation-sets",
    "hybrid-context-parallel",
    "phase-transition-iterations",
)


def _loader(config: RunConfig) -> None:
    if config.xact.loader != "dali":
        return
    for key in NOT_WITH_DALI:
        if config.megatron.get(key):
            raise ValueError(f'loader = "dali" in [xact] does not go with {key} = {config.megatron[key]!r}')
    _need("nvidia.dali", "loader", "dali", installed.extra("dali"))


def _mlp(mlp: str) -> None:
    """Is the package of a named backend here? Whether it serves this GPU and model is for the ranks to say."""
    install = {"triton": "pip install triton", "quack": installed.extra("quack")}
    if mlp in install:
        _need(mlp, "mlp", mlp, install[mlp])


def _fp8(args: Namespace, config: RunConfig) -> None:
    if config.fp8.enabled and config.fp8.smooth and config.mlp != "fp8":
        raise ValueError(
            f"smooth = true in [fp8] needs mlp = 'fp8' in [xact], not {config.mlp!r}: it changes fc2's weight before "
            "that is quantized, which TransformerEngine does itself"
        )
    if config.mlp != "fp8":
        return
    if config.megatron.get("fp8-format"):
        raise ValueError(
            f"mlp = 'fp8' in [xact] and fp8-format = {args.fp8!r} are two ways to compute in FP8, the second "
            "TransformerEngine's: leave one of them out"
        )
    kept = args.num_layers_at_start_in_bf16 + args.num_layers_at_end_in_bf16
    if args.first_last_layers_bf16 and kept >= args.num_layers:
        raise ValueError(
            f"first-last-layers-bf16 keeps {kept} layers out of FP8, of num-layers = {args.num_layers}: none is left; "
            "lower num-layers-at-start-in-bf16 or num-layers-at-end-in-bf16"
        )


def prefixes(blend: list[str]) -> list[str]:
    """The names in a blend: a list of names, or of weight, name, weight, name, ..."""
    weights, names = blend[::2], blend[1::2]
    if len(blend) % 2 == 0 and all(re.fullmatch(r"[-+.\deE]+", word) for word in weights):
        return names
    return blend


def _tokenizer(args: Namespace) -> None:
    """ValueError, FileNotFoundError: it is not there, or data that `xact data prepare` has made are of another one."""
    path = args.tokenizer_model
    if args.tokenizer_type == "HuggingFaceTokenizer" and path and (Path(path) / "tokenizer.json").is_file():
        from megatron_xact.pretraining.data import manifest, tokenizer

        given = [p for name in arguments.DATA_PREFIXES for p in prefixes(getattr(args, name.replace("-", "_")) or [])]
        for folder in dict.fromkeys(Path(prefix).parent for prefix in given):
            made_with = folder / manifest.TOKENIZER
            if (folder / manifest.NAME).is_file() and (made_with / "tokenizer.json").is_file():
                tokenizer.refuse_another(made_with, Path(path))
    if path is None or Path(path).exists() or "://" in path:
        return
    # "org/name" may be a model on the Hugging Face hub; beside a folder "org" it is a missing folder.
    hub = args.tokenizer_type == "HuggingFaceTokenizer" and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path)
    if not hub or ("/" in path and Path(path).parent.is_dir()):
        raise FileNotFoundError(f"tokenizer-model: no such file or folder {path} (`xact data prepare` makes one)")


ADAM_OR_SGD = ("adam", "sgd")  # whose updates are linear in the learning rate, see optimizer_policy.py


def optimizer(args: Namespace, activation: ActivationConfig) -> None:
    """What an optimizer would not do for fp32 alphas. ValueError."""
    # Megatron's plain 16-bit optimizer numbers only the 16-bit parameters when it saves; the alphas are fp32.
    sixteen_bit = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    learned = activation.record().trainable
    needed = sixteen_bit and learned and args.save is not None
    if args.optimizer == "sgd" and (args.use_distributed_optimizer or needed) and not args.optimizer_cpu_offload:
        needs = f", which {sixteen_bit} with a trainable activation needs" if needed else ""
        without = f"{sixteen_bit} and use-distributed-optimizer" if needed else "the latter"
        raise ValueError(
            f"optimizer = 'sgd' does not go with use-distributed-optimizer{needs}: Megatron shards the state of Adam "
            f"only; use optimizer = 'adam', or leave {without} out"
        )
    if needed and not args.use_distributed_optimizer:
        raise ValueError(
            f"{sixteen_bit} with a trainable activation needs use-distributed-optimizer = true, on one process "
            "too: Megatron's plain 16-bit optimizer cannot save fp32 parameters among the others"
        )
    policy = learned and (activation.lr_mult, activation.weight_decay) != (1.0, 0.0)
    if policy and args.optimizer_cuda_graph:  # the policy's learning rate is a number, which a graph keeps
        raise ValueError("lr-mult and weight-decay in [activation] do not go with optimizer-cuda-graph; leave it out")
    if policy and args.optimizer not in ADAM_OR_SGD:
        raise ValueError(  # others update alphas in an optimizer that may know nothing of the run's weight decay
            f"lr-mult and weight-decay in [activation] need optimizer = 'adam' or 'sgd', not {args.optimizer!r}"
        )
    if learned and args.optimizer_cpu_offload:  # it takes a parameter's fp32 copy, here itself, for a leaf of its own
        raise ValueError(
            "optimizer-cpu-offload does not go with a trainable activation, whose parameters are fp32: use engine = "
            "'deepspeed' in [xact] with offload-optimizer = true in [deepspeed]"
        )
    sixteen_bit_gradients = args.bf16 and (args.grad_reduce_in_bf16 or args.main_grads_dtype == "bf16")
    if learned and args.use_precision_aware_optimizer and sixteen_bit_gradients:
        # TransformerEngine's kernels take all gradients for the first one's dtype, and those of alphas are fp32.
        key = "grad-reduce-in-bf16" if args.grad_reduce_in_bf16 else "main-grads-dtype"
        raise ValueError(
            f"{key} = {args.grad_reduce_in_bf16 or args.main_grads_dtype!r} with use-precision-aware-optimizer does "
            f"not go with a trainable activation, whose gradients are fp32: leave {key} out"
        )


# What is written for Megatron's buffers of gradients, and what has not been tried.
NOT_WITH_DEEPSPEED = ("fp16", "fp8-format", "calculate-per-token-loss", "step-batch-size-schedule")


def _deepspeed(args: Namespace, config: RunConfig) -> None:
    """ZeRO's part of `validate`."""
    for key in NOT_WITH_DEEPSPEED:
        if config.megatron.get(key):
            raise ValueError(f'engine = "deepspeed" in [xact] does not go with {key} = {config.megatron[key]!r}')
    for key, value in (("pipeline-model-parallel-size", 1), ("context-parallel-size", 1), ("optimizer", "adam"),
                       ("transformer-impl", "local")):  # fmt: skip
        if config.megatron.get(key, value) != value:
            raise ValueError(f'engine = "deepspeed" in [xact] needs {key} = {value!r}, not {config.megatron[key]!r}')
    if config.mlp == "fp8":
        raise ValueError('engine = "deepspeed" in [xact] does not go with mlp = "fp8"')
    if args.sequence_parallel and args.tensor_model_parallel_size > 1:
        raise ValueError('engine = "deepspeed" in [xact] does not go with sequence-parallel = True at tensor sizes > 1')
    if config.deepspeed.offload_parameters and config.deepspeed.zero_stage != 3:
        raise ValueError(
            f"offload-parameters in [deepspeed] needs zero-stage = 3, not {config.deepspeed.zero_stage}: only it "
            "shares parameters out"
        )
    _need("deepspeed", "engine", "deepspeed", installed.extra("deepspeed"))


def _retention(args: Namespace, xact: XactConfig) -> None:
    if xact.keep_every and not xact.keep_checkpoints:
        raise ValueError(f"keep-every = {xact.keep_every} has no effect without keep-checkpoints: all are kept")
    if xact.keep_checkpoints and args.save_retain_interval is not None:
        raise ValueError(
            f"save-retain-interval = {args.save_retain_interval} and keep-checkpoints = {xact.keep_checkpoints} both "
            "delete checkpoints: leave the first out, Megatron's; keep-every does what it does"
        )


def _layers(args: Namespace, engine: str) -> None:
    """What neither our layers nor, without TransformerEngine, the local ones have; Megatron may go on without it."""
    local = coverage.why_local(args.transformer_impl, installed.present("transformer_engine"))
    if engine == "deepspeed":
        local = local or 'engine = "deepspeed"'
    coverage.refuse(args, local)


def _trainer(args: Namespace) -> None:
    """What of Megatron's trainer does not go with this project, or with this machine."""
    for name in ("use-megatron-fsdp", "use-torch-fsdp2"):
        if getattr(args, name.replace("-", "_")):
            raise ValueError(
                f"{name} is not supported: alphas (fp32 among 16-bit parameters), their guard and telemetry need whole "
                "parameters; use-distributed-optimizer shards the optimizer, and engine = 'deepspeed' in [xact] with "
                "zero-stage = 3 in [deepspeed] the parameters too"
            )
    if args.ckpt_format != "torch_dist":
        raise ValueError(
            f"ckpt-format = {args.ckpt_format!r} is not supported: such a run cannot be resumed, checked or exported "
            "here; leave it out (torch_dist), and bring old checkpoints over with `xact import`"
        )
    scopes = [*(args.cuda_graph_modules or ()), *(args.cuda_graph_scope_deprecated or ())]
    if "full_iteration" in (args.cuda_graph_impl, *scopes):
        raise ValueError(
            "cuda-graph-impl = 'full_iteration' is not supported: what is done between a step's gradients and its "
            "update (loss, alphas, replicas and signals are looked at) has no place in a graph; use 'local' or "
            "'transformer_engine'"
        )
    graphs = args.cuda_graph_impl != "none" or args.enable_cuda_graph or args.external_cuda_graph
    if graphs and not torch.cuda.is_available():
        raise ValueError(f"cuda-graph-impl = {args.cuda_graph_impl!r} needs a GPU, which torch does not see here; "
                         "leave CUDA graphs out")  # fmt: skip


def _checkpoint(args: Namespace, activation: dict[str, object], branch: BranchConfig, engine: str) -> None:
    folders = {name: getattr(args, name.replace("-", "_")) for name in ("save", "load", "pretrained-checkpoint")}
    folders = {name: Path(path) for name, path in folders.items() if path is not None and "://" not in path}
    for name, folder in folders.items():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{name} = {str(folder)!r} is a file; it must be a folder")
    if "save" in folders and not (args.skip_train or choice.resumes(args)):
        _refuse_to_start_over(folders["save"])
    checkpoint = choice.pick(args, branch.start).checkpoint if "load" in folders else None
    # Read by Megatron as long as the run has no checkpoint of its own, and then for its weights alone.
    if checkpoint is None and (folder := folders.get("pretrained-checkpoint")) is not None:
        if args.ckpt_step is None and not (folder / TRACKER).is_file():
            raise FileNotFoundError(f"pretrained-checkpoint: no checkpoint in {folder} (no {TRACKER})")
        checkpoint = check_checkpoint(folder, args.ckpt_step)
        args = Namespace(**vars(args) | {"finetune": True})
    if checkpoint is not None and (checkpoint / ".metadata").is_file():
        if branch.trunk and checkpoint.parent == Path(branch.trunk):  # whose schedule the branch leaves
            args = Namespace(**vars(args) | {"override_opt_param_scheduler": True})
        resume.refuse_misfit(checkpoint, args, activation, engine)


def _refuse_to_start_over(save: Path) -> None:
    """Megatron would overwrite what is there, one checkpoint after the other."""
    if saved_steps(save):
        raise ValueError(
            f"save = {str(save)!r} has checkpoints, up to {name_of(saved_steps(save)[-1])}, which this run would "
            "overwrite: set load equal to save to go on from them, or train in another folder (pretrained-checkpoint "
            "is what a run starts from as long as it has no checkpoint of its own)"
        )
