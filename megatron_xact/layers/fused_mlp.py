"""fc1 -> activation -> fc2 on this rank's shards as one autograd function, so that GEMMs may compute the activation.

What Megatron's column- and row-parallel linears do around their matrix products is kept: sequences gathered and
scattered, input gradients reduced while weight gradients are computed, weight gradients added into `main_grad`. What
changes is what is saved: the input (the local part of the sequence), the pre-activation and the weights. The
activation's output, as wide as the pre-activation, is computed again while the backward pass needs its input anyway.

Used where `kernels.mlp_choice` has found a fused backend to be faster at the layer's shape, or the config names one;
else the layer takes Megatron's own way, and so does every call that this one cannot serve (see `unfit`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.utils import print_rank_0
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

from megatron_xact.activations import Activation
from megatron_xact.kernels import linear, mlp_choice
from megatron_xact.kernels.mlp_choice import Choice
from megatron_xact.kernels.mlp_timing import Shape
from megatron_xact.kernels.ops import values_of

if TYPE_CHECKING:
    from megatron_xact.layers.mlp import ActivationMLP

WAYS = (linear.UNFUSED, *linear.BACKENDS)
_DDP = "megatron.core.distributed.distributed_data_parallel"


# --- which way --------------------------------------------------------------------------------------------------------
def select(name: str, activation: Activation, config: TransformerConfig) -> None:
    """`[xact] mlp` for the whole process, before the model is built.

    ValueError: a fused backend is named that cannot run here, or that this model's layers cannot use.
    """
    mlp_choice.select_mlp(name)
    if name in linear.BACKENDS:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reasons = mlp_choice.unavailable_reasons(activation, config.params_dtype, device)
        if reason := _unfit_config(config) or reasons.get(name):
            raise ValueError(f"mlp = {name!r} in [xact] cannot run here: {reason}; use 'auto' or 'unfused'")


def backend_for(mlp: ActivationMLP, hidden_states: Tensor) -> str | None:
    """The fused backend of this call; None: Megatron's own linears.

    It is decided at a layer's first forward pass in training, which all ranks of its tensor-parallel group make
    together, and stays: other numbers of tokens, as in evaluation, go the same way. A call to a layer with hooks that
    must see what fusion does not make takes Megatron's.
    """
    if mlp.way is None and mlp.training:
        mlp.way = _decide(mlp, hidden_states)
    if mlp.way in (None, linear.UNFUSED) or _hooked(mlp):
        return None
    return mlp.way


def _decide(mlp: ActivationMLP, hidden_states: Tensor) -> str:
    named = mlp_choice.selected() if mlp_choice.selected() in linear.BACKENDS else None
    if mlp_choice.selected() == linear.UNFUSED:
        return linear.UNFUSED
    activation, device = mlp.activation_func.activation, hidden_states.device
    reasons = mlp_choice.unavailable_reasons(activation, hidden_states.dtype, device)
    unfit_ = unfit(mlp)
    if named and (reason := unfit_ or reasons.get(named)):
        raise ValueError(f"mlp = {named!r} in [xact] cannot run here: {reason}; use 'auto' or 'unfused'")
    if named:
        return _said(named, "it is named in [xact]")
    if unfit_ or device.type != "cuda":
        return _said(linear.UNFUSED, unfit_ or "fused kernels need a GPU")
    if torch.cuda.is_current_stream_capturing():
        return _said(linear.UNFUSED, "its first step is captured in a CUDA graph, where nothing can be measured")
    shape = Shape(
        tokens=hidden_states.shape[:-1].numel() * (mlp.tp_group.size() if mlp.linear_fc1.sequence_parallel else 1),
        hidden=hidden_states.shape[-1],
        ffn=mlp.linear_fc2.input_size_per_partition,
        dtype=hidden_states.dtype,
        bias=mlp.linear_fc1.bias is not None,
    )
    here = [backend for backend in linear.BACKENDS if backend not in reasons]
    found = agree(mlp.tp_group, device, here, lambda among: mlp_choice.choose(activation, shape, device, among))
    if found is None:
        why = "; ".join(f"{backend}: {reasons.get(backend, 'not on every rank')}" for backend in linear.BACKENDS)
        return _said(linear.UNFUSED, why)
    way, choice = found
    return way if choice is None else _said(way, choice.reason)


def agree(
    group: ProcessGroup, device: torch.device, here: Sequence[str], choose: Callable[[list[str]], Choice]
) -> tuple[str, Choice | None] | None:
    """One way for all ranks of `group`: the choice of its first rank among the backends that every rank has.

    A collective. here: fused backends of this rank; None if no backend is everywhere. The choice itself comes back on
    the first rank alone: two ranks that measure need not find the same, and different kernels on different ranks would
    make a run depend on noise.
    """
    has = torch.tensor([backend in here for backend in linear.BACKENDS], dtype=torch.int32, device=device)
    if group.size() > 1:
        torch.distributed.all_reduce(has, op=ReduceOp.MIN, group=group)
    among = [backend for backend, everywhere in zip(linear.BACKENDS, has.tolist(), strict=True) if everywhere]
    if not among:
        return None
    choice = choose(among) if group.rank() == 0 else None
    index = torch.tensor([WAYS.index(choice.backend) if choice else 0], dtype=torch.int32, device=device)
    if group.size() > 1:
        torch.distributed.broadcast(index, group=group, group_src=0)
    return WAYS[index.item()], choice


@functools.cache  # once, however many layers say the same
def _said(way: str, reason: str) -> str:
    print_rank_0(f"> megatron-xact: MLP {way}: {reason}")
    return way


# --- what it cannot do ------------------------------------------------------------------------------------------------
def unfit(mlp: ActivationMLP) -> str | None:
    """Why this layer cannot be fused, or None."""
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    if type(fc1) is not ColumnParallelLinear or type(fc2) is not RowParallelLinear:
        return f"its linears are {type(fc1).__name__} and {type(fc2).__name__}, not Megatron's own"
    if reason := _unfit_config(mlp.config) or _hooked(mlp):
        return reason
    if not (fc1.weight.requires_grad and fc2.weight.requires_grad):
        return "a weight is frozen"
    if fc1.explicit_expert_comm or fc1.disable_grad_reduce or fc1.gather_output:
        return "its linears communicate in a way of their own (experts, adapters)"
    if max(fc1.gtp_remat_size, fc2.gtp_remat_size) > 1 or hasattr(fc1.weight, "__fsdp_param__"):
        return "its weights are sharded over data-parallel ranks"
    return None


def _unfit_config(config: TransformerConfig) -> str | None:
    """The same, of what the model's config already tells."""
    if config.transformer_impl == "transformer_engine" and HAVE_TE and not config.use_transformer_engine_op_fuser:
        return "TransformerEngine's modules cannot be: set use-transformer-engine-op-fuser, or transformer-impl 'local'"
    for name in ("fp8", "fp4", "tp_comm_overlap", "cpu_offloading", "enable_autocast", "use_kitchen"):
        if getattr(config, name):
            return f"{name.replace('_', '-')} = {getattr(config, name)!r} needs Megatron's own way"
    return None


