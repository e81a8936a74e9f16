"""`xact pretrain`: a config becomes Megatron's arguments, and Megatron's own trainer runs them.

Started by hand it checks the config and becomes the supervisor that starts one process per rank through torchrun (a
single process trains by itself); started by torchrun, by srun for a supervisor, or by anything else that sets RANK and
WORLD_SIZE, it is one of the ranks. What a run writes lies in its `save` folder:

    iter_*/, latest_checkpointed_iteration.txt   Megatron's distributed checkpoints, with checksums (integrity.json)
    branches/step-S+N/                           cooldowns that left this run (--branch-from S --cooldown-steps N)
    config.toml                                  the resolved config: `xact pretrain` runs it again, or resumes
    progress.jsonl, alphas.jsonl                 loss and speed, every layer's activation parameters
    statistics.jsonl                             every layer's sparsity and outliers
    report.json, plots/, tensorboard/            the result in numbers and pictures; Megatron's scalars and ours
    failures.jsonl, requeue                      what failed and what was done; there after a signal: saved, to go on
    logs/                                        each rank's last word and, after a hang or crash, its stacks; with
                                                 --quiet, what it printed
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from megatron_xact.pretraining import arguments, exits, failures, launchers, signals, status, supervisor
from megatron_xact.pretraining import config as config_file
from megatron_xact.pretraining.arguments import Value
from megatron_xact.pretraining.checks import validate
from megatron_xact.pretraining.config import RunConfig
from megatron_xact.pretraining.launchers import Plan
from megatron_xact.pretraining.taking import Taken, taking
from megatron_xact.pretraining.watchdog import PATIENCE, Watchdog
from megatron_xact.whole import write_text

if TYPE_CHECKING:
    from megatron_xact.pretraining.checkpointing.choice import Ranks
    from megatron_xact.pretraining.monitor import Monitor


def main(args: argparse.Namespace) -> int:
    """The subcommand. Raises ValueError or OSError, before anything is written, for what cannot run here."""
    # One queue of work per GPU, for Megatron's overlap of tensor-parallel communication. CUDA reads it when it starts,
    # which importing TransformerEngine may make it do.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    config = _asked_for(args)
    if args.print_args:
        print(shlex.join(config.arguments()))
        return 0
    if "RANK" not in os.environ:
        plan = _plan(config, args)
        if signals.received():
            print(f"xact: ended by {signals.received()} before anything was started", file=sys.stderr)
            return exits.PREEMPTED
        if args.launch_plan:
            print(plan.dump())
            return 0
        if len(plan.ranks) > 1:
            # A thread per core in all, of those that are ours to use (a job's or a container's cpuset may be a few of
            # the machine's): ranks that each take every core would only wait for each other.
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // plan.per_node)))
            supervisor.replace_this_process(plan, args.node_rank, args.rendezvous)
        try:
            with taking(plan.folder):
                _be_the_only_rank()
                return _rank(config, args.quiet)
        except Taken as error:
            print(f"xact: error: {error}", file=sys.stderr)
            return exits.TAKEN
    return _rank(config, args.quiet)


def _rank(config: RunConfig, quiet: bool) -> int:
    """Train, as one of the ranks; the exit code."""
    signals.hold_in_rank(config.launch.signal)
    run_folder = Path(config.megatron["save"]) if "save" in config.megatron else None
    try:
        with _output(config, quiet) as terminal:
            rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            with Watchdog(run_folder, rank, ranks, config.launch.hang_timeout, terminal) as watchdog:
                return _train(config, run_folder, watchdog, terminal)
    except KeyboardInterrupt:
        if "XACT_ATTEMPT" not in os.environ:  # a rank's launcher says so
            print(status.interrupted(run_folder), file=sys.stderr)
        return exits.INTERRUPTED


def _asked_for(args: argparse.Namespace) -> RunConfig:
    """The config with the command line's overrides, or the branch of that run that the command line asks for."""
    config = config_file.load(args.config)
    if args.branch_from is None and args.cooldown_steps is None:
        return config.with_overrides(args.overrides, args.set)
    from megatron_xact.pretraining.branch import branch_of

    if args.branch_from is None or args.cooldown_steps is None:
        raise ValueError("--branch-from STEP and --cooldown-steps N belong together: one of them is missing")
    return branch_of(config, args.overrides, args.set, args.branch_from, args.cooldown_steps)


