"""What the plan says beside what is really there: sharded models, the memory they use, Megatron's own validation.

All in one process of its own (the CPU platform, which building and running models needs, is not for pytest's), which
takes Megatron's "fake" process groups: a rank of any world size, whose collectives do nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from multiprocessing import get_context
from pathlib import Path

import kept

from megatron_xact import cli
from megatron_xact.pretraining import config as config_file
from megatron_xact.pretraining.planning import counts, dry_run, job

ROOT = Path(__file__).parents[2]

# The 3B model of the paper over 1,024 GPUs: 32 ranks hold one copy of it.
BIG = ("--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4", "--micro-batch-size", "1")
COPY = [tensor + 256 * stage for stage in range(4) for tensor in range(8)]

TINY = """
base = "{root}/configs/llama.toml"
[model]
num-layers = 3
hidden-size = 128
ffn-hidden-size = 768
num-attention-heads = 4
seq-length = 96
max-position-embeddings = 96
padded-vocab-size = 256
normalization = "LayerNorm"
[data]
mock-data = true
[optimizer]
lr = 1e-3
[schedule]
micro-batch-size = 2
global-batch-size = 8
train-iters = 10
lr-wsd-decay-iters = 2
[runtime]
bf16 = true
transformer-impl = "local"
"""


def measured() -> dict:
    """Everything below, in a new process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure)


def _measure() -> dict:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder, "tiny.toml")
        tiny.write_text(TINY.format(root=ROOT))
        big = config_file.load(ROOT / "configs/paper/3b-xielu.toml").with_overrides(BIG)
        return {
            "big": [dry_run.of_rank(job.read(big, 1024, 8), rank) for rank in COPY],
            "last": dry_run.of_rank(job.read(big, 1024, 8), 1023),
            "models": {name: _built(f"configs/{name}.toml") for name in MODELS},
            "layouts": {name: _ranks(tiny, *case) for name, case in LAYOUTS.items()},
            "kept": {name: kept.of(config_file.load(tiny).with_overrides(*case)) for name, case in kept.CASES.items()},
            "command": _command(),
            "accepted": {str(path.relative_to(ROOT)): _accepted(path) for path in runnable()},
        }


def _command() -> tuple[int, str]:
    """Exit code and output of `xact plan --dry-run`."""
    config = str(ROOT / "configs/paper/3b-xielu.toml")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = cli.main(["plan", config, "--world-size", "1024", *BIG, "--dry-run", "--rank", "517", "--json"])
    return code, output.getvalue()


def runnable() -> list[Path]:
    """The configs of whole runs on one 8-GPU server; not bases, nor the quickstart, which is for two ranks."""
    configs = sorted((ROOT / "configs").rglob("*.toml"))
    others = ("base", "llama", "quickstart")
    return [path for path in configs if path.stem not in others and path.parent.name != "studies"]


# -- parameters -------------------------------------------------------------------------------------------------------

MODELS = ("paper/1.1b-xielu", "paper/1.1b-xiprelu", "paper/1.1b-relu2", "paper/1.1b-swiglu", "paper/3b-xielu",
          "paper/3b-swiglu", "apertus-8b", "small/125m", "small/125m-swiglu")  # fmt: skip

# name -> (flags, GPUs): one whole model copy each, with what the paper's models do not have
LAYOUTS = {
    "tied over stages": (("--pipeline-model-parallel-size", "3"), 3),
    "uneven stages": (("--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "1"), 2),
    "virtual stages": (("--pipeline-model-parallel-size", "3", "--num-layers", "6", "--micro-batch-size", "1",
                        "--global-batch-size", "6", "--num-virtual-stages-per-pipeline-rank", "2"), 3),
    "more ranks than key-value heads": (("--tensor-model-parallel-size", "4", *kept.GROUPED, "--qk-layernorm"), 4),
    "context parallel": (("--context-parallel-size", "2", *kept.TP2), 4),
}  # fmt: skip


def _built(name: str) -> dict[str, int]:
    """Parameters of the real model, unsharded."""
    whole = ("--tensor-model-parallel-size", "1")
    return dry_run.of_rank(job.read(config_file.load(ROOT / name).with_overrides(whole), 8, 8), 0).parameters


def _ranks(tiny: Path, flags: tuple, gpus: int) -> list[dry_run.Built]:
    planned = job.read(config_file.load(tiny).with_overrides(flags), gpus, 8)
    return [dry_run.of_rank(planned, rank) for rank in range(gpus)]


# -- arguments --------------------------------------------------------------------------------------------------------


def _accepted(path: Path) -> str:
    """What Megatron's own validation says against it on one 8-GPU server; "" for nothing."""
    from megatron_xact.pretraining.run import _let_megatron_check

    try:
        _let_megatron_check(config_file.load(path), 8)
    except ValueError as error:
        return str(error)
    return ""


def total(parameters: dict[str, int]) -> int:
    return sum(parameters[group] for group in counts.GROUPS)
