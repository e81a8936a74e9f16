"""What is planned: a config on a number of GPUs, as the numbers that the other modules here compute with.

The sizes come from Megatron's own parser, by its defaults where the config says nothing; the rules that they must obey
are those of `checks`, which `xact pretrain` applies too, and the few that only Megatron itself asserts.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron_xact.pretraining import arguments, checks
from megatron_xact.pretraining.config import RunConfig
from megatron_xact.pretraining.data import manifest
from megatron_xact.pretraining.planning.counts import Shape

# What the numbers here would be wrong for, by Megatron's variable.
NOT_PLANNED = {
    "num_experts": "mixture of experts",
    "multi_latent_attention": "multi-latent attention",
    "mtp_num_layers": "multi-token prediction",
    "use_torch_fsdp2": "FSDP",
    "use_megatron_fsdp": "FSDP",
    "optimizer_cpu_offload": "an optimizer on the CPU",
    "cpu_offloading_num_layers": "activations on the CPU",
    "fine_grained_activation_offloading": "activations on the CPU",
    "fp8": "FP8",
    "fp4": "FP4",
    "rampup_batch_size": "a batch that grows during the run",
    "step_batch_size_schedule": "a batch that grows during the run",
    "pipeline_model_parallel_layout": "a pipeline layout written out",
}


@dataclass(frozen=True)
class Layout:
    """How a run is spread over GPUs."""

    gpus: int
    gpus_per_node: int
    tensor: int
    pipeline: int
    context: int
    stages: tuple[int, ...]  # layers of each pipeline rank
    virtual: int  # model chunks per pipeline rank; 1: plain 1F1B
    group: int  # micro-batches that a model chunk runs in a row where there are virtual stages
    sequence_parallel: bool
    micro_batch: int
    batch: int

    @property
    def data(self) -> int:
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def micro_batches(self) -> int:
        """Per step and data-parallel rank."""
        return self.batch // (self.micro_batch * self.data)

    @property
    def replicas(self) -> int:
        """GPUs that hold the same parameters: gradients are summed, and the optimizer is sharded, over these."""
        return self.data * self.context

    def in_flight(self, stage: int) -> float:
        """Micro-batches, each through all of the stage's layers, whose activations are alive at the worst moment."""
        if self.virtual == 1:
            return min(self.pipeline - stage, self.micro_batches)
        chunks = 2 * (self.pipeline - stage - 1) + (self.virtual - 1) * self.group + 1
        return min(chunks, self.micro_batches * self.virtual) / self.virtual

    @property
    def bubble(self) -> float:
        """Idle time of a step's pipeline over its busy time."""
        return (self.pipeline - 1) / (self.virtual * self.micro_batches)


