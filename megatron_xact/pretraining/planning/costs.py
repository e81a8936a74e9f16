"""What a run costs: time, traffic between GPUs, and disk."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_xact.pretraining.checkpointing import retention, space
from megatron_xact.pretraining.planning.counts import flops_per_token, parameters, stage_parameters
from megatron_xact.pretraining.planning.hardware import Gpu
from megatron_xact.pretraining.planning.job import Job
from megatron_xact.pretraining.planning.memory import gradient_bytes

# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    step: float
    """Seconds."""
    mfu: float
    """Model FLOPs of a step over what the GPUs could do in its time: less than assumed if some idles or repeats."""
    tokens_per_second: float
    run: float
    """Seconds of all the steps, without evaluation, saving and interruptions."""
    gpu_hours: float


def time(job: Job, gpu: Gpu, mfu: float) -> Time:
    """`mfu`: of the GPUs while they work, before the pipeline's bubble and what is computed twice."""
    useful = flops_per_token(job.shape) * job.tokens_per_step
    again = _recomputed_share(job) * useful
    step = (useful + again) / (gpu.peak * mfu * job.layout.gpus) * (1 + job.layout.bubble)
    run = step * job.steps
    return Time(
        step=step,
        mfu=useful / (step * gpu.peak * job.layout.gpus),
        tokens_per_second=job.tokens_per_step / step,
        run=run,
        gpu_hours=run * job.layout.gpus / 3600,
    )


def _recomputed_share(job: Job) -> float:
    """Of a step's FLOPs, how many are spent again in backward: at most a forward pass through the layers."""
    args, shape, s = job.args, job.shape, job.shape.sequence
    total = flops_per_token(shape)
    layers = flops_per_token(shape, head=False) / 3
    if job.recomputes_layers:
        stage = max(job.layout.stages)
        share = min(args.recompute_num_layers or 1, stage) / stage if args.recompute_method == "block" else 1
        return share * layers / total
    again = 0
    if "core_attn" in job.recomputed_modules:
        again += 2 * shape.layers * shape.query * s
    if "mlp" in job.recomputed_modules:
        again += 2 * shape.layers * shape.hidden * (shape.fc1 + shape.ffn)
    return again / total


# -- traffic ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends per step, by ring algorithms, and the seconds that takes at the link's bandwidth."""

    name: str
    what: str
    bytes: float
    link: str
    seconds: float


def traffic(job: Job, gpu: Gpu) -> list[Traffic]:
    """Of every kind that this layout has. Groups reach over servers as Megatron places them: tp, cp, dp, then pp."""
    shape, layout, args = job.shape, job.layout, job.args
    w = job.width
    found: list[Traffic] = []

    def add(name: str, what: str, size: float, members_span: int) -> None:
        inside = members_span <= layout.gpus_per_node
        link, speed = ("NVLink", gpu.nvlink) if inside else ("network", gpu.network)
        found.append(Traffic(name, what, size, link, size / speed))

    t, c, d, p = layout.tensor, layout.context, layout.replicas, layout.pipeline
    narrow = shape.sequence * layout.micro_batch / c * shape.hidden * w  # [s, b, h], whole
    layers, m = max(layout.stages), layout.micro_batches
    if d > 1:
        n = sum(stage_parameters(shape, t, layers, first=True, last=p == 1).values())
        if args.use_distributed_optimizer:
            what, size = "reduce-scatter of gradients, all-gather of parameters", n * (gradient_bytes(args) + w)
        else:
            what, size = "all-reduce of gradients", 2 * n * gradient_bytes(args)
        add("data", what, size * (d - 1) / d, t * d)
    if t > 1:
        # forward and backward: two blocks, each gathered and reduced once; the gathered inputs of the two column-
        # parallel products are gathered once more for their weights' gradients where sequence parallelism split them
        times = 10 if layout.sequence_parallel else 8
        add(
            "tensor",
            "all-gather and reduce-scatter of activations" if layout.sequence_parallel else "all-reduce of activations",
            times * layers * m * narrow * (t - 1) / t,
            t,
        )
    if c > 1:
        keys = shape.sequence * layout.micro_batch / c * 2 * shape.key_value / t * w
        add("context", "keys and values around the ring, and their gradients", 3 * layers * m * keys * (c - 1), t * c)
    if p > 1:
        split = t if layout.sequence_parallel else 1
        add("pipeline", "activations on, gradients back", 2 * m * layout.virtual * narrow / split, layout.gpus)
        if shape.tied:
            size = shape.vocab * shape.hidden / t * gradient_bytes(args)
            add("embedding", "all-reduce of the tied embedding's gradient", size, layout.gpus)
    return found


# -- disk -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoints:
    bytes: float
    """Of one checkpoint, weights and optimizer."""
    interval: int | None
    """Steps between saves; None: nothing is saved."""
    kept: int
    """At the end of the run, by keep-checkpoints and keep-every."""

    @property
    def disk(self) -> float:
        """What the run's folder grows to: one more than is kept exists while it is written."""
        return self.bytes * (self.kept + 1)


def checkpoints(job: Job) -> Checkpoints:
    args, settings = job.args, job.config.xact
    count = parameters(job.shape)
    fp32 = count["activation"] if job.sixteen_bit else sum(count.values())
    size = space.estimate({2: sum(count.values()) - fp32, 4: fp32}, args)
    if args.save is None or not args.save_interval:
        return Checkpoints(size, None, 0)
    saved = sorted({*range(args.save_interval, job.steps + 1, args.save_interval), job.steps})
    gone = retention.expendable(saved, job.steps, settings.keep_checkpoints, settings.keep_every)
    return Checkpoints(size, args.save_interval, len(saved) - len(gone))
