"""What a config's blends amount to: how much of each part a run reads, and how often.

Weights and splits are Megatron's own (`train-data-path = ["0.7", "a", "0.3", "b"]`); this only does its arithmetic.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_xact.pretraining import arguments, config
from megatron_xact.pretraining.data import indexed

SPLITS = ("train", "validation", "test")
DEFAULT_SPLIT = "969, 30, 1"  # Megatron's, of a data-path that all three share


@dataclass(frozen=True)
class Part:
    """One dataset of a split's blend."""

    prefix: Path
    share: float  # of the tokens that the run reads of this split
    tokens: int  # that the dataset has for this split
    read: float  # tokens that the run reads, counted again in every epoch

    @property
    def epochs(self) -> float:
        return self.read / self.tokens if self.tokens else float("inf")


@dataclass(frozen=True)
class Split:
    name: str
    samples: int  # sequences that the run reads
    parts: list[Part]
    missing: int  # sequences that the run would read, but a blend without weights, which is read once, does not have


@dataclass(frozen=True)
class Plan:
    source: str
    seq_length: int
    batch: int
    batch_given: bool
    splits: list[Split]
    tokenizer: str | None

    def prefixes(self) -> list[Path]:
        return list(dict.fromkeys(part.prefix for split in self.splits for part in split.parts))


def plan(path: str) -> Plan:
    """The blends of a config file. ValueError, OSError: it, or the data it names, cannot be read."""
    args = arguments.parse(config.load(path).arguments())
    if args.mock_data:
        raise ValueError(f"{path}: mock-data is made up while training; there is nothing to inspect")
    batch = args.global_batch_size or args.micro_batch_size
    blend, per_split = get_blend_and_blend_per_split(args)
    if blend is None and per_split is None:
        raise ValueError(f"{path} names no data: set train-data-path or data-path in [data]")
    shares = parse_and_normalize_split(args.split or DEFAULT_SPLIT) if blend else [1.0] * len(SPLITS)
    splits = []
    for number, (name, samples) in enumerate(zip(SPLITS, _samples(args, batch), strict=True)):
        found = blend or per_split[number]
        if found and samples and shares[number]:
            splits.append(_split(name, samples, args.seq_length, *found, shares[number]))
    hugging_face = args.tokenizer_type == "HuggingFaceTokenizer"
    return Plan(
        path,
        args.seq_length,
        batch,
        args.global_batch_size is not None,
        splits,
        args.tokenizer_model if hugging_face else None,
    )


def _samples(args: Namespace, batch: int) -> tuple[int, int, int]:
    """Sequences of the three splits, as Megatron counts them."""
    train = args.train_samples or (args.train_iters or 0) * batch
    evaluations = train // batch // args.eval_interval + 1 if args.eval_interval else 0
    each = (args.eval_iters or 0) * batch
    return train, evaluations * each, each


def _split(
    name: str, samples: int, seq_length: int, prefixes: list[str], weights: list[float] | None, share: float
) -> Split:
    paths = [Path(prefix) for prefix in prefixes]
    tokens = [int(len(indexed.read_index(path).tokens) * share) for path in paths]
    missing = 0
    if weights is None and len(paths) > 1:  # Megatron then reads each part once
        there = sum(n // seq_length for n in tokens)
        samples, missing = min(samples, there), max(0, samples - there)
        weights = tokens
    weights = weights or [1.0]
    total = sum(weights)
    parts = [
        Part(path, weight / total, n, samples * seq_length * weight / total)
        for path, weight, n in zip(paths, weights, tokens, strict=True)
    ]
    return Split(name, samples, parts, missing)


def table(plan: Plan) -> str:
    """The splits, one line per part."""
    how = "" if plan.batch_given else " (global-batch-size is not set: one data-parallel rank's)"
    lines = [f"{plan.source}: batches of {plan.batch:,} x {plan.seq_length:,} tokens{how}"]
    for split in plan.splits:
        lines.append(f"  {split.name}: {split.samples:,} sequences, {split.samples * plan.seq_length:,} tokens to read")
        lines += [
            f"    {part.share:6.1%}  {part.read:>16,.0f} of {part.tokens:>16,} tokens  "
            f"{part.epochs:8.2f} epochs  {part.prefix}"
            for part in split.parts
        ]
        if split.missing:
            lines.append(
                f"    {split.missing:,} sequences are missing: without weights each part is read once; "
                "give weights to read it again"
            )
    return "\n".join(lines)
