"""AdamW for a model under DeepSpeed's ZeRO and for its alphas beside it, with the interface of Megatron's optimizers.

Its state in a checkpoint is one tensor per parameter and kind, sharded as the parameter is, so that a run resumes with
any number of data-parallel ranks, another ZeRO stage and other tensor parallelism.
"""

from __future__ import annotations

import math
from argparse import Namespace

import torch
from megatron.core import mpu
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer import _get_param_groups, get_standard_config_overrides
from megatron.training.training import get_megatron_optimizer_config
from torch import Tensor

from megatron_xact.layers.activation import TrainableActivation
from megatron_xact.pretraining.config import ActivationConfig, DeepSpeedConfig
from megatron_xact.pretraining.zero.engine import ZeroModel, import_deepspeed
from megatron_xact.pretraining.zero.whole import whole

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroOptimizer:
    """Before `take_over`, an optimizer of the bare model that can only load; after it, one that steps.

    `base` is what ZeRO steps, partition by partition. `alphas` are replicated over data-parallel ranks; their gradients
    are averaged here, in fp32. Both count for the norm by which both are clipped.
    """

    is_stub_optimizer = False

    def __init__(
        self, model: torch.nn.Module, activation: ActivationConfig, settings: DeepSpeedConfig, args: Namespace
    ):
        """model: as Megatron builds it, without DDP. A collective: ranks agree on the groups."""
        kwargs = {"lr": args.lr, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps}
        kwargs["weight_decay"] = args.weight_decay
        self._max_norm = args.clip_grad
        self._model = model
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        modules = [m for m in model.modules() if isinstance(m, TrainableActivation)]
        self.alphas = [p for m in modules for p in m.raw().values() if p.requires_grad]
        mine = {id(p) for p in self.alphas}
        groups = _groups(model, mine, args)
        if settings.offload_optimizer:
            import_deepspeed()
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            self.base: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, **kwargs, adamw_mode=True)
        else:
            self.base = torch.optim.AdamW(groups, **kwargs)
        self.base.register_step_pre_hook(self._clip_partition)
        self._adam = None
        if self.alphas:
            self._adam = torch.optim.AdamW([_alpha_group(self.alphas, activation, args)], **kwargs)
        self._zero: ZeroModel | None = None
        self._loaded: dict | None = None
        self._alpha_norm = 0.0

    @property
    def param_groups(self) -> list[dict]:
        return self.base.param_groups + (self._adam.param_groups if self._adam else [])

    def take_over(self, zero: ZeroModel) -> None:
        """ZeRO has wrapped `base`: from now on this steps. A state that was loaded before goes into its partitions."""
        self._zero = zero
        self._make_state(self._loaded["step"] if self._loaded else 0)
        if self._loaded:
            for name, parameter in self.parameters:
                self._put(parameter, self._loaded["state"][name])
            self._loaded = None

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> tuple[bool, float, None]:
        """(True, gradient norm over all ranks before clipping, None). RuntimeError: the norm is not finite."""
        gradients = self._averaged_alpha_gradients()
        self._alpha_norm = float(gradients.norm())
        self._forget_powers()
        self._zero.engine.step()  # which calls _clip_partition
        norm = self._norm()
        if not (math.isfinite(norm) and self._zero.engine.was_step_applied()):  # ZeRO 3 skips such a step by itself
            raise RuntimeError("found NaN or Inf in the gradients")
        if self._adam:
            for alpha, gradient in zip(self.alphas, (gradients * self._shrinkage()).split(1), strict=True):
                alpha.grad = gradient
            self._adam.step()
            self._adam.zero_grad()
        return True, norm, None

    def _forget_powers(self) -> None:
        """Of the betas: DeepSpeed's AdamW for the host multiplies them up from step to step, in fp32, so that those of
        a resumed run would differ in the last bit. It computes them at a step that does not follow its last one, as any
        does after a step 0, of no elements.
        """
        if isinstance(self.base, torch.optim.AdamW):
            return
        group, nothing = self.base.param_groups[0], torch.empty(0)
        self.base.ds_opt_adam.adam_update(
            self.base.opt_id, 0, group["lr"], *group["betas"], group["eps"], group["weight_decay"],
            group["bias_correction"], nothing, nothing, nothing, nothing,
        )  # fmt: skip

    def _averaged_alpha_gradients(self) -> Tensor:
        """[alphas], fp32, of the mean loss over data-parallel ranks."""
        if not self.alphas:
            return torch.zeros(1)
        flat = torch.cat([alpha.grad for alpha in self.alphas])
        group = mpu.get_data_parallel_group()
        torch.distributed.all_reduce(flat, group=group)
        return flat / group.size()

    def _norm(self) -> float:
        return math.hypot(float(self._zero.engine.optimizer._global_grad_norm), self._alpha_norm)

    def _shrinkage(self) -> float:
        """What gradients are multiplied by, as Megatron does it."""
        return min(1.0, self._max_norm / (self._norm() + 1e-6)) if self._max_norm > 0 else 1.0

    @torch.no_grad()
    def _clip_partition(self, base: torch.optim.Optimizer, args, kwargs) -> None:
        """torch's hook before `base` steps, which ZeRO makes it do once for each of its flat partitions."""
        if (factor := self._shrinkage()) < 1.0:
            for group in base.param_groups:
                for flat in group["params"]:
                    if flat.grad is not None:
                        flat.grad.mul_(factor)

    def zero_grad(self) -> None:
        """DeepSpeed drops gradients when it has used them, and so does `step` with those of alphas."""

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss

    def get_loss_scale(self) -> Tensor:
        return torch.ones(1)

    def reload_model_params(self, state_dict: dict | None = None) -> None:
        """Megatron asks after it has loaded weights alone; ZeRO makes its masters from them later."""

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def sharded_state_dict(
        self, model_state: ShardedStateDict, is_loading: bool = False, metadata: dict | None = None
    ) -> ShardedStateDict:
        """{"step", "state": {parameter's name: {"exp_avg", "exp_avg_sq", "master": ShardedTensor}}}, fp32, on the host.

        A master only where the parameter is not fp32 itself. `model_state` is not used: under ZeRO 3 its tensors are
        copies, which do not tell whose they are. A collective.
        """
        with whole(p for _, p in self.parameters):
            shards = get_param_id_to_sharded_param_map(
                self._model.sharded_state_dict(metadata=metadata), [p for _, p in self.parameters]
            )
            state = {}
            for index, (name, parameter) in enumerate(self.parameters):
                values = self._empty(parameter) if is_loading else self._take(parameter)
                state[name] = {
                    kind: make_sharded_optimizer_tensor(shards[index], value, f"optimizer.deepspeed.{kind}")
                    for kind, value in values.items()
                }
        return {"step": self._steps(), "state": state}

    def load_state_dict(self, state: dict) -> None:
        """Kept until `take_over`."""
        self._loaded = state

    def _empty(self, parameter: Tensor) -> dict[str, Tensor]:
        kinds = MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, "master")
        return {kind: torch.empty(parameter.shape, dtype=torch.float32, device="cpu") for kind in kinds}

    def _take(self, parameter: Tensor) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._adam and parameter in self._adam.state:
            values = {kind: self._adam.state[parameter][kind] for kind in MOMENTS}
        else:
            values = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
        if parameter.dtype != torch.float32:
            values["master"] = safe_get_full_fp32_param(parameter)
        return {kind: value.detach().to("cpu", copy=True).reshape(parameter.shape) for kind, value in values.items()}

    def _put(self, parameter: Tensor, values: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for kind in MOMENTS:
            if self._adam and parameter in self._adam.state:
                self._adam.state[parameter][kind].copy_(values[kind])
            else:
                safe_set_full_optimizer_state(parameter, values[kind], kind)
        if "master" in values:
            safe_set_full_fp32_param(parameter, values["master"])

    def _make_state(self, step: int) -> None:
        """AdamW's own, before its first step: that is too late for what was loaded, and for DeepSpeed's map of it.

        (DeepSpeed 0.19.8 steps group by group and maps the state of all of them after the first.)
        """
        for optimizer, tensors in ((self.base, self._partitions()), (self._adam, self.alphas)):
            for tensor in tensors:
                optimizer.state[tensor] = {kind: torch.zeros_like(tensor.detach()) for kind in MOMENTS}
                # torch's keeps it in a tensor, DeepSpeed's for the host does not
                in_tensor = isinstance(optimizer, torch.optim.AdamW)
                optimizer.state[tensor]["step"] = torch.tensor(float(step)) if in_tensor else step
        if map_state := getattr(self._zero.engine.optimizer, "_lazy_init_hp_params_optimizer_state", None):  # ZeRO 1, 2
            map_state()

    def _partitions(self) -> list[Tensor]:
        """ZeRO's flat fp32 parameters on this rank."""
        zero = self._zero.engine.optimizer
        flat = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO 3
        return flat if flat is not None else zero.single_partition_of_fp32_groups

    def _steps(self) -> int:
        states = list(self.base.state.values())
        return int(states[0]["step"]) if states else 0


def _groups(model: torch.nn.Module, without: set[int], args: Namespace) -> list[dict]:
    """Megatron's parameter groups, without the parameters of these ids."""
    config, overrides = get_megatron_optimizer_config(args)
    groups = _get_param_groups([model], config, overrides or get_standard_config_overrides(config))
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in without]
    return [group for group in groups if group["params"]]


def _alpha_group(alphas: list[Tensor], activation: ActivationConfig, args: Namespace) -> dict:
    """In the words of Megatron's scheduler; `default_config`: whether it tells the run's learning rate."""
    return {
        "params": alphas,
        "max_lr": args.lr * activation.lr_mult,
        "min_lr": args.min_lr * activation.lr_mult,
        "wd_mult": activation.weight_decay,
        "default_config": False,
    }
