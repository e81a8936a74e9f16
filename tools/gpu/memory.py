"""Is the memory that `xact plan` predicts what a run takes? Short runs on the GPU, a process each, on random tokens.

Compared is what torch calls max_memory_allocated, over whole steps with their optimizer: the plan's number without its
reserve. The layer is TransformerEngine's where it is installed, else the local one, which keeps a little more.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_xact.installed import present
from tools.gpu.context import Context, Entries, Skip
from tools.gpu.processes import ROOT, Ended, xact

TOLERANCE = 0.10
STEPS = 4
LIMIT = 180.0  # seconds of a run: less than the section's, which could not say what hung

CONFIG = """
base = "{root}/configs/llama.toml"
[model]
num-layers = {layers}
hidden-size = {hidden}
ffn-hidden-size = {ffn}
num-attention-heads = {heads}
seq-length = {sequence}
max-position-embeddings = {sequence}
padded-vocab-size = {vocabulary}
[data]
mock-data = true
tokenizer-type = "NullTokenizer"
vocab-size = {vocabulary}
num-workers = 0
[optimizer]
lr = 1e-4
[schedule]
micro-batch-size = {micro}
global-batch-size = {batch}
train-iters = {steps}
lr-wsd-decay-iters = 1
eval-interval = 1000
eval-iters = 0
[logging]
tensorboard-log-interval = 1
log-interval = 1
log-memory-to-tensorboard = true
[runtime]
bf16 = true
transformer-impl = "{layer}"
[activation]
name = "{activation}"
"""
SMALL = {"layers": 12, "hidden": 768, "ffn": 4608, "heads": 12, "sequence": 2048, "vocabulary": 16384}
# eight layers of the paper's 1.1B model, all of its vocabulary
SLICE = {"layers": 8, "hidden": 1536, "ffn": 9216, "heads": 16, "sequence": 4096, "vocabulary": 147456}
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
MLP = ("--recompute-granularity", "selective", "--recompute-modules", "mlp")

# name -> (sizes, Megatron's flags)
CASES = {
    "125M": (SMALL | {"micro": 8, "activation": "xielu"}, ()),
    "1.1B slice": (SLICE | {"micro": 4, "activation": "xielu"}, ()),
    "1.1B slice, gated": (SLICE | {"micro": 4, "activation": "swiglu", "ffn": 6144}, ()),
    "1.1B slice, MLP recomputed": (SLICE | {"micro": 4, "activation": "xielu"}, MLP),
    "1.1B slice, all recomputed": (SLICE | {"micro": 4, "activation": "xielu"}, FULL),
}


def plan(context: Context, data: Entries) -> str:
    if not context.on_gpu:
        raise Skip("a CPU has no max_memory_allocated; tests/distributed/test_dry_run.py counts bytes there")
    context.needs("megatron")
    layer = "transformer_engine" if present("transformer_engine") else "local"
    data |= {"layer": layer, "cases": {}, "failed": {}}
    for name in ["125M"] if context.quick else context.mine(list(CASES)):
        try:
            with tempfile.TemporaryDirectory() as folder:
                case = data["cases"][name] = compared(Path(folder), layer, *CASES[name])
        except Ended as why:
            data["failed"][name] = {"how": str(why), "output": why.output}
            continue
        data.target(f"{name}: planned over measured peak", case["planned"] / case["measured"],
                    at_least=1 - TOLERANCE, at_most=1 + TOLERANCE)  # fmt: skip
    data.target("cases that could not be run", len(data["failed"]), at_most=0)
    return "; ".join(f"{name}: {why['how']}" for name, why in data["failed"].items()) or ", ".join(data["cases"])


def compared(folder: Path, layer: str, sizes: dict, flags: tuple[str, ...]) -> dict:
    """Bytes of one case: the plan's parts and sum, and the maximum of a real run."""
    from megatron_xact.pretraining.planning import memory

    found = memory.of_stage(planned(folder, layer, sizes, flags), 0)
    return {"planned": found.allocated, "parts": vars(found), "measured": measured(folder, flags)}


def planned(folder: Path, layer: str, sizes: dict, flags: tuple[str, ...]):
    """The job of a case, whose config is written into `folder`."""
    from megatron_xact.pretraining import config
    from megatron_xact.pretraining.planning import job

    path = folder / "case.toml"
    batch = 2 * sizes["micro"]  # two micro-batches: gradients accumulate, as in real runs
    path.write_text(CONFIG.format(root=ROOT, layer=layer, batch=batch, steps=STEPS, **sizes))
    return job.read(config.load(path).with_overrides(flags), 1, 1)


def measured(folder: Path, flags: tuple[str, ...]) -> int:
    """max_memory_allocated of a run of the config in `folder`, as Megatron logs it to TensorBoard."""
    board = folder / "tensorboard"
    xact("pretrain", folder / "case.toml", "--nproc-per-node", 1, "--tensorboard-dir", board, *flags, limit=LIMIT)
    return int(max(scalars(board)["mem-max-allocated-bytes"].values()))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value of a run's TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
