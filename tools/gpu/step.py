"""A step of the paper's 1.1B model: tokens per second and MFU with xIELU, ReLU^2 and SwiGLU at matched parameters.

The configs are those of configs/paper, on random tokens, at TP 1, with their own micro-batch; two of these make a step,
so that gradients accumulate, as in real runs. Nothing is saved. xIELU runs three times: with its MLP unfused, by the
fused kernels whether they are faster or not, and the way that a measurement chooses (`[xact] mlp = "auto"`). A peer's
time is the mean of its runs.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from megatron_xact.installed import present
from tools.gpu.context import Context, Entries
from tools.gpu.memory import scalars
from tools.gpu.processes import ROOT, Ended, xact

RUNS = {  # name -> (config, [xact] mlp)
    "relu2": ("1.1b-relu2", "unfused"),
    "swiglu": ("1.1b-swiglu", "unfused"),
    "xielu": ("1.1b-xielu", "unfused"),
    "xielu, fused": ("1.1b-xielu", "triton"),
    "xielu, auto": ("1.1b-xielu", "auto"),
    "relu2, again": ("1.1b-relu2", "unfused"),  # how much the GPU has changed since the first
}
# The paper's Table 1, seconds per iteration: xIELU 0.560, ReLU^2 0.534, SwiGLU 0.549
PAPER = {"relu2": 0.560 / 0.534, "swiglu": 0.560 / 0.549}
# Of xIELU's time at its fastest: no slower than ReLU^2, but for what medians of eight steps may differ by; faster than
# SwiGLU.
TARGETS = {"relu2": 1.005, "swiglu": 1.0}
STEPS, WARMUP = 12, 4  # the first steps allocate, compile and choose
SMALL = {"num-layers": 2, "hidden-size": 64, "num-attention-heads": 4, "seq-length": 64, "micro-batch-size": 1,
         "max-position-embeddings": 64, "padded-vocab-size": 512}  # fmt: skip
NARROWER = 48  # times the feed-forward layer of the small ones
LEFT_OUT = ("save", "load", "async-save", "save-interval", "tokenizer-model")  # of the configs
LIMIT = 240.0  # seconds of a run


def step(context: Context, data: Entries) -> str:
    context.needs("megatron")
    data |= {"runs": {}, "failed": {}, "ratios": {}}
    for name, (config, mlp) in RUNS.items():
        try:
            found = data["runs"][name] = _run(context, config, mlp)
        except Ended as why:
            data["failed"][name] = {"how": str(why), "output": why.output}
            continue
        print(f"{name:20}{found['tokens_per_second']:12,.0f} tokens/s  MFU {found['mfu']}", flush=True)
        data.save()
    data.target("runs that failed", len(data["failed"]), at_most=0)
    times = {name: 1 / found["tokens_per_second"] for name, found in data["runs"].items()}
    ours = [name for name in times if name.startswith("xielu")]
    if {"relu2", "relu2, again"} <= times.keys():
        data["ratios"]["relu2, again / relu2"] = times["relu2, again"] / times["relu2"]
    for peer in TARGETS:
        theirs = [seconds for name, seconds in times.items() if name.partition(",")[0] == peer]
        if not (ours and theirs):
            continue
        ratios = {f"{name} / {peer}": times[name] / statistics.mean(theirs) for name in ours}
        data["ratios"] |= ratios
        if not context.quick:
            fastest = min(ratios, key=ratios.__getitem__)
            data.target(f"time of {fastest}, {PAPER[peer]:.3f} in the paper", ratios[fastest], at_most=TARGETS[peer])
    return "time " + ", ".join(f"{names} {ratio:.3f}" for names, ratio in data["ratios"].items())


def _run(context: Context, config: str, mlp: str) -> dict:
    """Medians after the warm-up, and every step's."""
    with tempfile.TemporaryDirectory() as folder:
        path, board = Path(folder, "config.toml"), Path(folder, "tensorboard")
        path.write_text(config_of(context, config, mlp), encoding="utf-8")
        printed = xact("pretrain", path, "--nproc-per-node", 1, "--tensorboard-dir", board, limit=LIMIT)
        found = scalars(board)
    after = {tag: [value for step, value in steps.items() if step > WARMUP] for tag, steps in found.items()}
    return {
        "tokens_per_second": statistics.median(after["tokens-per-second"]),
        "mfu": statistics.median(after["mfu"]) if "mfu" in after else None,  # of GPUs whose peak is known
        "peak_bytes": max(found["mem-max-allocated-bytes"].values()),
        "every_step": after["tokens-per-second"],
        "losses": list(found["lm loss"].values()),
        "ways": [line for line in printed.splitlines() if "megatron-xact:" in line],  # its layers, and how MLPs run
    }


def config_of(context: Context, config: str, mlp: str) -> str:
    """TOML of a run: as in the paper but for data, length, layout, and what it leaves behind."""
    from megatron_xact.pretraining import config as configs

    run = configs.load(ROOT / "configs" / "paper" / f"{config}.toml")
    sizes = SMALL | {"ffn-hidden-size": run.megatron["ffn-hidden-size"] // NARROWER} if context.quick else {}
    micro = sizes.get("micro-batch-size", run.megatron["micro-batch-size"])
    vocabulary = sizes.get("padded-vocab-size", run.megatron["padded-vocab-size"])
    flags = sizes | {
        "global-batch-size": 2 * micro, "train-iters": STEPS, "lr-warmup-iters": 1, "lr-wsd-decay-iters": 1,
        "tokenizer-type": "NullTokenizer", "vocab-size": vocabulary, "eval-iters": 0,
        "tensor-model-parallel-size": 1, "log-interval": 1, "tensorboard-log-interval": 1, "num-workers": 0,
    }  # fmt: skip
    words = ["--mock-data", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]
    if mlp != "unfused" and present("transformer_engine"):
        words.append("--use-transformer-engine-op-fuser")  # its modules cannot be fused with ours, its operations can
    run = run.with_overrides(words, [f"xact.mlp={mlp}"])
    return replace(run, megatron={k: v for k, v in run.megatron.items() if k not in LEFT_OUT}).dump()
