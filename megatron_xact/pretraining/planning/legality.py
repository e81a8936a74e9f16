"""Why a layout is legal, rule by rule; `checks` and `job` refuse one that is not, in the same terms."""

from __future__ import annotations

from megatron_xact.pretraining.planning.job import Job


def reasons(job: Job) -> list[str]:
    """One line per rule that the layout had to obey, with its numbers."""
    shape, layout = job.shape, job.layout
    t, p, c, d = layout.tensor, layout.pipeline, layout.context, layout.data
    lines = []
    if layout.gpus > 1:
        copy = f"{t} x {p} x {c} = {t * p * c} rank(s) of a model copy"
        lines.append(f"{copy} divide {layout.gpus:,} GPUs: {d:,} data-parallel")
    if t > 1:
        groups = shape.key_value_heads
        kv = f"{groups // t}" if groups >= t else f"1, shared by {t // groups} ranks,"
        lines += [
            f"tensor {t} divides {shape.heads} heads ({shape.heads // t} each), {groups} key-value heads ({kv} each), "
            f"ffn {shape.ffn:,} ({shape.ffn // t:,}), vocabulary {shape.vocab:,} ({shape.vocab // t:,})"
        ]
        if layout.sequence_parallel:
            lines.append(f"sequence parallelism: tensor {t} divides sequence {shape.sequence:,}")
    if p > 1:
        stages = sorted(set(layout.stages))
        even = f"{stages[0]} each" if len(stages) == 1 else " + ".join(map(str, layout.stages))
        chunks = f", in {layout.virtual} chunks" if layout.virtual > 1 else ""
        lines.append(f"pipeline {p} takes {shape.layers} layers: {even}{chunks}")
    if c > 1:
        lines.append(f"2 x context {c} divides sequence {shape.sequence:,}")
    lines.append(
        f"micro-batch {layout.micro_batch} x data {d:,} = {layout.micro_batch * d:,} divides batch {layout.batch:,}: "
        f"{layout.micro_batches} micro-batches per step"
    )
    return lines


def warnings(job: Job) -> list[str]:
    """What is legal and still a likely mistake."""
    layout, found = job.layout, []
    if layout.tensor > layout.gpus_per_node:
        found.append(
            f"tensor {layout.tensor} reaches over servers of {layout.gpus_per_node} GPUs: its traffic, in every layer, "
            "then runs over the network"
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        found.append("tensor parallelism without sequence-parallel keeps the same activations on every rank")
    if layout.pipeline > 1 and layout.bubble > 0.2:
        found.append(
            f"the pipeline idles {layout.bubble / (1 + layout.bubble):.0%} of a step: {layout.micro_batches} "
            f"micro-batches are few for {layout.pipeline} stages"
        )
    if job.sixteen_bit and not job.args.use_distributed_optimizer and layout.replicas > 1:
        found.append("without use-distributed-optimizer every GPU holds all optimizer states of its parameters")
    return found
