"""What is watched while Megatron trains: loss, speed, layers' alphas and statistics, the equality of replicas.

Megatron's trainer has no callbacks, but it calls `config.finalize_model_grads_func` once per step on every rank, after
the pipeline has drained, and leaves a function it finds there in place. That is where this looks, so its collectives
cannot cross those of a schedule. At that moment the parameters are those after `step` completed steps.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
from torch import Tensor
from tqdm import tqdm

from megatron_xact.layers.activation import TrainableActivation
from megatron_xact.pretraining import throughput
from megatron_xact.pretraining.files import why_not
from megatron_xact.pretraining.guards import check_replicas
from megatron_xact.pretraining.statistics import Probe, Statistics, finite

Alphas = dict[int, dict[str, float]]  # layer (from 1) -> parameter name -> effective value


class Progress(NamedTuple):
    """What is shown of a step, once its update has told the gradient norm."""

    step: int
    loss: float
    speed: float | None  # tokens per second, of the whole run; None at the first record after a start
    samples: int  # sequences consumed in all, those before a resume or a branch too


class Monitor:
    """One per rank. The last rank, where Megatron's own loggers live, is the one that shows and writes."""

    def __init__(
        self,
        folder: Path | None,
        terminal: TextIO,
        guard_interval: int,
        telemetry_interval: int,
        statistics_interval: int = 0,
        progress: Callable[..., None] = lambda step=None: None,
    ):
        """folder: where the JSONL files go (None: nowhere); terminal: where people look; intervals in steps, 0: off.

        progress: told of every microbatch, and of every step with `step=` the steps completed.
        """
        self.folder = folder
        self.terminal = terminal
        self.guard_interval = guard_interval
        self.telemetry_interval = telemetry_interval
        self.statistics_interval = statistics_interval
        self.progress = progress
        self.model: list[torch.nn.Module] = []  # set once Megatron has built it
        self._losses: list[Tensor] = []  # [sum of losses, number of tokens], one per microbatch since the last report
        self._since: tuple[int, float] | None = None  # sequences consumed, time
        self._optimizer: MegatronOptimizer | None = None
        self._due: Progress | None = None  # measured, and not shown yet
        self._bar: tqdm | None = None
        self._alphas: Alphas | None = None  # the last that were looked at
        self._probe: Probe | None = None

    def watch_loss(self, forward_step: Callable) -> Callable:
        """`forward_step` of Megatron's contract, whose training losses and chosen statistics are also kept here."""

        def watched(data_iterator, model):
            self.progress()
            with self._measuring(model):
                output, loss_function = forward_step(data_iterator, model)
            return output, partial(self._keep, loss_function) if model.training else loss_function

        return watched

    def _keep(self, loss_function: Callable, output: Tensor):
        result = loss_function(output)
        self._losses.append(result[2]["lm loss"].detach())
        return result

    def finalize_model_grads(self, model: list[torch.nn.Module], *args, **kwargs) -> None:
        """Megatron's own, then a look at the model: the function for `config.finalize_model_grads_func`."""
        finalize_model_grads(model, *args, **kwargs)
        self.look(model)

    def look(self, model: list[torch.nn.Module], *args, **kwargs) -> None:
        """What is due once the gradients of a step are there: the same function where they need nothing more."""
        step = get_args().curr_iteration
        self.progress(step=step)
        if self._optimizer is None and _reports():
            self._optimizer = _watched(model, self._after_update)
        if self.guard_interval and step % self.guard_interval == 0:
            check_replicas(self.model, mpu.get_tensor_model_parallel_group(), step)
        if self.telemetry_interval and step % self.telemetry_interval == 0:
            self._record_alphas(step)
        elif self.telemetry_interval and self._alphas is None:  # to be shown until the next record, after a resume
            self._alphas = gather_alphas(self.model)
        if self._measures_at(step):
            self._record_statistics(step)
        self._record_loss(step + 1)

    def close(self) -> None:
        """After training: check and record the final parameters."""
        args = get_args()
        if not args.skip_train:
            # Where nothing was left to train, Megatron's loop has counted no step.
            step = args.curr_iteration + 1 if self._since is not None else args.iteration
            check_replicas(self.model, mpu.get_tensor_model_parallel_group(), step)
            if self.telemetry_interval:
                self._record_alphas(step)
        self.close_bar()

    def close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def activation_parameters(self) -> list[torch.nn.Parameter]:
        modules = (m for chunk in self.model for m in chunk.modules() if isinstance(m, TrainableActivation))
        return [parameter for module in modules for parameter in module.parameters()]

    # -- alphas -------------------------------------------------------------------------------------------------------

    def _record_alphas(self, step: int) -> None:
        self._alphas = gather_alphas(self.model)
        if not _reports() or not self._alphas:
            return
        self._append("alphas.jsonl", {"step": step, "alphas": self._alphas})
        _log_by_layer("alpha", self._alphas, step)

    # -- statistics ---------------------------------------------------------------------------------------------------

    def _measures_at(self, step: int) -> bool:
        """Statistics are of the last data-parallel rank's first microbatch: the loggers are on one of its ranks."""
        if not self.statistics_interval or step % self.statistics_interval:
            return False
        return mpu.get_data_parallel_rank() == mpu.get_data_parallel_world_size() - 1

    def _measuring(self, chunk: torch.nn.Module) -> contextlib.AbstractContextManager:
        """Around a microbatch's forward pass through a chunk of the model."""
        if not chunk.training or not self._measures_at(get_args().curr_iteration):
            return contextlib.nullcontext()
        if self._probe is None:
            self._probe = Probe(mpu.get_tensor_and_context_parallel_group(), mpu.get_context_parallel_group())
        return self._probe.watching(_activations_of([chunk]))

    def _record_statistics(self, step: int) -> None:
        found: Statistics = _from_all_stages(self._probe.take())
        if not _reports() or not found:  # a CUDA graph's layers are not measured
            return
        self._append("statistics.jsonl", {"step": step, "statistics": {n: finite(v) for n, v in found.items()}})
        _log_by_layer("activation", found, step)

    # -- loss and speed -----------------------------------------------------------------------------------------------

    def _record_loss(self, step: int) -> None:
        args = get_args()
        # Not step times batch: batches may vary. Megatron counts those of this step once its update is done.
        samples, now = args.consumed_train_samples + get_current_running_global_batch_size(), time.perf_counter()
        if self._since is None:  # the first step pays for warm-up: it starts the clock
            self._since = (samples, now)
        if step % args.log_interval and step != args.train_iters:
            return
        if mpu.is_pipeline_last_stage(ignore_virtual=True):
            total = torch.stack(self._losses).sum(0)
            torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
            if _reports():
                self._due = Progress(step, (total[0] / total[1]).item(), self._speed(samples, now), samples)
            self._losses.clear()
        self._since = (samples, now)

    def _speed(self, samples: int, now: float) -> float | None:
        """Tokens per second, of the whole run, since the last record; None where there is none."""
        since_samples, since = self._since
        tokens = (samples - since_samples) * get_args().seq_length
        return tokens / (now - since) if tokens else None

    def _after_update(self, grad_norm: float | None) -> None:
        if self._due is not None:
            due, self._due = self._due, None
            self._record_progress(due, grad_norm)
            self._show(due)

    def _record_progress(self, due: Progress, grad_norm: float | None) -> None:
        args = get_args()
        mfu = throughput.mfu(args, due.speed)
        self._append(
            "progress.jsonl",
            {
                "step": due.step,
                "loss": due.loss,
                "grad_norm": grad_norm,  # before clipping; null where the update was skipped
                "learning_rate": get_canonical_lr_for_logging(self._optimizer.param_groups),  # of this step's update
                "tokens_per_second": round(due.speed, 1) if due.speed else None,
                "model_flops_per_second": throughput.model_flops(args, due.speed),
                "mfu": mfu,
                "memory_bytes": throughput.memory_bytes(),  # of this rank, the last one
                "tokens": due.samples * args.seq_length,
                "time": time.time(),
            },
        )
        _log({name: value for name, value in (("tokens-per-second", due.speed), ("mfu", mfu)) if value}, due.step)

    def _show(self, due: Progress) -> None:
        """A bar on a terminal, a line per record in a log."""
        args, (step, loss, speed, _) = get_args(), due
        told = [f"loss {loss:.4f}", f"{speed:,.0f} tokens/s" if speed else "", _alpha_range(self._alphas or {})]
        told = "  ".join(filter(None, told))
        if self._bar is None:
            self._bar = tqdm(
                total=args.train_iters,
                initial=min(step, args.train_iters),
                unit="step",
                file=self.terminal,
                dynamic_ncols=True,
                disable=not self.terminal.isatty(),
            )
        if self._bar.disable:
            print(f"step {step}/{args.train_iters}  {told}{_eta(due)}", file=self.terminal, flush=True)
        else:
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update(step - self._bar.n)

    def _append(self, name: str, record: dict) -> None:
        if self.folder is None:
            return
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full or hiccuping file system must not end the training
            tqdm.write(f"xact: cannot write {self.folder / name}: {why_not(error)}", file=self.terminal)


