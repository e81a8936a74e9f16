"""Short pretraining runs on the GPU with the quickstart's config, nccl and the local spec; and BF16/FP8 pairs of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tools.gpu.context import Context, Failure, Skip

ROOT = Path(__file__).resolve().parents[2]
XACT = (sys.executable, "-m", "megatron_xact")


def training(context: Context, data: dict) -> str:
    _needs(context)
    steps = 20 if context.quick else 100
    with tempfile.TemporaryDirectory() as folder:
        corpus, run = Path(folder, "data"), Path(folder, "run")
        _run(*XACT, "data", "prepare", "--source", "stdlib", "--out", corpus)
        _run(
            *XACT, "pretrain", "configs/quickstart.toml", "--quiet", "--nproc-per-node", "1",
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


def fp8_gate(context: Context, data: dict) -> str:
    """`xact study fp8-gate`, the MLPs' products in FP8 by cuBLASLt, with and without smoothing."""
    _needs(context)
    if torch.cuda.get_device_capability(context.device) < (8, 9):
        raise Skip("this GPU has no FP8")
    steps = 40 if context.quick else 500
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "data")
        _run(*XACT, "data", "prepare", "--source", "stdlib", "--out", corpus)
        sets = {
            "xact.mlp": "fp8", "runtime.bf16": "true", "parallel.use-distributed-optimizer": "true",
            "parallel.tensor-model-parallel-size": 1, "model.transformer-impl": "local",
            "schedule.train-iters": steps, "schedule.lr-warmup-iters": 5, "schedule.lr-wsd-decay-iters": steps // 4,
            "data.train-data-path": f'["{corpus}/train_text_document"]', "data.tokenizer-model": f"{corpus}/tokenizer",
            "data.valid-data-path": f'["{corpus}/validation_text_document"]',
        }  # fmt: skip
        for way in ("smooth=false", "smooth=true", "gradients=e5m2"):
            sets |= {"fp8.smooth": "false", "fp8.gradients": "e4m3"} | {f"fp8.{way.split('=')[0]}": way.split("=")[1]}
            words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
            _run(*XACT, "study", "fp8-gate", "configs/quickstart.toml", "--out", Path(folder, way), *words)
            data[way] = json.loads(Path(folder, way, "gate.json").read_text())
    return "; ".join(f"{way}: {found['verdict']}" for way, found in data.items())


def _needs(context: Context) -> None:
    if context.device.type != "cuda":
        raise Skip("launch/quickstart.sh is the same on a CPU")
    for package in ("megatron.core", "transformers", "tokenizers"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise Skip(f"{package} is not installed")


def _run(*command) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{' '.join(map(str, command[1:4]))} ended with {done.returncode}: {done.stderr[-1500:]}")