def _plan(config: RunConfig, args: argparse.Namespace) -> Plan:
    """What a launcher must know, of a config that can run on these machines."""
    from megatron_xact.pretraining.platform import default_processes

    per_node = args.nproc_per_node or default_processes(config)
    if per_node < 1 or args.nnodes < 1:
        raise ValueError(f"--nproc-per-node {per_node} and --nnodes {args.nnodes} must be at least 1")
    if not 0 <= args.node_rank < args.nnodes:
        raise ValueError(f"--node-rank {args.node_rank} must be from 0 to {args.nnodes - 1}: --nnodes is {args.nnodes}")
    if args.nnodes > 1 and not args.launch_plan:
        if not args.rendezvous:
            raise ValueError("--nnodes needs --rendezvous HOST:PORT, an address and a free port of machine number 0")
        if "save" not in config.megatron:
            raise ValueError("--nnodes needs a run folder that all machines see: set save in [checkpoint]")
    plan = Plan(
        words=args.words,
        run=str(Path(config.megatron["save"]).absolute()) if "save" in config.megatron else None,
        nodes=args.nnodes,
        per_node=per_node,
        signal=config.launch.signal,
        max_restarts=config.launch.max_restarts,
        on_failure=config.launch.on_failure,
        on_nan=config.launch.on_nan,
    )
    validate(config, len(plan.ranks))
    _let_megatron_check(config, len(plan.ranks))
    return plan


def _let_megatron_check(config: RunConfig, processes: int) -> None:
    """Megatron's own validation of its arguments, here rather than on every rank. ValueError: what it asserts."""
    from megatron.training.arguments import parse_args

    from megatron_xact.pretraining import platform

    words, given = _words(config, platform.prepare(config), None), sys.argv
    try:
        sys.argv = ["xact pretrain", *words]
        args = parse_args()
    finally:
        sys.argv = given
    args.world_size = processes
    arguments.fill_in(args)


def _be_the_only_rank() -> None:
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(launchers.free_port()),
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
    log = open(logs / f"rank{os.environ['RANK']}.log", "a", buffering=1, encoding="utf-8")
    sys.stdout.flush()
    for fd in (1, 2):
        os.dup2(log.fileno(), fd)
    try:
        yield terminal
    except BaseException as error:
        # The user's errors, and Ctrl-C, are told in one line.
        if not isinstance(error, (SystemExit, ValueError, OSError, KeyboardInterrupt)):
            with contextlib.suppress(OSError):  # the log's disk may be full
                traceback.print_exc()
            if "XACT_ATTEMPT" in os.environ:  # the launcher tells it, of the rank that failed first
                raise SystemExit(exits.FAILED) from None
            print(f"xact: rank {os.environ['RANK']} stopped; its output is in {log.name}", file=terminal)
        raise
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        for fd, was in zip((1, 2), keep, strict=True):
            os.dup2(was, fd)
        log.close()


