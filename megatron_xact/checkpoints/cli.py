"""`xact export`, `import`, `verify`, `generate` and `eval`: their arguments and help, and what is wrong at a glance.

Light on purpose; the work is imported when it is asked for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_xact.argument_types import file, folder, natural, not_negative, positive
from megatron_xact.checkpoints.folders import refuse_existing
from megatron_xact.checkpoints.options import DTYPES, SHARD_SIZE, size_in_bytes

EITHER = "a run's folder, one iter_* of it, or a Hugging Face folder"


def _step_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=natural, metavar="N", help="iteration of a run (default: the latest)")


def _output_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("out", metavar=name, type=Path, help="folder to write; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help=f"move an existing {name} aside")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=folder, help="a run's folder, or one iter_* of it")
    _output_arguments(parser, "OUT")
    _step_argument(parser)
    add("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    add("--max-shard-size", default=SHARD_SIZE, metavar="SIZE", help="of a file (default: %(default)s)")
    add("--tokenizer", type=folder, metavar="FOLDER", help="with tokenizer.json (default: the run's)")
    add("--no-verify", action="store_true", help="do not compare logits; tensors are always read back")


def export(args: argparse.Namespace) -> int:
    size_in_bytes(args.max_shard_size)
    refuse_existing(args.out, args.overwrite)
    from megatron_xact.checkpoints import export

    return export.main(args)


def import_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="HF_FOLDER", type=folder, help="has a config.json; or a fork's checkpoint")
    _output_arguments(parser, "CHECKPOINT")
    for size, short in (("tensor", "--tp"), ("pipeline", "--pp")):
        add(f"--{size}-model-parallel-size", short, type=positive(int), default=1, metavar="N", help="default: 1")
    add(
        "--make-vocab-size-divisible-by",
        type=positive(int),
        default=128,
        metavar="N",
        help="as for Megatron (default: 128)",
    )
    _step_argument(parser)
    add("--activation", metavar="NAME", help="of a Megatron checkpoint that does not name its own")
    add(
        "--alpha-disagreement",
        choices=("refuse", "average", "rank0"),
        default="refuse",
        help="what to do with activation parameters that differ between tensor-parallel ranks (default: refuse)",
    )
    add("--trust-pickle", action="store_true", help="unpickle whatever an old checkpoint holds")
    add("--no-verify", action="store_true", help="do not compare the result with what was imported")


def import_checkpoint(args: argparse.Namespace) -> int:
    refuse_existing(args.out, args.overwrite)
    from megatron_xact.checkpoints import importing

    return importing.main(args)


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("a", metavar="A", type=folder, help=EITHER)
    add("b", metavar="B", type=folder, help=EITHER)
    add("--text", type=file, metavar="FILE", help="compare logits on this (default: pages of Python's manual)")
    add("--tokenizer", type=folder, metavar="FOLDER", help="with tokenizer.json (default: A's, else B's)")
    add(
        "--tolerance",
        type=not_negative,
        default=1e-4,
        metavar="X",
        help="largest difference of fp32 logits (default: %(default)g)",
    )
    add("--tensors-only", action="store_true", help="load no model: much less memory, weaker proof")
    add("--json", action="store_true", help="print the report as JSON")


def verify(args: argparse.Namespace) -> int:
    from megatron_xact.checkpoints import verify

    return verify.main(args)


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=folder, help=EITHER)
    add("--prompt", default="", metavar="TEXT", help="to go on from (default: a document's beginning)")
    add("--tokens", type=positive(int), default=100, metavar="N", help="at most this many (default: %(default)s)")
    add("--temperature", type=not_negative, default=0.8, metavar="T", help="of sampling (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of sampling (default: %(default)s)")
    add("--greedy", action="store_true", help="always the likeliest token")
    _step_argument(parser)
    add("--tokenizer", type=folder, metavar="FOLDER", help="with tokenizer.json (default: the model's)")


def generate(args: argparse.Namespace) -> int:
    from megatron_xact.checkpoints import generate

    return generate.main(args)


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=folder, help=EITHER)
    add("--data", action="append", metavar="PREFIX", help="of .bin and .idx files, for the loss; may be repeated")
    add("--seq-length", type=positive(int), metavar="N", help="tokens per window (default: the run's)")
    add("--stride", type=positive(int), metavar="N", help="of overlapping windows (default: no overlap)")
    add("--max-tokens", type=positive(int), metavar="N", help="of the data, from its start (default: all)")
    add("--tasks", metavar="A,B", help="of lm-evaluation-harness, for Hugging Face folders")
    add(
        "--include-path",
        type=folder,
        metavar="DIR",
        help="with your own tasks; then nothing is downloaded (HF_HUB_OFFLINE=0: is)",
    )
    add("--limit", type=positive(int), metavar="N", help="examples per task (default: all)")
    add(
        "--batch-size",
        type=positive(int),
        default=4,
        metavar="N",
        help="windows, examples at once (default: %(default)s)",
    )
    _step_argument(parser)
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--output", type=Path, metavar="FILE", help="write the same JSON there")


def evaluate(args: argparse.Namespace) -> int:
    if not args.data and not args.tasks:
        raise ValueError("nothing to evaluate: give --data PREFIX (of .bin and .idx files), --tasks NAMES, or both")
    from megatron_xact.checkpoints import evaluate

    return evaluate.main(args)