def gather_alphas(model: list[torch.nn.Module]) -> Alphas:
    """Effective activation parameters of every layer of every pipeline stage, in layer order.

    A collective over the pipeline group; every rank gets the whole answer.
    """
    modules = _activations_of(model).items()
    alphas = {n: module.effective_values() for n, module in modules if module.activation.trainable}
    tensors = [alpha for named in alphas.values() for alpha in named.values()]
    values = iter(torch.cat(tensors).tolist() if tensors else [])  # the host waits for the device once
    return _from_all_stages({n: {name: next(values) for name in named} for n, named in alphas.items()})


def _activations_of(model: list[torch.nn.Module]) -> dict[int, TrainableActivation]:
    """This stage's activation modules by the number of their layer in the whole model, from 1."""
    here = {}
    for chunk in model:
        for layer in chunk.modules():
            activation = getattr(getattr(layer, "mlp", None), "activation_func", None)
            if isinstance(activation, TrainableActivation):
                here[layer.layer_number] = activation
    return here


def _from_all_stages(here: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    group = mpu.get_pipeline_model_parallel_group()
    stages = [here] * group.size()
    if group.size() > 1:
        torch.distributed.all_gather_object(stages, here, group=group)
    return dict(sorted((layer, values) for stage in stages for layer, values in stage.items()))


def _watched(model: list[torch.nn.Module], after_update: Callable[[float | None], None]) -> MegatronOptimizer:
    """Megatron's optimizer, which from now on also tells the gradient norm of each of its updates.

    It gives the norm to Megatron's loop alone. So `step` of this one object is replaced by one that calls it, as
    Megatron does itself for its CUDA graph of the optimizer.
    """
    optimizer = get_model_config(model[0]).grad_scale_func.__self__
    step = optimizer.step

    def watched():
        successful, grad_norm, zeros = step()
        after_update(float(grad_norm) if successful and grad_norm is not None else None)
        return successful, grad_norm, zeros

    optimizer.step = watched
    return optimizer


def _log_by_layer(kind: str, by_layer: dict[int, dict[str, float]], step: int) -> None:
    """To TensorBoard and W&B, as `kind`/name/layer_NNN."""
    scalars = {
        f"{kind}/{name}/layer_{layer:03d}": value
        for layer, values in by_layer.items()
        for name, value in values.items()
        if math.isfinite(value)
    }
    _log(scalars, step)


def _log(scalars: dict[str, float], step: int) -> None:
    if writer := get_tensorboard_writer():
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
    if (wandb := get_wandb_writer()) and wandb.run is not None:  # Megatron closes it when training ends
        wandb.log(scalars, step)


def _reports() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _eta(due: Progress) -> str:
    if not due.speed:
        return ""
    args = get_args()
    ahead = (args.train_iters - due.step) * get_current_running_global_batch_size()
    if args.train_samples is not None:
        ahead = args.train_samples - due.samples
    seconds = int(max(0, ahead) * args.seq_length / due.speed)
    return f"  ETA {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _alpha_range(alphas: Alphas) -> str:
    names = next(iter(alphas.values()), {})
    ranges = ((name, [values[name] for values in alphas.values()]) for name in names)
    return "  ".join(f"{name} {min(v):.3f}..{max(v):.3f}" for name, v in ranges)