def _train(config: RunConfig, run_folder: Path | None, watchdog: Watchdog, terminal: TextIO) -> int:
    """Set up, train and tell the results; the exit code. ValueError: the user's, told in one line by the first rank."""
    from megatron_xact.pretraining import platform
    from megatron_xact.pretraining.checkpointing.choice import Ranks

    try:
        validate(config)
        for_platform = platform.prepare(config)
        ranks = Ranks()
        platform.refuse_a_node_without_gpus(ranks)
        words = _words(config, for_platform, run_folder) + _choose_checkpoint(config, ranks, terminal)
        args, container, monitor, keeper, stop = _set_up(config, words, run_folder, terminal, watchdog.progress)
    except (AssertionError, ValueError, OSError) as error:
        if failures.is_unreachable(error):  # not the user's
            raise RuntimeError("a file system or a host could not be reached") from error
        _refuse(arguments.refusal(error), error, watchdog)

    import torch
    from torch.distributed.checkpoint import CheckpointException

    from megatron_xact.layers.coverage import Unsupported

    if args.rank == 0 and run_folder is not None:
        run_folder.mkdir(parents=True, exist_ok=True)
        write_text(run_folder / "config.toml", config.dump())
    try:
        _pretrain(config, container, stop.notice_before, monitor.watch_loss, ranks)
        stop.leave_if_broken_off()
        monitor.close()
        _tell_results(args, config, monitor, run_folder, terminal)
    except SystemExit as ending:  # Megatron's loop ended early
        if ending.code:
            return _fail(watchdog, terminal, *failures.of_megatrons_exit(ending.code))
        monitor.close_bar()
        if _is_to_go_on(args, run_folder, watchdog, terminal) and args.world_size == 1 and not watchdog.supervised:
            return exits.PREEMPTED
    except Unsupported as error:  # what the layers find when they are built
        _refuse(str(error), error, watchdog)
    except (Exception, CheckpointException) as error:
        if diagnosis := _diagnosis(error, args, run_folder):
            return _fail(watchdog, terminal, *diagnosis)
        if isinstance(error, (ValueError, OSError)):  # not the user's here: show the traceback
            raise RuntimeError("training stopped by an unexpected error") from error
        raise
    finally:
        if keeper is not None:
            keeper.close()
    torch.distributed.destroy_process_group()
    return 0


def _refuse(reason: str, error: Exception, watchdog: Watchdog) -> NoReturn:
    """ValueError on the first rank. Mostly all ranks fail alike, so the others leave it to that one or the launcher."""
    if watchdog.status.rank != 0:
        watchdog.end("user", reason)
        raise SystemExit(exits.USER_ERROR) from None
    raise ValueError(reason) from error


def _diagnosis(error: BaseException, args: argparse.Namespace, run_folder: Path | None) -> tuple[str, str, bool] | None:
    """(kind, reason, says) for `_fail`, of an error in training that one line explains; None: a traceback must."""
    from megatron.core import mpu
    from torch.distributed.checkpoint import CheckpointException

    from megatron_xact.pretraining.checkpointing.space import NoSpace, is_unwritable, why_not_written
    from megatron_xact.pretraining.guards import ReplicaMismatch

    first = args.rank == 0  # says what every rank meets alike
    if isinstance(error, ReplicaMismatch):  # all ranks of its tensor-parallel group say the same
        return "replicas", str(error), mpu.get_tensor_model_parallel_rank() == 0 or run_folder is not None
    if isinstance(error, NoSpace):
        return "error", str(error), first
    if isinstance(error, CheckpointException):
        return "error", why_not_written(error, run_folder), first
    if is_unwritable(error):
        return "error", why_not_written(error, run_folder), True
    if isinstance(error, RuntimeError):
        kind, reason = failures.of_exception(error)
        return (kind, reason, True) if kind == "nan" else None
    if isinstance(error, AssertionError) and args.fp16:
        if traceback.extract_tb(error.__traceback__)[-1].line == "assert len(steps) == 1":
            reason = (
                "fp16 without an optimizer step cannot be saved, and its loss scale has had all steps skipped so far: "
                "lower initial-loss-scale, or save later"
            )
            return "error", reason, first
    return None


