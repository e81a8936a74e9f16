"""`xact pretrain` before anything heavy is imported: from here on a signal is remembered, not deadly."""

from __future__ import annotations

import argparse

from megatron_xact.pretraining import launchers, signals


def main(args: argparse.Namespace) -> int:
    """The subcommand; see run.py. Its exit codes: exits.py."""
    with signals.remembering():
        launchers.adopt_slurm_rank()
        from megatron_xact.pretraining import run

        return run.main(args)
