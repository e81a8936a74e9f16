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
from pathlib import Path

from megatron_xact import __version__
from megatron_xact.argument_types import folder


@dataclass(frozen=True)
class Command:
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    main: Callable[[argparse.Namespace], int | None]
    overrides: bool = False  # whether unknown words are Megatron's flags, for `args.overrides`


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
    nodes = parser.add_argument_group("several machines (launch/torchrun.sh; under SLURM: launch/slurm.sbatch)")
    nodes.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines, each with this command")
    nodes.add_argument("--node-rank", type=int, default=0, metavar="R", help="this machine's number, from 0")
    nodes.add_argument("--rendezvous", metavar="HOST:PORT", help="where they meet: an address and port of number 0")
    parser.add_argument(
        "--launch-plan", action="store_true", help="check the config, print what a launcher must know, and exit"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="override one key of the config, value in TOML, e.g. activation.name=xiprelu; may be repeated",
    )
    parser.add_argument(
        "--branch-from",
        type=int,
        metavar="STEP",
        help="leave this run, from its constant learning rate, for a cooldown of its own: see --cooldown-steps",
    )
    parser.add_argument(
        "--cooldown-steps",
        type=int,
        metavar="N",
        help="length of that cooldown; it is saved in --save, by default RUN/branches/step-STEP+N",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="progress only; what Megatron prints goes to SAVE/logs/rankN.log"
    )
    parser.add_argument("--print-args", action="store_true", help="print Megatron's resolved command line and exit")


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=folder, metavar="RUN", help="folder of a run: its `save`")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the pictures go (default: RUN/plots; of several runs: plots in the current folder)",
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
    "plan": Command(
        "before a run: is the layout legal, does it fit, what does it cost; or build any rank's model without a GPU",
        _lazy("megatron_xact.pretraining.planning.command", "add_arguments"),
        _lazy("megatron_xact.pretraining.planning.command", "main"),
        overrides=True,
    ),
    "pretrain": Command(
        "pretrain a model from a TOML config, through Megatron",
        _pretrain_arguments,
        _lazy("megatron_xact.pretraining.command", "main"),
        overrides=True,
    ),
    "plot": Command(
        "pictures of one or several runs: loss, speed, alphas, learned activations, sparsity and outliers",
        _plot_arguments,
        _lazy("megatron_xact.pretraining.plot", "main"),
    ),
    "export": Command(
        "Megatron checkpoint -> Hugging Face folder, verified",
        _lazy("megatron_xact.checkpoints.cli", "export_arguments"),
        _lazy("megatron_xact.checkpoints.cli", "export"),
    ),
    "import": Command(
        "Hugging Face folder, or an xIELU fork's checkpoint -> Megatron checkpoint to go on from",
        _lazy("megatron_xact.checkpoints.cli", "import_arguments"),
        _lazy("megatron_xact.checkpoints.cli", "import_checkpoint"),
    ),
    "verify": Command(
        "do two checkpoints (Megatron or Hugging Face) hold the same model? Names where they differ",
        _lazy("megatron_xact.checkpoints.cli", "verify_arguments"),
        _lazy("megatron_xact.checkpoints.cli", "verify"),
    ),
    "generate": Command(
        "a sample of text from a Megatron checkpoint or a Hugging Face folder",
        _lazy("megatron_xact.checkpoints.cli", "generate_arguments"),
        _lazy("megatron_xact.checkpoints.cli", "generate"),
    ),
    "eval": Command(
        "perplexity on indexed data (either kind), lm-evaluation-harness tasks (Hugging Face)",
        _lazy("megatron_xact.checkpoints.cli", "eval_arguments"),
        _lazy("megatron_xact.checkpoints.cli", "evaluate"),
    ),
    "study": Command(
        "what an activation is worth: ladders of runs planned and trained, scaling laws, paired comparisons, a report",
        _lazy("megatron_xact.studies.cli", "add_arguments"),
        _lazy("megatron_xact.study_command", "main"),
    ),
    "bench": Command(
        "how fast activations and whole MLPs are on this machine, and which way a run would take",
        _lazy("megatron_xact.bench.command", "add_arguments"),
        _lazy("megatron_xact.bench.command", "main"),
    ),
}


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser; only the chosen subcommand gets its arguments, since most import to know them."""
    parser = argparse.ArgumentParser(
        prog="xact", description="Trainable activation functions in unmodified Megatron.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"megatron-xact {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        # allow_abbrev: an abbreviation of ours could swallow a flag of Megatron's.
        subparser = subparsers.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
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
        if "XACT_ATTEMPT" not in os.environ:  # set by a launcher, which then says so for its ranks
            print("xact: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `xact doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("XACT_TRACEBACK") == "1":
            raise
        from megatron_xact.pretraining.files import why_not

        print(f"xact: error: {why_not(error)}", file=sys.stderr)
        return 2


def _silence_libraries() -> None:
    """Leave out warnings that tell a user nothing: `xact doctor` says once what is missing, imports a dozen times."""
    warnings.filterwarnings("ignore", message=r"[\s\S]*(Apex|apex|Transformer Engine|transformer-engine)[\s\S]*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")  # deprecations inside torch
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"


def parse(argv: list[str]) -> argparse.Namespace:
    """The parsed command line; `words`: all that follows the command; `overrides`: Megatron's flags, if it takes any.

    SystemExit(2): the usage was wrong.
    """
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = _parser(chosen)
    args, rest = parser.parse_known_args(argv)
    command = COMMANDS[args.command]
    args.words = argv[argv.index(args.command) + 1 :]
    if command.overrides:
        args.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args
