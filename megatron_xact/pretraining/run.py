"""`xact pretrain`: a config becomes Megatron's arguments, and Megatron's own trainer runs them.

Started by hand it checks the config and starts one process per rank through torchrun; started by torchrun (or anything
else that sets RANK and WORLD_SIZE) it is one of the ranks. What a run writes lies in its `save` folder:

    iter_*/, latest_checkpointed_iteration.txt   Megatron's distributed checkpoints
    config.toml                                  the resolved config: `xact pretrain` runs it again, or resumes
    progress.jsonl, alphas.jsonl                 loss and speed, every layer's activation parameters
    report.json, plots/, tensorboard/            the result in numbers and pictures; Megatron's scalars and the alphas
    logs/                                        with --quiet, what each rank printed
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import socket
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import TextIO

from megatron_xact.pretraining import config as config_file
from megatron_xact.pretraining.config import RunConfig, validate


def main(args: argparse.Namespace) -> int:
    """The subcommand. Raises ValueError or OSError, before anything is written, for what cannot run here."""
    config = config_file.load(args.config).with_overrides(args.overrides, args.set)
    if args.print_args:
        print(shlex.join(config.arguments()))
        return 0
    if "RANK" not in os.environ:
        from megatron_xact.pretraining.platform import default_processes

        processes = args.nproc_per_node or default_processes(config)
        validate(config, processes)
        _let_megatron_check(config, processes)
        if processes > 1:
            _start_ranks(processes)
        _be_the_only_rank()
    with _output(config, args.quiet) as terminal:
        return _train(config, terminal)


def _let_megatron_check(config: RunConfig, processes: int) -> None:
    """Megatron's own validation of its arguments, here rather than on every rank. ValueError: what it asserts."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_xact.pretraining import platform

    words, given = _words(config, platform.prepare(config), None), sys.argv
    try:
        sys.argv = ["xact pretrain", *words]
        args = parse_args()
    finally:
        sys.argv = given
    args.world_size = processes
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            validate_args(args)
    except AssertionError as error:
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """In one line; many of Megatron's assertions have no words of their own."""
    if str(error):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"Megatron refuses these arguments: {where.line} ({Path(where.filename).name}, line {where.lineno})"


