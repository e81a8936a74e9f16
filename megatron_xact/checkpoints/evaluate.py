"""`xact eval`: loss on indexed data (Megatron or Hugging Face), and lm-evaluation-harness tasks (Hugging Face only).

The loss is of the whole file, or of its first `--max-tokens`: documents in file order, joined by their end-of-document
tokens and cut every `seq-length` tokens, contexts crossing document borders, as Megatron's GPTDataset cuts them (it
also shuffles the documents, and takes as many sequences as the run asks for: its loss is an estimate of this one).
Every token but the first is predicted once. Padding of the vocabulary gets no probability, unlike in training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import batched, groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xact.checkpoints import model as models
from megatron_xact.checkpoints.model import Model
from megatron_xact.installed import extra
from megatron_xact.pretraining.data.indexed import read_index
from megatron_xact.pretraining.data.progress import Progress
from megatron_xact.whole import write_text


@dataclass(frozen=True)
class Loss:
    """Of one model on one file. Bits per byte only where `xact data prepare` left the number of bytes beside it."""

    data: str
    tokens: int  # predicted
    seq_length: int
    stride: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class Score:
    task: str
    metric: str
    value: float
    stderr: float | None


def main(args: argparse.Namespace) -> int:
    """The subcommand. A table on stdout, or JSON with --json; the same JSON in a file with --output."""
    source = models.locate(args.folder, args.step)
    if args.tasks and source.kind != "huggingface":
        raise ValueError(f"--tasks needs a Hugging Face folder: xact export {args.folder} OUT, then xact eval OUT")
    tasks = [name for name in (args.tasks or "").split(",") if name]
    if tasks:
        _prepare_harness(args.include_path)
    model = models.load(args.folder, args.step)
    sizes = args.seq_length, args.stride, args.batch_size, args.max_tokens
    losses = [loss(model, prefix, *sizes) for prefix in args.data or []]
    scores = harness(model, tasks, args.include_path, args.batch_size, args.limit) if tasks else []
    results = {"model": str(source.path), "losses": [asdict(x) for x in losses], "tasks": [asdict(x) for x in scores]}
    if args.output:
        write_text(args.output, json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2) if args.json else table(losses, scores))
    return 0


# Loss on indexed data


def loss(
    model: Model,
    prefix: str | Path,
    seq_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
) -> Loss:
    """Cross entropy of `prefix`.bin in windows of `seq_length` tokens (default: the length the model was trained with).

    stride < seq_length: windows overlap, and each predicts only its last `stride` tokens, so with more context.
    ValueError or OSError: no such data, ids outside the vocabulary, or impossible sizes.
    """
    tokens = read_index(Path(prefix)).tokens
    seq_length = seq_length or model.seq_length
    stride = stride or seq_length
    if not 1 <= seq_length <= model.max_length:
        raise ValueError(f"--seq-length {seq_length} must be from 1 to the model's context of {model.max_length}")
    if not 1 <= stride <= seq_length or batch_size < 1:
        raise ValueError(f"--stride {stride} must be from 1 to --seq-length {seq_length}, --batch-size at least 1")
    used = tokens[: max_tokens + 1] if max_tokens else tokens
    if len(used) < 2:
        raise ValueError(f"{prefix}.bin has {len(used)} tokens; at least 2 are needed")
    total = 0.0
    with Progress(f"loss on {Path(prefix).name}", len(used) - 1, unit=" tokens") as progress:
        for window, first in _batches(used, seq_length, stride, batch_size):
            if (top := int(window.max())) >= model.vocab_size:
                raise ValueError(
                    f"{prefix}.bin holds token {top}, the model knows {model.vocab_size}: made with another tokenizer"
                )
            nats = _nats(model, window)[:, first:]
            total += float(nats.double().sum())
            progress.update(nats.numel())
    mean = total / (len(used) - 1)
    per_byte = _tokens_per_byte(Path(prefix))
    bits = mean * per_byte / math.log(2) if per_byte else None
    return Loss(str(prefix), len(used) - 1, seq_length, stride, mean, math.exp(min(mean, 700.0)), bits)


def _batches(tokens: np.ndarray, seq_length: int, stride: int, batch_size: int) -> Iterator[tuple[Tensor, int]]:
    """(windows [b, <= seq_length + 1] int64, index of the first prediction that counts), over all of `tokens`."""
    windows = (
        (np.asarray(tokens[start : start + seq_length + 1], dtype=np.int64), first)
        for start, first in _windows(len(tokens) - 1, seq_length, stride)
    )
    for (_, first), alike in groupby(windows, key=lambda w: (len(w[0]), w[1])):
        for batch in batched(alike, batch_size):
            yield torch.from_numpy(np.stack([window for window, _ in batch])), first


def _windows(predictions: int, seq_length: int, stride: int) -> Iterator[tuple[int, int]]:
    """(start, index of the first prediction that counts): all of the first window's, the last `stride` of others'."""
    yield 0, 0
    overlap = seq_length - stride
    for start in range(stride, predictions - overlap, stride):
        yield start, overlap


def _nats(model: Model, window: Tensor) -> Tensor:
    """window: [b, s + 1] -> [b, s], what each next token costs."""
    logits = model.logits(window[:, :-1])
    labels = window[:, 1:].to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def _tokens_per_byte(prefix: Path) -> float | None:
    """Of the split at `prefix`, from the manifest beside it; None where there is none for it."""
    from megatron_xact.pretraining.data import manifest

    try:
        data = manifest.load(prefix.parent)
    except ValueError:
        return None
    split = {manifest.TRAIN: data.train, manifest.VALIDATION: data.validation}.get(prefix.name)
    return split.tokens / split.bytes if split else None


# lm-evaluation-harness


def _prepare_harness(include_path: Path | None) -> None:
    """Before anything of Hugging Face is imported: local tasks must not reach for the network."""
    if include_path:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--tasks needs lm-evaluation-harness ({error.name} is missing): {extra('eval')}") from None


def harness(
    model: Model, tasks: list[str], include_path: Path | None = None, batch_size: int = 4, limit: int | None = None
) -> list[Score]:
    """Scores of `tasks` and their groups, zero-shot unless a task says otherwise. ValueError: an unknown task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def unknown() -> list[str]:
        return [name for name in tasks if not manager.match_tasks([name])]

    own = None if include_path is None else str(include_path)  # before 0.4.12 the harness takes no Path
    # Reading the harness' own thousands of tasks takes longer than a small evaluation: only if one of them is meant.
    manager = TaskManager(include_path=own, include_defaults=own is None)
    if own is not None and unknown():
        manager = TaskManager(include_path=own)
    if unknown():
        raise ValueError(f"unknown task {unknown()[0]!r}; `lm-eval ls tasks` lists them, --include-path adds your own")
    wrapped = HFLM(pretrained=model.module, tokenizer=model.tokenizer(), batch_size=batch_size)
    found = simple_evaluate(
        wrapped, tasks=tasks, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
    )
    rows = found["results"] | found.get("groups", {})
    return [score for name, row in rows.items() for score in _scores(name, row)]


def _scores(task: str, row: dict) -> list[Score]:
    """One per metric; the harness names them "metric,filter", and their errors "metric_stderr,filter"."""
    scores = []
    for key, value in row.items():
        metric, comma, which = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{which}")
        name = metric if which == "none" else f"{metric} ({which})"
        scores.append(Score(task, name, float(value), float(error) if isinstance(error, int | float) else None))
    return scores


def table(losses: list[Loss], scores: list[Score]) -> str:
    lines = []
    for x in losses:
        lines.append(f"{x.data}: {x.tokens:,} tokens in windows of {x.seq_length}, stride {x.stride}")
        bits = f"   {x.bits_per_byte:.4f} bits/byte" if x.bits_per_byte is not None else ""
        lines.append(f"  loss {x.nats_per_token:.4f} nats/token   perplexity {x.perplexity:.2f}{bits}")
    width = max((len(s.task) for s in scores), default=0)
    for s in scores:
        error = f" +- {s.stderr:.4f}" if s.stderr is not None else ""
        lines.append(f"{s.task:{width}}  {s.metric}  {s.value:.4f}{error}")
    return "\n".join(lines)
