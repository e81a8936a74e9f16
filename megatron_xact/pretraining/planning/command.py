"""`xact plan`: the report, or the dry run of one rank. No GPU is needed or touched."""

from __future__ import annotations

import argparse
import json

from megatron_xact.argument_types import positive
from megatron_xact.pretraining.planning.hardware import GPUS

EPILOG = """\
Any other flag is Megatron's and overrides the config, as for `xact pretrain`:

  xact plan configs/paper/3b-xielu.toml --nodes 8 --gpu h100
  xact plan configs/paper/3b-xielu.toml --nodes 128 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 \\
      --micro-batch-size 1 --dry-run --rank 517

A layout that does not divide or fit is refused with the nearest one that does. The dry run builds the real model of
one rank, sharded, without memory for its weights, and compares it with the plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "xact plan CONFIG [options] [--any-megatron-flag value ...]"
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", metavar="CONFIG", help="TOML file; see configs/")
    parser.add_argument("--nodes", type=positive(int), default=1, metavar="N", help="servers (default: 1)")
    parser.add_argument("--gpus-per-node", type=positive(int), default=8, metavar="N", help="default: 8")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="default: h100")
    parser.add_argument(
        "--mfu", type=_share, metavar="SHARE", help="of the GPU's peak while it works, e.g. 0.42, measured by you"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="override one key of the config, as for xact pretrain; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--dry-run", action="store_true", help="build one rank's model instead")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="of the dry run (default: 0)")
    parser.add_argument(
        "--world-size", type=positive(int), metavar="W", help="GPUs in all, instead of nodes times GPUs per node"
    )


def main(args: argparse.Namespace) -> int:
    """The subcommand. ValueError or OSError, in one line, for a config that cannot be planned or does not fit."""
    from megatron_xact.pretraining import config as config_file
    from megatron_xact.pretraining.planning import job, report, search

    config = config_file.load(args.config).with_overrides(args.overrides, args.set)
    if config.xact.engine != "megatron":
        raise ValueError(f"engine = {config.xact.engine!r} in [xact] is not planned here: the numbers would be wrong")
    gpus = args.world_size or args.nodes * args.gpus_per_node
    node = min(gpus, args.gpus_per_node)
    if args.dry_run:
        from megatron_xact.pretraining.planning import dry_run

        found = dry_run.of_rank(job.read(config, gpus, node), args.rank)
        print(json.dumps(dry_run.as_dict(found), indent=1) if args.json else dry_run.text(found))
        return 0 if found.agrees else 1
    fitting = search.fitting(config, job.describe(config), gpus, node, GPUS[args.gpu])
    plan = report.make(fitting, GPUS[args.gpu], args.mfu)
    print(json.dumps(report.as_dict(plan), indent=1) if args.json else report.text(plan))
    return 0


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: above 0, at most 1")
    return number