def _start_ranks(processes: int) -> None:
    """Replace this process by torchrun with the same command line, which comes back here once per rank."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.execv(sys.executable, [sys.executable, *launcher, "-m", "megatron_xact", *sys.argv[1:]])


def _be_the_only_rank() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


@contextlib.contextmanager
def _output(config: RunConfig, quiet: bool):
    """The stream where people look. With `quiet`, everything else that this rank prints goes to a file."""
    if not quiet:
        yield sys.stderr
        return
    if "save" not in config.megatron:
        raise ValueError("--quiet keeps Megatron's output in the run's folder: set save in [checkpoint]")
    logs = Path(config.megatron["save"]) / "logs"
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    keep = tuple(os.dup(fd) for fd in (1, 2))
    logs.mkdir(parents=True, exist_ok=True)
    log = open(logs / f"rank{os.environ['RANK']}.log", "a", buffering=1)
    sys.stdout.flush()
    for fd in (1, 2):
        os.dup2(log.fileno(), fd)
    try:
        yield terminal
    except BaseException as error:
        if not isinstance(error, (SystemExit, ValueError, OSError)):  # the user's errors are told in one line
            traceback.print_exc()
            print(f"xact: rank {os.environ['RANK']} stopped; its output is in {log.name}", file=terminal)
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, was in zip((1, 2), keep, strict=True):
            os.dup2(was, fd)
        log.close()


def _train(config: RunConfig, terminal: TextIO) -> int:
    from megatron_xact.pretraining import platform

    run_folder = Path(config.megatron["save"]) if "save" in config.megatron else None
    try:
        validate(config)
        words = _words(config, platform.prepare(config), run_folder)
        args, container, monitor = _set_up(config, words, run_folder, terminal)
    except (AssertionError, ValueError, OSError) as error:
        if os.environ["RANK"] != "0":
            raise SystemExit(2) from None  # every rank fails alike; one of them says so
        raise ValueError(_reason(error)) from error

    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_xact.pretraining import gpt
    from megatron_xact.pretraining.guards import ReplicaMismatch

    if args.rank == 0 and run_folder is not None:
        run_folder.mkdir(parents=True, exist_ok=True)
        (run_folder / "config.toml").write_text(config.dump())
    try:
        pretrain(
            container,
            gpt.datasets_provider,
            ModelType.encoder_or_decoder,
            monitor.watch_loss(gpt.forward_step),
            get_embedding_ranks=gpt.embedding_ranks,
        )
        monitor.close()
        _tell_results(args, config, monitor, run_folder, terminal)
    except ReplicaMismatch as error:
        print(f"xact: error: {error}", file=terminal)
        return 1
    except (ValueError, OSError) as error:
        raise RuntimeError("training stopped by an unexpected error") from error  # not the user's: show the traceback
    torch.distributed.destroy_process_group()
    return 0


def _words(config: RunConfig, added: dict, run_folder: Path | None) -> list[str]:
    from megatron_xact.pretraining import arguments

    if run_folder is not None and "tensorboard-dir" not in config.megatron:
        added["tensorboard-dir"] = str(run_folder / "tensorboard")
    # Megatron's fused bias+activation paths know its own activations only; ours does not go through them.
    added |= {"no-bias-gelu-fusion": True, "no-bias-swiglu-fusion": True}
    return config.arguments() + [word for key, value in added.items() for word in arguments.find(key)[0].tokens(value)]


def _set_up(config: RunConfig, words: list[str], run_folder: Path | None, terminal: TextIO):
    """Megatron's arguments, checked and made global; its config container with our spec and hooks; the monitor."""
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_xact.layers.specs import decoder_block
    from megatron_xact.pretraining.monitor import Monitor
    from megatron_xact.pretraining.optimizer_policy import apply_policy, make_16_bit_runs_savable

    if config.xact.sample_tokens and config.megatron.get("pipeline-model-parallel-size", 1) > 1:
        raise ValueError("sample-tokens needs pipeline-model-parallel-size = 1: set sample-tokens = 0 in [xact]")
    sys.argv = ["xact pretrain", *words]
    args = parse_and_validate_args()
    # Saved with every checkpoint, so that one can tell what its alphas belong to.
    args.xact_activation = config.activation.identity()
    model = gpt_config_from_args(args)
    model.rope_scaling_factor = args.rope_scaling_factor  # which Megatron 0.19 forgets to pass on
    model.transformer_layer_spec = partial(decoder_block, activation=config.activation.record())
    monitor = Monitor(run_folder, terminal, config.xact.guard_interval, config.xact.telemetry_interval)

    def attach(chunks: list) -> list:
        monitor.model = chunks
        apply_policy(monitor.activation_parameters(), config.activation.lr_mult, config.activation.weight_decay)
        make_16_bit_runs_savable(chunks)
        return chunks

    model.post_wrap_hooks.append(attach)
    model.transformer.finalize_model_grads_func = monitor.finalize_model_grads
    return args, pretrain_cfg_container_from_args(args, model), monitor


def _tell_results(args, config: RunConfig, monitor, run_folder: Path | None, terminal: TextIO) -> None:
    """After training: a sample on request, then plots and perplexities by the last rank, which has the loggers."""
    from megatron.training import get_tensorboard_writer, get_tokenizer

    from megatron_xact.pretraining import report
    from megatron_xact.pretraining.sample import generate

    text = None
    if config.xact.sample_tokens:
        text = generate(
            monitor.model[0], get_tokenizer(), config.xact.sample_prompt, config.xact.sample_tokens, args.seq_length
        )
    if args.rank != args.world_size - 1:
        return
    lines = []
    if run_folder is not None:
        if writer := get_tensorboard_writer():
            writer.flush()
        results = report.read(run_folder, _unigram_loss(args))
        plots = []
        if results.loss:
            plots = report.plot(results, run_folder / "plots")
            (run_folder / "report.json").write_text(json.dumps(report.figures(results), indent=1) + "\n")
        lines += [report.summary(results), *(f"plot         {path}" for path in plots)]
        lines += [f"checkpoints  {run_folder}", f"config       {run_folder / 'config.toml'}"]
    if text is not None:
        lines += ["", "sample:", text]
    print("\n".join(lines), file=terminal, flush=True)


def _unigram_loss(args) -> float | None:
    """Of the validation data, in nats per token, where `xact data` made it and measured it."""
    from megatron_xact.pretraining.data import manifest

    folder = Path(args.valid_data_path[0]).parent if args.valid_data_path else None
    if folder is None or not (folder / manifest.NAME).is_file():
        return None
    return manifest.load(folder).unigram_nats
