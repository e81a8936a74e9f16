"""Short pretraining runs on the GPU of the quickstart's config, with nccl: does it learn, and does it in FP8."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

from megatron_xact.installed import present
from tools.gpu.context import Context, Entries, Skip
from tools.gpu.processes import TAIL, Ended, xact

# What FP8 is asked for, by name
MLP = {"xact.mlp": "fp8", "fp8.gradients": "e4m3", "model.transformer-impl": "local"}
TE = {"runtime.fp8-format": "hybrid", "model.transformer-impl": "transformer_engine"}


def quickstart(context: Context, data: Entries) -> str:
    """The loss falls."""
    _needs_training(context)
    steps = 20 if context.quick else 100
    with tempfile.TemporaryDirectory() as folder:
        corpus, run = Path(folder, "data"), Path(folder, "run")
        xact("data", "prepare", "--source", "stdlib", "--out", corpus)
        xact(
            "pretrain", "configs/quickstart.toml", "--quiet", "--nproc-per-node", 1,
            "--tensor-model-parallel-size", 1, "--bf16", "--use-distributed-optimizer",
            "--train-iters", steps, "--lr-warmup-iters", 5, "--lr-wsd-decay-iters", 5, "--log-interval", 1,
            "--train-data-path", corpus / "train_text_document",
            "--valid-data-path", corpus / "validation_text_document", "--tokenizer-model", corpus / "tokenizer",
            "--save", run, "--load", run,
        )  # fmt: skip
        data["progress"] = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    first, last = data["progress"][0]["loss"], data["progress"][-1]["loss"]
    data.target("fall of the loss, nat", first - last, at_least=1.0)
    return f"loss {first:.3f} -> {last:.3f} in {steps} steps"


def fp8_gate(context: Context, data: Entries) -> str:
    """`xact study fp8-gate`: the MLPs' products in FP8 by cuBLASLt; and TransformerEngine's FP8 where it imports."""
    _needs_training(context)
    context.needs_fp8()
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        xact("data", "prepare", "--source", "stdlib", "--out", Path(folder, "data"))
        ways = {"mlp": MLP} | ({"te": TE} if present("transformer_engine") else {})
        for name, sets in ways.items():
            words = [word for key, value in (gate_sets(context, folder) | sets).items()
                     for word in ("--set", f"{key}={value}")]  # fmt: skip
            out = Path(folder, name)
            try:  # exit code 1: FP8 does not pass, which is a result
                xact("study", "fp8-gate", "configs/quickstart.toml", "--out", out, "--retries", 0, *words,
                     accepted=(0, 1), limit=200.0)  # fmt: skip
            except Ended:
                data["logs"] = {log.stem: log.read_text(errors="replace")[-TAIL:] for log in out.glob("logs/*.log")}
                raise
            found = data[name] = json.loads((out / "gate.json").read_text(encoding="utf-8"))
            verdicts.append(f"{name}: {found['verdict']}")
            gap = found["gap"]["value"] if found["gap"] else math.nan  # it diverged
            data.target(f"{name}: FP8 - BF16, nat", gap, at_most=found["threshold"])
    return "; ".join(verdicts)


def gate_sets(context: Context, folder: str) -> dict[str, object]:
    steps = 40 if context.quick else 500
    return {
        "runtime.bf16": "true", "parallel.use-distributed-optimizer": "true", "parallel.tensor-model-parallel-size": 1,
        "schedule.train-iters": steps, "schedule.lr-warmup-iters": 5, "schedule.lr-wsd-decay-iters": steps // 4,
        "data.train-data-path": f'["{folder}/data/train_text_document"]',
        "data.valid-data-path": f'["{folder}/data/validation_text_document"]',
        "data.tokenizer-model": f"{folder}/data/tokenizer",
    }  # fmt: skip


def _needs_training(context: Context) -> None:
    if not context.on_gpu:
        raise Skip("launch/quickstart.sh is the same on a CPU")
    context.needs("megatron", "transformers", "tokenizers")
