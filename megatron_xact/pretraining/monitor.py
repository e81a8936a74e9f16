"""What is watched while Megatron trains: loss, speed, every layer's alphas, and the equality of replicas.

Megatron's trainer has no callbacks, but it calls `config.finalize_model_grads_func` once per step on every rank, after
the pipeline has drained, and leaves a function it finds there in place. That is where this looks, so its collectives
cannot cross those of a schedule. At that moment the parameters are those after `step` completed steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
from torch import Tensor
from tqdm import tqdm

from megatron_xact.layers.activation import TrainableActivation
from megatron_xact.pretraining.guards import check_replicas

Alphas = dict[int, dict[str, float]]  # layer (from 1) -> parameter name -> effective value


class Monitor:
    """One per rank. The last rank, where Megatron's own loggers live, is the one that shows and writes."""

    def __init__(self, folder: Path | None, terminal: TextIO, guard_interval: int, telemetry_interval: int):
        """folder: where the JSONL files go (None: nowhere); terminal: where people look; intervals in steps, 0: off."""
        self.folder = folder
        self.terminal = terminal
        self.guard_interval = guard_interval
        self.telemetry_interval = telemetry_interval
        self.model: list[torch.nn.Module] = []  # set once Megatron has built it
        self._losses: list[Tensor] = []  # [sum of losses, number of tokens], one per microbatch since the last report
        self._since: tuple[int, float] | None = None
        self._bar: tqdm | None = None
        self._alphas: Alphas = {}

    def watch_loss(self, forward_step: Callable) -> Callable:
        """`forward_step` of Megatron's contract, whose training losses are also kept here."""

        def watched(data_iterator, model):
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
        step = get_args().curr_iteration
        if self.guard_interval and step % self.guard_interval == 0:
            check_replicas(self.model, mpu.get_tensor_model_parallel_group(), step)
        if self.telemetry_interval and step % self.telemetry_interval == 0:
            self._record_alphas(step)
        self._record_loss(step + 1)

    def close(self) -> None:
        """After training: check and record the final parameters."""
        if hasattr(get_args(), "curr_iteration"):  # not when there was nothing left to train
            step = get_args().curr_iteration + 1
            check_replicas(self.model, mpu.get_tensor_model_parallel_group(), step)
            if self.telemetry_interval:
                self._record_alphas(step)
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
        scalars = {
            f"alpha/{name}/layer_{layer:03d}": value
            for layer, values in self._alphas.items()
            for name, value in values.items()
        }
        if writer := get_tensorboard_writer():
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
        if wandb := get_wandb_writer():
            wandb.log(scalars, step)

    # -- loss and speed -----------------------------------------------------------------------------------------------

    def _record_loss(self, step: int) -> None:
        args = get_args()
        now = time.perf_counter()
        if self._since is None:  # the first step pays for warm-up: it starts the clock
            self._since = (step, now)
        if step % args.log_interval and step != args.train_iters:
            return
        if mpu.is_pipeline_last_stage(ignore_virtual=True):
            total = torch.stack(self._losses).sum(0)
            torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
            if _reports():
                self._show(step, (total[0] / total[1]).item(), now)
            self._losses.clear()
        if step > self._since[0]:
            self._since = (step, now)

    def _show(self, step: int, loss: float, now: float) -> None:
        args = get_args()
        since_step, since = self._since
        tokens = (step - since_step) * args.global_batch_size * args.seq_length
        speed = tokens / (now - since) if tokens else 0.0
        self._append(
            "progress.jsonl",
            {
                "step": step,
                "loss": loss,
                "tokens_per_second": round(speed, 1),
                "tokens": step * args.global_batch_size * args.seq_length,
                "time": time.time(),
            },
        )
        told = f"loss {loss:.4f}  {speed:,.0f} tokens/s  {_alpha_range(self._alphas)}"
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
            seconds = (args.train_iters - step) * args.global_batch_size * args.seq_length / speed if speed else 0
            eta = f"  ETA {int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}" if speed else ""
            print(f"step {step}/{args.train_iters}  {told}{eta}", file=self.terminal, flush=True)
        else:
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update(step - self._bar.n)

    def _append(self, name: str, record: dict) -> None:
        if self.folder is None:
            return
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(record) + "\n")


def gather_alphas(model: list[torch.nn.Module]) -> Alphas:
    """Effective activation parameters of every layer of every pipeline stage, in layer order.

    A collective over the pipeline group; every rank gets the whole answer.
    """
    here: Alphas = {}
    for chunk in model:
        for layer in chunk.modules():
            activation = getattr(getattr(layer, "mlp", None), "activation_func", None)
            if isinstance(activation, TrainableActivation) and activation.activation.trainable:
                here[layer.layer_number] = activation.effective_values()
    group = mpu.get_pipeline_model_parallel_group()
    stages: list[Alphas] = [here] * group.size()
    if group.size() > 1:
        torch.distributed.all_gather_object(stages, here, group=group)
    return dict(sorted((layer, values) for stage in stages for layer, values in stage.items()))


def _reports() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _alpha_range(alphas: Alphas) -> str:
    names = next(iter(alphas.values()), {})
    ranges = ((name, [values[name] for values in alphas.values()]) for name in names)
    return "  ".join(f"{name} {min(v):.3f}..{max(v):.3f}" for name, v in ranges)