def _pretrain(config: RunConfig, container, notice_before: Callable, watch_loss: Callable, ranks: Ranks) -> None:
    """Megatron's `pretrain`, or ZeRO's, with our datasets and forward step. SystemExit: its loop ended early."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_xact.pretraining import gpt, stopping

    datasets = gpt.datasets_of(config.branch.data_steps) if config.branch.trunk else gpt.datasets_provider
    datasets, forward_step = stopping.unless_asked(datasets), notice_before(watch_loss(gpt.forward_step))
    if config.xact.engine == "deepspeed":
        from megatron_xact.pretraining.zero import training as zero

        zero.pretrain(config, container, datasets, forward_step, gpt.embedding_ranks, ranks.store)
    else:
        pretrain(
            container, datasets, ModelType.encoder_or_decoder, forward_step,
            get_embedding_ranks=gpt.embedding_ranks, store=ranks.store,
        )  # fmt: skip


def _is_to_go_on(args: argparse.Namespace, run_folder: Path | None, watchdog: Watchdog, terminal: TextIO) -> bool:
    """After a loop that ended early: was it for a signal? Then the first rank asks for a requeue. A collective."""
    from megatron_xact.pretraining import stopping

    signal = stopping.flag_requeue(run_folder)
    if signal and args.rank == 0 and not watchdog.supervised:
        print(f"xact: ended by {signal}; the same command goes on", file=terminal, flush=True)
    return signal is not None


def _fail(watchdog: Watchdog, terminal: TextIO, kind: str, reason: str, says: bool = True) -> int:
    """What ended this rank, told in one line, by the launcher where it can read it in a run's folder; the exit code.

    says: without such a launcher, the line is this rank's to print.
    """
    watchdog.end(kind, reason)
    if says and (not watchdog.supervised or watchdog.folder is None):
        rank = watchdog.status
        failure = failures.Failure(kind, rank.rank, rank.host, rank.step, reason)
        print(f"xact: error: {failure.line()}", file=terminal, flush=True)
        if len(watchdog.ranks) == 1 and watchdog.folder is not None:
            with contextlib.suppress(OSError):  # the disk may be full
                failures.record(watchdog.folder.parents[1], failure, "", "stopped")
    return exits.of_kind(kind)


def _choose_checkpoint(config: RunConfig, ranks: Ranks, terminal: TextIO) -> list[str]:
    """The words that make Megatron load what all ranks have agreed on; what was found is told once."""
    from megatron_xact.pretraining.checkpointing import choice

    args = arguments.parse(config.arguments())
    if args.load is None or "://" in args.load:
        return []
    chosen, lines = choice.settle(args, config.branch.start, config.xact.checksums, ranks)
    if ranks.rank == 0:
        for line in filter(None, lines):
            print(f"xact: {line}", file=terminal, flush=True)
    if chosen.step is None or args.ckpt_step is not None:
        return []
    words = ["--ckpt-step", str(chosen.step)]
    if chosen.checkpoint.parent.resolve() != Path(args.load).resolve():  # a branch leaves its trunk, and its schedule
        words += ["--load", str(chosen.checkpoint.parent), "--override-opt-param-scheduler"]
    return words


def _words(config: RunConfig, for_platform: dict[str, Value], run_folder: Path | None) -> list[str]:
    """Megatron's command line: the config's, and what this machine and this program need besides."""
    # Megatron's fused bias+activation paths know its own activations only; ours does not go through them.
    added = for_platform | {"no-bias-gelu-fusion": True, "no-bias-swiglu-fusion": True}
    if run_folder is not None and "tensorboard-dir" not in config.megatron:
        added["tensorboard-dir"] = str(run_folder / "tensorboard")
    if "rerun-mode" not in config.megatron:
        # Its default runs a step with a NaN again, then saves a newest checkpoint on which every resume fails.
        added["rerun-mode"] = "disabled"
    if "distributed-timeout-minutes" not in config.megatron and config.launch.hang_timeout:
        # NCCL's own time-out, 10 minutes, would end all ranks before the watchdog has named the one at fault.
        added["distributed-timeout-minutes"] = 5 + PATIENCE * config.launch.hang_timeout // 60
    return config.arguments() + arguments.command_line(added)


def _set_up(config: RunConfig, words: list[str], run_folder: Path | None, terminal: TextIO, progress: Callable):
    """Megatron's arguments, checked and made global; its config container with our spec and hooks; who hooks in."""
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_xact.kernels.backends import select_backend
    from megatron_xact.layers import fp8_mlp, fused_mlp
    from megatron_xact.layers.specs import decoder_block
    from megatron_xact.pretraining import stopping
    from megatron_xact.pretraining.checkpointing.keeper import Keeper
    from megatron_xact.pretraining.monitor import Monitor
    from megatron_xact.pretraining.optimizer_policy import apply_policy

    select_backend(config.xact.kernels)
    sys.argv = ["xact pretrain", *words]
    args = parse_and_validate_args()
    # Saved with every checkpoint, so that one can tell what its alphas belong to.
    args.xact_activation, args.xact_engine = config.activation.identity(), config.xact.engine
    model = gpt_config_from_args(args)
    model.rope_scaling_factor = args.rope_scaling_factor  # which Megatron 0.19 forgets to pass on
    fp8_mlp.select(fp8_mlp.Settings(config.fp8.smooth, config.fp8.gradients))
    fused_mlp.select(config.mlp, config.activation.record(), model.transformer)
    model.transformer_layer_spec = partial(decoder_block, activation=config.activation.record())
    intervals = config.xact.guard_interval, config.xact.telemetry_interval, config.xact.statistics_interval
    monitor = Monitor(run_folder, terminal, *intervals, progress=progress)
    stop = stopping.Stop(args, run_folder)

    by_zero = config.xact.engine == "deepspeed"
    keeper = None
    if run_folder is not None and "://" not in args.save and not args.skip_train:
        keeper = Keeper(run_folder, config.xact, terminal)

    def attach(chunks: list) -> list:
        stopping.leave_if_asked()
        monitor.model = chunks
        if keeper is not None:
            keeper.check_start(chunks)
        if not by_zero:  # ZeRO's optimizer has groups of its own
            apply_policy(monitor.activation_parameters(), config.activation.lr_mult, config.activation.weight_decay)
        return chunks

    model.post_wrap_hooks.append(attach)
    watch = keeper.watch if keeper is not None else lambda function: function
    finalize = monitor.look if by_zero else monitor.finalize_model_grads
    model.transformer.finalize_model_grads_func = stop.look_after(watch(finalize))
    return args, pretrain_cfg_container_from_args(args, model), monitor, keeper, stop


