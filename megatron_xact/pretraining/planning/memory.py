"""Bytes on one GPU at the worst moment of a step: what is always there, what forward keeps for backward, what passes.

What forward keeps follows the storages that autograd really holds (tests count them on real models), which is more than
the tensors that the formulas of Korthikanti et al. (arXiv:2205.05198) name: a view keeps all of the tensor it is of.

Letters: T tokens of one micro-batch on this rank (s b / cp); h, q, k, F, V as in `counts`; t tensor-parallel size;
w bytes of a number (2 in bf16). With sequence parallelism everything of width h is split t ways too.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, fields

from megatron_xact.pretraining.planning.counts import stage_parameters
from megatron_xact.pretraining.planning.job import Job

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}

# Outside torch's allocator and between its blocks: the CUDA context with its kernels, NCCL's buffers and cuBLAS'
# workspaces for all the communicators of a run, and what fragmentation keeps from being used.
RESERVE_FIXED = 3e9
RESERVE_SHARE = 0.04


@dataclass(frozen=True)
class Memory:
    """Bytes of one pipeline stage's GPU. The fields up to `passing` add up to what torch calls max_memory_allocated."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """What forward keeps for backward, of all the layers and micro-batches in flight."""
    ends: float
    """The same outside the layers: final norm, input of the head, batches."""
    passing: float
    """The most that comes and goes: logits and loss in fp32, a layer's gradients and recomputation, the optimizer's."""

    @property
    def allocated(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "stage")

    @property
    def reserve(self) -> float:
        return RESERVE_FIXED + RESERVE_SHARE * self.allocated

    @property
    def total(self) -> float:
        return self.allocated + self.reserve


def heaviest(job: Job) -> Memory:
    """Of the pipeline stage that needs most."""
    return max((of_stage(job, stage) for stage in range(job.layout.pipeline)), key=lambda memory: memory.total)


def of_stage(job: Job, stage: int) -> Memory:
    shape, layout, args = job.shape, job.layout, job.args
    first, last = stage == 0, stage == layout.pipeline - 1
    count = stage_parameters(shape, layout.tensor, layout.stages[stage], first=first, last=last)
    n = sum(count.values())
    activations, ends, passing = of_pass(job, stage)
    optimizer = n * optimizer_bytes(args) / job.optimizer_shards
    if args.optimizer == "adam" and args.transformer_impl == "local":
        # torch's AdamW makes the square roots of all second moments at once, when no activation is alive any more.
        passing = max(passing, 4 * n / job.optimizer_shards - activations - ends)
    return Memory(stage, n * job.width, n * gradient_bytes(args), optimizer, activations, ends, passing)


def of_pass(job: Job, stage: int) -> tuple[float, float, float]:
    """(activations, ends, passing) of forward and backward, without weights, their gradients and the optimizer."""
    layout, last = job.layout, stage == job.layout.pipeline - 1
    alive, again = _recomputed(job, layer_activations(job), layout.stages[stage])
    ends = head_activations(job) if last else 0.0
    if last or stage == 0:
        ends += layout.in_flight(stage) * batch_bytes(job)
    passing = max(layer_workspace(job) + again, logits_bytes(job) if last else 0.0)
    return alive * layout.in_flight(stage), ends, passing


# -- what is always there ---------------------------------------------------------------------------------------------


def gradient_bytes(args: Namespace) -> int:
    """Of one parameter: Megatron accumulates 16-bit models' gradients in fp32 unless told otherwise."""
    if args.bf16:
        return 2 if args.grad_reduce_in_bf16 or args.main_grads_dtype == "bf16" else 4
    return 2 if args.fp16 and not args.accumulate_allreduce_grads_in_fp32 else 4


def optimizer_bytes(args: Namespace) -> int:
    """Of one parameter, before sharding: moments, and for 16-bit models the fp32 master copy of the weights."""
    adam = args.optimizer == "adam"
    if args.use_precision_aware_optimizer:
        return BYTES[args.main_params_dtype] + BYTES[args.exp_avg_dtype] + adam * BYTES[args.exp_avg_sq_dtype]
    master = 4 if args.bf16 or args.fp16 else 0
    fp32_gradient = 4 if gradient_bytes(args) == 2 else 0
    return master + fp32_gradient + (8 if adam else 4)


# -- what forward keeps -----------------------------------------------------------------------------------------------


def _tokens(job: Job) -> float:
    return job.shape.sequence * job.layout.micro_batch / job.layout.context


def _narrow(job: Job) -> float:
    """Bytes of one [s, b, h] between layers, where sequence parallelism splits it."""
    split = job.layout.tensor if job.layout.sequence_parallel else 1
    return _tokens(job) * job.shape.hidden * job.width / split


