"""The plan as text for people and as a dictionary for programs: the same numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_xact.pretraining.planning import costs, counts, legality, memory
from megatron_xact.pretraining.planning.hardware import MFU_SOURCE, Gpu
from megatron_xact.pretraining.planning.job import Job


@dataclass(frozen=True)
class Plan:
    job: Job
    gpu: Gpu
    memory: memory.Memory
    time: costs.Time
    traffic: list[costs.Traffic]
    checkpoints: costs.Checkpoints
    assumed_mfu: float


def make(job: Job, gpu: Gpu, mfu: float | None) -> Plan:
    """mfu: None for the GPU's assumed one."""
    assumed = gpu.mfu if mfu is None else mfu
    return Plan(
        job,
        gpu,
        memory.heaviest(job),
        costs.time(job, gpu, assumed),
        costs.traffic(job, gpu),
        costs.checkpoints(job),
        assumed,
    )


def as_dict(plan: Plan) -> dict:
    """JSON-ready; bytes, seconds, FLOPs and plain counts."""
    job, need = plan.job, plan.memory
    count = counts.parameters(job.shape)
    layout = {
        **asdict(job.layout),
        "data": job.layout.data,
        "micro_batches": job.layout.micro_batches,
        "bubble": job.layout.bubble,
    }
    return {
        "config": str(job.config.source),
        "activation": job.config.activation.name,
        "shape": asdict(job.shape),
        "parameters": {**count, "total": sum(count.values())},
        "flops_per_token": flops(job),
        "tokens_per_step": job.tokens_per_step,
        "steps": job.steps,
        "tokens": job.tokens,
        "schedule": dict(phases(job)),
        "layout": layout,
        "legal": legality.reasons(job),
        "warnings": legality.warnings(job),
        "gpu": asdict(plan.gpu),
        "memory": {**asdict(need), "allocated": need.allocated, "reserve": need.reserve, "total": need.total},
        "layer_activations": memory.layer_activations(job),
        "assumed_mfu": plan.assumed_mfu,
        "time": asdict(plan.time),
        "traffic": [asdict(part) for part in plan.traffic],
        "checkpoints": {**asdict(plan.checkpoints), "disk": plan.checkpoints.disk},
    }


def flops(job: Job) -> dict[str, int]:
    """Per token, forward and backward."""
    layers = counts.flops_per_token(job.shape, head=False, scores=False)
    with_head = counts.flops_per_token(job.shape, scores=False)
    total = counts.flops_per_token(job.shape)
    return {"layers": layers, "head": with_head - layers, "scores": total - with_head, "total": total}


def phases(job: Job) -> list[tuple[str, int]]:
    """The parts of the learning rate's schedule and their lengths in steps."""
    args, unit = job.args, 1 if job.args.train_iters else job.layout.batch
    warmup = args.lr_warmup_iters or args.lr_warmup_samples // unit
    if args.lr_warmup_fraction is not None:
        warmup = round(args.lr_warmup_fraction * (args.lr_decay_iters or job.steps))
    parts = [("warm-up", warmup)] if warmup else []
    rest = job.steps - warmup
    if args.lr_decay_style == "WSD":
        cooldown = args.lr_wsd_decay_iters or args.lr_wsd_decay_samples // unit
        return [*parts, ("constant", rest - cooldown), (f"cooldown ({args.lr_wsd_decay_style})", cooldown)]
    return [*parts, (args.lr_decay_style, rest)]


# -- text -------------------------------------------------------------------------------------------------------------


def text(plan: Plan) -> str:
    sections = [_head, _model, _compute, _schedule, _layout, _memory, _time, _traffic, _checkpoints]
    return "\n\n".join(section(plan) for section in sections)


def _head(plan: Plan) -> str:
    layout = plan.job.layout
    nodes = layout.gpus // layout.gpus_per_node
    return f"{plan.job.config.source} on {layout.gpus:,} x {plan.gpu.name} ({nodes} x {layout.gpus_per_node}): it fits"


def _model(plan: Plan) -> str:
    job, shape = plan.job, plan.job.shape
    count = counts.parameters(shape)
    total = sum(count.values())
    key_value = f" ({shape.key_value_heads} key-value)" if shape.key_value_heads != shape.heads else ""
    lines = [
        f"model       {short(total)} parameters: {shape.layers} layer{'s' * (shape.layers > 1)} of {shape.hidden:,}, "
        f"{shape.heads} heads{key_value} of {shape.head_size}, ffn {shape.ffn:,}{' gated' if shape.gated else ''}, "
        f"{job.config.activation.name}, vocabulary {shape.vocab:,}, sequence {shape.sequence:,}"
    ]
    for group, number in count.items():
        said = " (tied to the embedding)" if group == "head" and shape.tied else ""
        lines.append(f"  {group:<12}{number:>16,}{number / total:>9.2%}{said}")
    return "\n".join(lines)