def _tell_results(
    args: argparse.Namespace, config: RunConfig, monitor: Monitor, run_folder: Path | None, terminal: TextIO
) -> None:
    """After training: a sample on request, then plots and perplexities by the last rank, which has the loggers."""
    from megatron.training import get_tensorboard_writer, get_tokenizer

    from megatron_xact.pretraining import plot, report
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
            plots = plot.draw(results, run_folder / "plots")
            write_text(run_folder / "report.json", json.dumps(report.figures(results), indent=1) + "\n")
        lines += [report.summary(results), *(f"plot         {path}" for path in plots)]
        lines += [f"checkpoints  {run_folder}", f"config       {run_folder / 'config.toml'}"]
    if text is not None:
        lines += ["", "sample:", text]
    print("\n".join(lines), file=terminal, flush=True)


def _unigram_loss(args: argparse.Namespace) -> float | None:
    """Of the validation data, in nats per token, where `xact data prepare` made it and measured it."""
    from megatron_xact.pretraining.data import manifest

    folder = Path(args.valid_data_path[0]).parent if args.valid_data_path and len(args.valid_data_path) == 1 else None
    if folder is None or not (folder / manifest.NAME).is_file():
        return None
    try:
        return manifest.load(folder).unigram_nats
    except ValueError:  # of another version: no reason to fail a run that has ended well
        return None