def layer_activations(job: Job, norm: float | None = None) -> dict[str, float]:
    """Bytes that one layer keeps of one micro-batch, nothing recomputed, by what keeps them.

    norm: bytes per number that a norm keeps of its input; None: the input itself, as fused norms on GPUs do (torch's
    RMSNorm on a CPU keeps two fp32 tensors instead).
    """
    shape, t, w, tokens = job.shape, job.layout.tensor, job.width, _tokens(job)
    narrow, statistics = _narrow(job), 8 if shape.norm_bias else 4
    split = t if job.layout.sequence_parallel else 1
    norms = 2 * (narrow if norm is None else narrow / w * norm) + 2 * tokens / split * statistics
    q, k = shape.query, shape.key_value
    attention = tokens / t * w * (q + 2 * k)  # qkv as one tensor: the values are a view of it
    attention += tokens / t * w * q  # the result, which the output projection keeps too
    attention += tokens / t * 4 * shape.heads  # log-sum-exp of the scores
    if shape.positions == 0:
        attention += tokens / t * w * (q + k)  # queries and keys after rotation
        if job.args.transformer_impl == "local":  # sine and cosine, for queries and for keys; fused kernels need none
            attention += 4 * shape.sequence / job.layout.context * shape.head_size * w
    if shape.qk_norm:
        attention += tokens / t * statistics * (q + k) / shape.head_size
        if norm is not None:
            attention += tokens / t * norm * (q + k)
        elif q > k:  # queries of a group cannot be a view of qkv; the norm keeps the copy
            attention += tokens / t * w * q
    return {
        "norms": norms,
        "inputs": 2 * narrow,  # of qkv and of fc1
        "attention": attention,
        "pre-activation": tokens * shape.fc1 / t * w,
        "post-activation": tokens * shape.ffn / t * w,  # the input of fc2
        "dropout": 2 * narrow / w if job.args.hidden_dropout else 0.0,
    }


def _recomputed(job: Job, kept: dict[str, float], layers: int) -> tuple[float, float]:
    """(bytes that a stage's layers keep of one micro-batch, what backward makes again at a time)."""
    args, everything = job.args, sum(kept.values())
    if job.recomputes_layers:
        chunk = args.recompute_num_layers or 1
        stored = _narrow(job) / (job.layout.tensor if args.distribute_saved_activations else 1)
        if args.recompute_method == "block":  # the first `chunk` layers, one by one, once the others' are gone
            again = min(chunk, layers)
            return again * stored + (layers - again) * everything, everything if again == layers else 0.0
        return -(-layers // chunk) * stored, min(chunk, layers) * everything
    dropped = 0.0
    if "core_attn" in job.recomputed_modules:
        dropped += _tokens(job) / job.layout.tensor * 4 * job.shape.heads
    if "mlp" in job.recomputed_modules:
        dropped += kept["pre-activation"] + kept["post-activation"]
    if "layernorm" in job.recomputed_modules:
        dropped += kept["inputs"]
    return layers * (everything - dropped), dropped


def head_activations(job: Job, norm: float | None = None) -> float:
    """The final norm, its result as the head's input, and the loss's own small tensors."""
    narrow = _narrow(job)
    return narrow + (narrow if norm is None else narrow / job.width * norm) + 16 * _tokens(job)


def batch_bytes(job: Job) -> float:
    """Tokens, labels, positions (64 bit) and the loss mask; the causal mask where the data loader makes one."""
    rows = job.layout.micro_batch * job.shape.sequence
    mask = job.shape.sequence * rows if job.args.create_attention_mask_in_dataloader else 0
    return 28 * rows / job.layout.context + mask


# -- what comes and goes ----------------------------------------------------------------------------------------------


def logits_bytes(job: Job) -> float:
    """Logits, and beside a 16-bit model's their fp32 copy, which becomes softmax and then gradient in place.

    Or, where that is more: the gradient of the logits with that of the head's weights.
    """
    w, v = job.width, job.shape.vocab / job.layout.tensor
    loss = _tokens(job) * v * (4 + (w if job.sixteen_bit else 0))
    return max(loss, _tokens(job) * v * w + job.shape.hidden * v * w + _narrow(job))


def layer_workspace(job: Job) -> float:
    """The most that an MLP's backward adds: gradients of fc2's input, of the pre-activation, of fc1's input.

    And the gradient of a weight, which is a tensor of its own unless a kernel adds it in place. What forward kept for a
    step is gone once the step is done.
    """
    shape, t, w = job.shape, job.layout.tensor, job.width
    y, pre, h = _tokens(job) * shape.ffn / t * w, _tokens(job) * shape.fc1 / t * w, shape.hidden
    own = 0 if job.args.transformer_impl == "transformer_engine" else w
    fc2 = y + h * shape.ffn / t * own
    fc1 = _narrow(job) - y + h * shape.fc1 / t * own
    return 2 * _narrow(job) + max(fc2, pre, fc1)