def _compute(plan: Plan) -> str:
    parts = flops(plan.job)
    said = {
        "layers": "matrix products of the layers: 6 per weight",
        "head": "logits",
        "scores": f"attention over {plan.job.shape.sequence:,} tokens, causal half",
        "total": "forward and backward, nothing counted twice",
    }
    lines = ["compute     GFLOP per token"]
    return "\n".join(lines + [f"  {name:<12}{value / 1e9:>16.3f}  {said[name]}" for name, value in parts.items()])


def _schedule(plan: Plan) -> str:
    job, layout = plan.job, plan.job.layout
    total = sum(counts.parameters(job.shape).values())
    spread = f"{layout.micro_batches} {'accumulated' if layout.pipeline == 1 else 'in a pipeline'}"
    steps = ", ".join(f"{length:,} {name}" for name, length in phases(job))
    return (
        f"batch       {layout.batch:,} sequences = {layout.micro_batch} (micro) x {layout.data:,} (data) x {spread}; "
        f"{short(job.tokens_per_step)} tokens\n"
        f"schedule    {job.steps:,} steps, {short(job.tokens)} tokens, {job.tokens / total:.3g} per parameter: {steps}"
    )


def _layout(plan: Plan) -> str:
    layout = plan.job.layout
    sequence = ", sequence-parallel" if layout.sequence_parallel else ""
    lines = [
        f"layout      tensor {layout.tensor}{sequence} x pipeline {layout.pipeline} x context {layout.context} x data "
        f"{layout.data:,}"
    ]
    lines += [f"  legal     {line}" for line in legality.reasons(plan.job)]
    lines += [f"  beware    {line}" for line in legality.warnings(plan.job)]
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    need, job = plan.memory, plan.job
    shards = job.optimizer_shards
    flight = job.layout.in_flight(need.stage)
    said = {
        "weights": "",
        "gradients": "",
        "optimizer": f"sharded over {shards:,}" if shards > 1 else "",
        "activations": f"{flight:g} micro-batch(es) through {job.layout.stages[need.stage]} layers",
        "ends": "final norm, head, batches",
        "passing": "logits and loss, or a layer's gradients",
        "reserve": "assumed: CUDA context, NCCL, cuBLAS, fragmentation",
    }
    lines = [
        f"memory      {need.total / 1e9:.1f} of {plan.gpu.memory / 1e9:.1f} GB per GPU, pipeline stage {need.stage} "
        f"(needs most); {need.allocated / 1e9:.1f} GB allocated by torch"
    ]
    for name, words in said.items():
        lines.append(f"  {name:<12}{getattr(need, name) / 1e9:>13.2f} GB  {words}".rstrip())
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    cost = plan.time
    return (
        f"time        {duration(cost.step)} per step, {cost.tokens_per_second:,.0f} tokens/s, {duration(cost.run)} "
        f"in all, {cost.gpu_hours:,.0f} GPU-hours\n"
        f"  assumed   {plan.assumed_mfu:.0%} of {plan.gpu.peak / 1e12:,.0f} TFLOP/s while a GPU works, {cost.mfu:.1%} "
        "MFU with idle pipeline and recomputation; --mfu takes a measured one\n"
        f"            {MFU_SOURCE}"
    )


def _traffic(plan: Plan) -> str:
    if not plan.traffic:
        return "network     none: one GPU"
    lines = ["network     sent per GPU and step; seconds if nothing hid it behind computation"]
    for part in plan.traffic:
        lines.append(f"  {part.name:<12}{part.bytes / 1e9:>13.2f} GB{part.seconds:>9.3f} s  {part.link}: {part.what}")
    return "\n".join(lines)


def _checkpoints(plan: Plan) -> str:
    found, settings = plan.checkpoints, plan.job.config.xact
    size = f"checkpoints {found.bytes / 1e9:.2f} GB each"
    if found.interval is None:
        return f"{size}; none is saved (no save folder, or no save-interval)"
    kept = "all are kept"
    if settings.keep_checkpoints:
        milestones = f" and every {settings.keep_every:,} steps'" if settings.keep_every else ""
        kept = f"the newest {settings.keep_checkpoints}{milestones} are kept"
    return (
        f"{size}, every {found.interval:,} steps ({duration(found.interval * plan.time.step)}); {kept}: "
        f"{found.kept} in the end, {found.disk / 1e9:,.1f} GB of disk"
    )


def short(number: float) -> str:
    """1.13B for 1,132,496,000."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{unit}" if number / size >= 100 else f"{number / size:.2f}{unit}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"
