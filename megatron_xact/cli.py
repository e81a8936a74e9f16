"""The `xact` command. A subcommand's imports happen when it runs, so that `xact --help` loads no torch."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from megatron_xact import __version__


@dataclass(frozen=True)
class Command:
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    main: Callable[[argparse.Namespace], int | None]
    overrides: bool = False  # words that are not ours go to `args.overrides`


def _lazy(module: str, function: str) -> Callable:
    return lambda argument: getattr(importlib.import_module(module), function)(argument)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "xact pretrain CONFIG [options] [--any-megatron-flag value ...]"
    parser.epilog = "Any other flag is Megatron's and overrides the config, e.g. --train-iters 100 --lr 3e-4."
    parser.add_argument("config", metavar="CONFIG", help="TOML file; see configs/")
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="processes to start on this machine (default: what the config needs)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="override one key of the config, value in TOML, e.g. activation.name=xiprelu; may be repeated",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="progress only; what Megatron prints goes to SAVE/logs/rankN.log"
    )
    parser.add_argument(
        "--print-args", action="store_true", help="print Megatron's resolved command line and exit"
    )


COMMANDS = {
    "doctor": Command(
        "what is installed, which backends a run here would use and why, what a GPU run lacks",
        _doctor_arguments,
        _lazy("megatron_xact.doctor", "main"),
    ),
    "data": Command(
        "text -> BPE tokenizer -> Megatron's indexed format",
        _lazy("megatron_xact.pretraining.data.cli", "add_arguments"),
        _lazy("megatron_xact.pretraining.data.cli", "main"),
    ),
    "pretrain": Command(
        "pretrain a model from a TOML config, through Megatron",
        _pretrain_arguments,
        _lazy("megatron_xact.pretraining.run", "main"),
        overrides=True,
    ),
    "export": Command(
        "Megatron checkpoint -> Hugging Face folder, verified",
        _lazy("megatron_xact.checkpoints.export", "add_arguments"),
        _lazy("megatron_xact.checkpoints.export", "main"),
    ),
    "import": Command(
        "Hugging Face folder, or an xIELU fork's checkpoint -> Megatron checkpoint to go on from",
        _lazy("megatron_xact.checkpoints.importing", "add_arguments"),
        _lazy("megatron_xact.checkpoints.importing", "main"),
    ),
    "verify": Command(
        "do two checkpoints (Megatron or Hugging Face) hold the same model? Names where they differ",
        _lazy("megatron_xact.checkpoints.verify", "add_arguments"),
        _lazy("megatron_xact.checkpoints.verify", "main"),
    ),
    "generate": Command(
        "a sample of text from a Megatron checkpoint or a Hugging Face folder",
        _lazy("megatron_xact.checkpoints.generate", "add_arguments"),
        _lazy("megatron_xact.checkpoints.generate", "main"),
    ),
    "eval": Command(
        "perplexity on indexed data (either kind), lm-evaluation-harness tasks (Hugging Face)",
        _lazy("megatron_xact.checkpoints.evaluate", "add_arguments"),
        _lazy("megatron_xact.checkpoints.evaluate", "main"),
    ),
    "bench": Command(
        "how fast the activation kernels are on this machine, beside the published formula",
        _lazy("megatron_xact.bench", "add_arguments"),
        _lazy("megatron_xact.bench", "main"),
    ),
}


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser; only the chosen subcommand gets its arguments, since `data` has to import to know them."""
    parser = argparse.ArgumentParser(
        prog="xact", description="Trainable activation functions in unmodified Megatron.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"megatron-xact {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        # allow_abbrev: an abbreviation of ours could swallow a flag of Megatron's.
        subparser = subparsers.add_parser(
            name, help=command.help, description=command.help, allow_abbrev=False
        )
        if name == chosen:
            command.add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs `xact`. Exit code: the command's own; 2 for a user's error, told in one line; 130 if interrupted.

    XACT_TRACEBACK=1 in the environment shows the traceback of a user's error.
    """
    argv = sys.argv[1:] if argv is None else argv
    _silence_libraries()
    try:
        args = parse(argv)
        return COMMANDS[args.command].main(args) or 0
    except KeyboardInterrupt:
        print("xact: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `xact doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("XACT_TRACEBACK") == "1":
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"xact: error: {message}", file=sys.stderr)
        return 2


def _silence_libraries() -> None:
    """What is not for our users: a dozen times per import, what `xact doctor` tells once; torch's talk to itself."""
    warnings.filterwarnings(
        "ignore", message=r"[\s\S]*(Apex|apex|Transformer Engine|transformer-engine)[\s\S]*"
    )
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")  # deprecations inside torch
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; Megatron's flags go to `overrides` where it takes any. SystemExit(2): usage."""
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = _parser(chosen)
    args, rest = parser.parse_known_args(argv)
    command = COMMANDS[args.command]
    if command.overrides:
        args.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args