def _hooked(mlp: ActivationMLP) -> str | None:
    """Why hooks of somebody on the layer's parts rule fusion out, or None.

    Megatron's DDP waits in pre-hooks for parameters on their way, and forward hooks of the activation may look at its
    input and output: both are called. Others would miss what fusion does not make.
    """
    for module in (mlp.linear_fc1, mlp.activation_func, mlp.linear_fc2):
        seen = module._forward_hooks if module is not mlp.activation_func else {}
        foreign = [hook for hook in module._forward_pre_hooks.values() if getattr(hook, "__module__", "") != _DDP]
        if seen or foreign or module._backward_hooks or module._backward_pre_hooks:
            return f"{type(module).__name__} has hooks"
    return None


# --- the layer --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Call:
    """What both directions need beside tensors."""

    backend: str
    activation: Activation
    group: ProcessGroup
    sequence_parallel: bool
    accumulate: bool  # weight gradients into main_grad
    tell_hooks: Callable[[Tensor, Tensor | None, Tensor], None]


def run(mlp: ActivationMLP, hidden_states: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
    """As ActivationMLP.forward, by this backend of `kernels.linear`."""
    fc1, activation_func, fc2 = mlp.linear_fc1, mlp.activation_func, mlp.linear_fc2
    for module in (fc1, activation_func, fc2):
        for hook in module._forward_pre_hooks.values():  # DDP's, see _hooked
            hook(module, ())
    p = activation_func.differentiable_values()
    activation = activation_func.activation
    call = _Call(
        backend, activation, mlp.tp_group, fc1.sequence_parallel, fc1.gradient_accumulation_fusion,
        activation_func.tell_hooks,
    )  # fmt: skip
    learned = [p[q.symbol] for q in activation.trainable]
    out = _FusedMLP.apply(hidden_states, fc1.weight, fc1.bias, fc2.weight, call, *learned)
    if fc2.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(out, group=mlp.tp_group), fc2.bias
    return reduce_from_tensor_model_parallel_region(out, group=mlp.tp_group), fc2.bias


class _FusedMLP(torch.autograd.Function):
    """x [s, b, h] ([s/tp, b, h] under sequence parallelism) -> this rank's part of fc2's sum over ranks, [s, b, h]."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, x, w1, b1, w2, call, *learned):
        ctx.call = call
        # Not as saved tensors, for the same reason as in Megatron's linears: they are written to in between.
        ctx.main_grads = [getattr(w, "main_grad", None) if call.accumulate else None for w in (w1, w2)]
        whole = _gather(x, call)[0] if call.sequence_parallel else x
        p = values_of(call.activation, learned)
        pre, y = linear.forward(call.backend, call.activation, _rows(whole), w1, p, b1)
        call.tell_hooks(pre, b1, y)
        ctx.save_for_backward(x, pre, w1, b1, w2, *learned)
        return (y @ w2.T).view(*whole.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx, dout):
        x, pre, w1, b1, w2, *learned = ctx.saved_tensors
        call = ctx.call
        # The order of what is started here relies on CUDA_DEVICE_MAX_CONNECTIONS=1, as Megatron's linears do: a
        # collective is queued before the kernels that are to run beside it.
        whole, gathering = _gather(x, call, async_op=True) if call.sequence_parallel else (x, None)
        dout = _rows(dout)
        back = linear.backward(call.backend, call.activation, dout, w2, pre, values_of(call.activation, learned), b1)
        dpre, dp, db1 = back.dpre_MW, back.parameters, back.bias
        dw2 = _weight_gradient(w2, ctx.main_grads[1], back.y_MF, dout, call)
        del back  # y, as wide as dpre

        dx = (dpre @ w1).view(*whole.shape[:-1], -1)
        if gathering is not None:
            gathering.wait()
        dx, reducing = _start_reduction(dx, x, call)
        dw1 = _weight_gradient(w1, ctx.main_grads[0], _rows(whole), dpre, call)
        if reducing is not None:
            reducing.wait()
        db1 = None if b1 is None else db1.to(b1.dtype)
        symbols = [q.symbol for q in call.activation.trainable]
        dlearned = [dp[symbol].reshape(t.shape).to(t.dtype) for symbol, t in zip(symbols, learned, strict=True)]
        return dx, dw1, db1, dw2, None, *dlearned


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _gather(x: Tensor, call: _Call, async_op: bool = False):
    """(the whole sequence, in Megatron's buffer, which the next to gather one overwrites; the work if asynchronous)"""
    size = [x.shape[0] * call.group.size(), *x.shape[1:]]
    whole = get_global_memory_buffer().get_tensor(size, x.dtype, "mpu")
    work = torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=call.group, async_op=async_op)
    return whole, work


def _start_reduction(dx: Tensor, x: Tensor, call: _Call):
    """(x's gradient once the work is done, that work): the sum over ranks, or this rank's part of it."""
    if call.sequence_parallel:
        local = torch.empty_like(x, memory_format=torch.contiguous_format)
        return local, torch.distributed.reduce_scatter_tensor(local, dx, group=call.group, async_op=True)
    if call.group.size() > 1:
        return dx, torch.distributed.all_reduce(dx, group=call.group, async_op=True)
    return dx, None


def _weight_gradient(weight: Tensor, main_grad: Tensor | None, x: Tensor, dy: Tensor, call: _Call) -> Tensor | None:
    """dy^T x; or, added into main_grad by Megatron's kernel, what Megatron's hooks expect in its place."""
    if not call.accumulate:
        return dy.T @ x
    weight.main_grad = main_grad
    kernels = megatron_layers.fused_weight_gradient_mlp_cuda
    if main_grad.dtype == torch.float32:
        kernels.wgrad_gemm_accum_fp32(x, dy, main_grad)
    elif main_grad.dtype in (torch.float16, torch.bfloat16):
        kernels.wgrad_gemm_accum_fp16(x, dy, main_grad)
    else:
        raise RuntimeError(f"gradients in {main_grad.dtype} cannot be accumulated by Megatron's kernel")
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    # DDP's hook runs on the main backward thread only if there is a gradient; what is in this one is not looked at,
    # unless zero_out_wgrad says that somebody will add it.
    weight.grad_added_to_main_grad = True
    zero = getattr(weight, "zero_out_wgrad", False)
    if megatron_layers.HAVE_TE:
        return megatron_layers.get_dummy_wgrad(list(main_grad.shape), x.dtype, zero=zero)
    return (torch.zeros if zero else torch.empty)(main_grad.shape, dtype=x.dtype, device=x.device)
