"""A short pretraining run on the GPU with the quickstart's config, nccl and the local spec: the loss falls."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.gpu.context import Context, Failure, Skip

ROOT = Path(__file__).resolve().parents[2]


def training(context: Context, data: dict) -> str:
    if context.device.type != "cuda":
        raise Skip("launch/quickstart.sh is the same on a CPU")
    for package in ("megatron.core", "transformers", "tokenizers"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise Skip(f"{package} is not installed")
    steps = 20 if context.quick else 100
    with tempfile.TemporaryDirectory() as folder:
        corpus, run = Path(folder, "data"), Path(folder, "run")
        xact = (sys.executable, "-m", "megatron_xact")
        _run(*xact, "data", "prepare", "--source", "stdlib", "--out", corpus)
        _run(
            *xact, "pretrain", "configs/quickstart.toml", "--quiet", "--nproc-per-node", "1",
            "--tensor-model-parallel-size", "1", "--bf16", "--use-distributed-optimizer",
            "--train-iters", steps, "--lr-warmup-iters", "5", "--lr-wsd-decay-iters", "5", "--log-interval", "1",
            "--train-data-path", corpus / "train_text_document",
            "--valid-data-path", corpus / "validation_text_document", "--tokenizer-model", corpus / "tokenizer",
            "--save", run, "--load", run,
        )  # fmt: skip
        data["progress"] = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    first, last = data["progress"][0]["loss"], data["progress"][-1]["loss"]
    if not last < first - 1:
        raise Failure(f"loss {first:.3f} at the first step, {last:.3f} after {steps}: it should fall by 1")
    return f"loss {first:.3f} -> {last:.3f} in {steps} steps"


def _run(*command) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{' '.join(map(str, command[1:4]))} ended with {done.returncode}: {done.stderr[-1500:]}")