@dataclass(frozen=True)
class Job:
    config: RunConfig
    args: Namespace  # of Megatron's parser, nothing filled in
    shape: Shape
    layout: Layout

    @property
    def steps(self) -> int:
        return self.args.train_iters or self.args.train_samples // self.layout.batch

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        return self.layout.batch * self.shape.sequence

    @property
    def sixteen_bit(self) -> bool:
        return self.args.bf16 or self.args.fp16

    @property
    def width(self) -> int:
        """Bytes of one number among weights and activations."""
        return 2 if self.sixteen_bit else 4

    @property
    def optimizer_shards(self) -> int:
        """Over how many GPUs the optimizer's states are split."""
        if not self.args.use_distributed_optimizer:
            return 1
        return max(1, self.layout.replicas // self.args.num_distributed_optimizer_instances)

    @property
    def recomputes_layers(self) -> bool:
        return not self.args.recompute_activations and self.args.recompute_granularity == "full"

    @property
    def recomputed_modules(self) -> list[str]:
        """What backward computes again of every layer, where it is not whole layers."""
        selective = self.args.recompute_activations or self.args.recompute_granularity == "selective"
        return (self.args.recompute_modules or ["core_attn"]) if selective else []  # Megatron's default


def read(config: RunConfig, gpus: int, gpus_per_node: int) -> Job:
    """`config` on `gpus` GPUs. ValueError, in one line: what it lacks, or what does not divide."""
    return with_layout(config, describe(config), gpus, gpus_per_node)


def describe(config: RunConfig) -> Namespace:
    """Megatron's arguments of `config`, complete and of a kind that can be planned. ValueError: they are not."""
    args = arguments.parse(config.arguments())
    if args.skip_train:
        raise ValueError("skip-train leaves nothing to plan")
    checks.required(args)
    checks.schedule(args)
    checks.model(args, num_query_groups_given="num-query-groups" in config.megatron)
    if config.xact.engine == "megatron":
        checks.optimizer(args, config.activation)
    for name, words in NOT_PLANNED.items():
        if getattr(args, name) not in (None, False, 0):
            raise ValueError(f"{words} ({name.replace('_', '-')}) is not planned here: the numbers would be wrong")
    if args.optimizer not in checks.ADAM_OR_SGD:
        raise ValueError(f"optimizer = {args.optimizer!r} is not planned here: adam and sgd are")
    _padded_vocabulary(args)  # not known: no layout helps
    return args


def with_layout(config: RunConfig, args: Namespace, gpus: int, gpus_per_node: int) -> Job:
    """The job, its layout found legal. ValueError: what does not divide."""
    checks.parallel(args, gpus)
    return Job(config, args, _shape(config, args), _layout(args, gpus, gpus_per_node))


def _shape(config: RunConfig, args: Namespace) -> Shape:
    learned_positions = args.position_embedding_type == "learned_absolute"
    return Shape(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=checks.ffn_size(args),
        heads=args.num_attention_heads,
        vocab=_padded_vocabulary(args),
        sequence=args.seq_length,
        groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels or args.hidden_size // args.num_attention_heads,
        gated=config.activation.record().gated,
        tied=not args.untie_embeddings_and_output_weights,
        activation_parameters=len(config.activation.record().trainable),
        norm_bias=args.normalization == "LayerNorm",
        qk_norm=args.qk_layernorm,
        linear_bias=args.add_bias_linear,
        qkv_bias=args.add_qkv_bias,
        positions=args.max_position_embeddings if learned_positions else 0,
    )


def _padded_vocabulary(args: Namespace) -> int:
    """Rows of the embedding. Megatron asks the tokenizer; without loading one, the data folder or the config knows."""
    if args.padded_vocab_size is not None:
        return args.padded_vocab_size
    size = args.vocab_size or _vocabulary_of_data(args)
    if size is None:
        raise ValueError(
            f"the size of the vocabulary is not known without the tokenizer ({args.tokenizer_model}): set "
            "padded-vocab-size in [model], or make the data first (`xact data prepare`)"
        )
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-size // multiple) * multiple


def _vocabulary_of_data(args: Namespace) -> int | None:
    for prefix in checks.prefixes(args.train_data_path or args.data_path or []):
        if (Path(prefix).parent / manifest.NAME).is_file():
            return manifest.load(Path(prefix).parent).vocab_size
    return None


def _layout(args: Namespace, gpus: int, gpus_per_node: int) -> Layout:
    pipeline = args.pipeline_model_parallel_size
    stages = _stages(args, pipeline)
    virtual = checks.num_virtual_stages(args)
    even = not (args.account_for_embedding_in_pipeline_split or args.account_for_loss_in_pipeline_split)
    if even and any(layers % virtual for layers in stages):
        raise ValueError(f"{virtual} virtual stages must divide the {max(stages)} layers of a pipeline stage")
    return Layout(
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        tensor=args.tensor_model_parallel_size,
        pipeline=pipeline,
        context=args.context_parallel_size,
        stages=stages,
        virtual=virtual if pipeline > 1 else 1,
        group=args.microbatch_group_size_per_vp_stage or pipeline,
        sequence_parallel=args.sequence_parallel and args.tensor_model_parallel_size > 1,
        micro_batch=args.micro_batch_size,
        batch=args.global_batch_size or args.micro_batch_size * (gpus // checks.ranks_per_replica(args)),
    )


def _stages(args: Namespace, pipeline: int) -> tuple[int, ...]:
    """Layers of each pipeline rank, as Megatron deals them out."""
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if first is None and last is None:
        embedding, loss = args.account_for_embedding_in_pipeline_split, args.account_for_loss_in_pipeline_split
        stages = [(args.num_layers + embedding + loss) // pipeline] * pipeline
        stages[0] -= embedding
        stages[-1] -= loss
        return tuple(stages)
    rest = args.num_layers - (first or 0) - (last or 0)
    between = pipeline - (first is not None) - (last is not None)
    if rest < 0 or (rest % between if between else rest):
        raise ValueError(
            f"{rest} layers are left for {between} pipeline stages beside the first and last; they must share them "
            "evenly: change decoder-first-pipeline-num-layers or decoder-last-pipeline-num-layers"
        )
    stages = [rest // between if between else 0] * pipeline
    stages[0] = stages[0] if first is None else first
    stages[-1] = stages[-1] if last is None else last
    return tuple(stages)
