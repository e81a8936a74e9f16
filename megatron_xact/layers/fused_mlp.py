"""fc1 -> activation -> fc2 on this rank's shards as one autograd function, so that GEMMs may compute the activation.

What Megatron's column- and row-parallel linears do around their matrix products is kept: sequences gathered and
scattered, input gradients reduced while weight gradients are computed, weight gradients added into `main_grad`. What
changes is what is saved: the input (the local part of the sequence), the pre-activation and the weights. The
activation's output, as wide as the pre-activation, is computed again while the backward pass needs its input anyway;
or it is saved instead, where it alone tells the slope (`linear.saves_output`).

Used where `kernels.mlp_choice` has found a fused backend to be faster at the layer's shape, or the config names one;
else the layer takes Megatron's own way, and so does every call that this one cannot serve (see `unfit`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.utils import print_rank_0
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

from megatron_xact.activations import Activation
from megatron_xact.kernels import linear, mlp_choice
from megatron_xact.kernels.linear import Way
from megatron_xact.kernels.mlp_choice import FP8, Choice
from megatron_xact.kernels.mlp_timing import Shape
from megatron_xact.kernels.ops import values_of
from megatron_xact.layers import fp8_mlp, parallel_linear
from megatron_xact.layers.parallel_linear import Call, added_to_main_grad, rows_of

if TYPE_CHECKING:
    from megatron_xact.layers.mlp import ActivationMLP

UNFUSED = Way(linear.UNFUSED)
_DDP = "megatron.core.distributed.distributed_data_parallel"


# --- which way --------------------------------------------------------------------------------------------------------
def select(name: str, activation: Activation, config: TransformerConfig) -> None:
    """`[xact] mlp` for the whole process, before the model is built.

    ValueError: one is named that cannot run here, or that this model's layers cannot use.
    """
    mlp_choice.select_mlp(name)
    if name in (FP8, *linear.BACKENDS):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reasons = mlp_choice.unavailable_reasons(activation, config.params_dtype, device)
        if reason := unfit_config(config, name) or reasons.get(name):
            raise ValueError(_cannot(name, reason))


def way_for(mlp: ActivationMLP, hidden_states: Tensor) -> Way | None:
    """The way of this call, fused or "fp8"; None: Megatron's own linears.

    It is decided at a layer's first forward pass in training, which all ranks of its tensor-parallel group make
    together, and stays: other numbers of tokens, as in evaluation, go the same way. (FP8 is no matter of speed: also
    a run that only evaluates has it.) A call to a layer with hooks that must see what fusion does not make takes
    Megatron's; such hooks that come later are to come on every rank of the group, whose collectives differ.
    """
    if mlp.way is None and (mlp.training or mlp_choice.selected() == FP8):
        mlp.way = decide(mlp, hidden_states, unfit(mlp))
    if mlp.way in (None, UNFUSED) or _hooked(mlp):
        return None
    return mlp.way


def decide(mlp: ActivationMLP, hidden_states: Tensor, unfit_: str | None) -> Way:
    """The way of this layer, of a backend of `kernels.linear` or "fp8", the same on every rank of its tensor-parallel
    group, all of which call this together. A backend that is named has its default tiles. unfit_: why it cannot be
    fused, or None.

    ValueError: a way that cannot be gone is named in [xact].
    """
    named = mlp_choice.selected() if mlp_choice.selected() in (FP8, *linear.BACKENDS) else None
    if mlp_choice.selected() == linear.UNFUSED:
        return UNFUSED
    if named == FP8 and is_first_last_bf16_layer(mlp.config, mlp.layer_number - 1):
        return _said(UNFUSED, f"layer {mlp.layer_number} is kept out of FP8")
    activation, device = mlp.activation_func.activation, hidden_states.device
    weight_1, weight_2, bias = mlp.linear_fc1.weight, mlp.linear_fc2.weight, mlp.linear_fc1.bias
    reasons = mlp_choice.unavailable_reasons(activation, weight_1.dtype, device)
    if named and (reason := unfit_ or reasons.get(named)):
        raise ValueError(_cannot(named, reason))
    if named:
        return _said(Way(named), "it is named in [xact]")
    if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
        return _said(UNFUSED, "its first step is captured in a CUDA graph, where nothing can be measured")
    shape = Shape(
        tokens=hidden_states.shape[:-1].numel() * (mlp.tp_group.size() if mlp.linear_fc1.sequence_parallel else 1),
        hidden=hidden_states.shape[-1],
        ffn=weight_2.shape[1],
        dtype=weight_1.dtype,
        bias=bias is not None and bias.numel() > 0,  # TransformerEngine's layers without one have an empty one
    )
    # none where it cannot be fused, which the other ranks then hear of: somebody may have hooks on one of them alone
    here = [] if unfit_ else [backend for backend in linear.BACKENDS if backend not in reasons]
    found = agree(mlp.tp_group, device, here, lambda among: mlp_choice.choose(activation, shape, device, among))
    if found is None:
        why = "; ".join(f"{backend}: {reasons.get(backend, 'not on every rank')}" for backend in linear.BACKENDS)
        return _said(UNFUSED, unfit_ or why)
    way, choice = found
    return way if choice is None else _said(way, choice.reason)


def agree(
    group: ProcessGroup, device: torch.device, here: Sequence[str], choose: Callable[[list[str]], Choice]
) -> tuple[Way, Choice | None] | None:
    """One way for all ranks of `group`, tiles too: the choice of its first rank among the backends every rank has.

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
    told = [choice and choice.way]
    if group.size() > 1:
        torch.distributed.broadcast_object_list(told, group=group, device=device, group_src=0)
    return told[0], choice


def _cannot(name: str, reason: str) -> str:
    others = "'unfused'" if name == FP8 else "'auto' or 'unfused'"
    return f"mlp = {name!r} in [xact] cannot run here: {reason}; use {others}"


@functools.cache  # once, however many layers say the same
def _said(way: Way, reason: str) -> Way:
    print_rank_0(f"> megatron-xact: MLP {way.backend}: {reason}")
    return way


# --- what it cannot do ------------------------------------------------------------------------------------------------
def unfit(mlp: ActivationMLP) -> str | None:
    """Why this layer cannot be fused, or None."""
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    if type(fc1) is not ColumnParallelLinear or type(fc2) is not RowParallelLinear:
        return f"its linears are {type(fc1).__name__} and {type(fc2).__name__}, not Megatron's own"
    if reason := unfit_config(mlp.config) or _hooked(mlp):
        return reason
    if not (fc1.weight.requires_grad and fc2.weight.requires_grad):
        return "a weight is frozen"
    if fc1.explicit_expert_comm or fc1.disable_grad_reduce or fc1.gather_output:
        return "its linears communicate in a way of their own (experts, adapters)"
    if max(fc1.gtp_remat_size, fc2.gtp_remat_size) > 1 or hasattr(fc1.weight, "__fsdp_param__"):
        return "its weights are sharded over data-parallel ranks"
    return None


def unfit_config(config: TransformerConfig, name: str | None = None) -> str | None:
    """The same, of what the model's config already tells; name: the way it is about, if it is a certain one."""
    uses_te = config.transformer_impl == "transformer_engine" and HAVE_TE
    if uses_te and name == FP8:
        return "TransformerEngine's layers have FP8 of their own: set fp8-format, or transformer-impl 'local'"
    if uses_te and not config.use_transformer_engine_op_fuser:
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
def run(mlp: ActivationMLP, hidden_states: Tensor, way: Way) -> tuple[Tensor, Tensor | None]:
    """As ActivationMLP.forward, this way: "fp8", or a backend of `kernels.linear`."""
    function = fp8_mlp.function() if way.backend == FP8 else functools.partial(_FusedMLP.apply, way)
    return parallel_linear.run(mlp, hidden_states, function)


class _FusedMLP(torch.autograd.Function):
    """A `parallel_linear.Function`, by `kernels.linear`."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, way, x, w1, b1, w2, call, *learned):
        ctx.way, ctx.call = way, call
        ctx.main_grads = call.main_grads(w1, w2)
        whole = call.gather(x)
        p = values_of(call.activation, learned)
        saved, y, pre = linear.forward(
            way.backend, call.activation, rows_of(whole), w1, p, b1, tile=way.forward, with_pre=call.hooked
        )
        if call.hooked:
            call.tell_hooks(pre, b1, y)
        ctx.save_for_backward(x, saved, w1, b1, w2, *learned)
        return (y @ w2.T).view(*whole.shape[:-1], w2.shape[0])

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx, dout):
        x, saved, w1, b1, w2, *learned = ctx.saved_tensors
        call = ctx.call
        whole, gathering = call.start_gathering(x)
        dout = rows_of(dout)
        p = values_of(call.activation, learned)
        back = linear.backward(ctx.way.backend, call.activation, dout, w2, saved, p, b1, tile=ctx.way.backward)
        dpre, dp, db1 = back.dpre_MW, back.parameters, back.bias
        dw2 = _weight_gradient(w2, ctx.main_grads[1], back.y_MF, dout, call)
        del back  # y, as wide as dpre

        dx = (dpre @ w1).view(whole.shape)
        if gathering is not None:
            gathering.wait()
        dx, reducing = call.start_reduction(dx, x)
        dw1 = _weight_gradient(w1, ctx.main_grads[0], rows_of(whole), dpre, call)
        if reducing is not None:
            reducing.wait()
        return None, dx, dw1, None if b1 is None else db1.to(b1.dtype), dw2, None, *call.of_learned(dp, learned)


def _weight_gradient(weight: Tensor, main_grad: Tensor | None, x: Tensor, dy: Tensor, call: Call) -> Tensor | None:
    """dy^T x; or, added into main_grad by Megatron's kernel, what Megatron's hooks expect in its place."""
    if not call.accumulate:
        return dy.T @ x
    kernels = megatron_layers.fused_weight_gradient_mlp_cuda
    if main_grad.dtype == torch.float32:
        kernels.wgrad_gemm_accum_fp32(x, dy, main_grad)
    elif main_grad.dtype in (torch.float16, torch.bfloat16):
        kernels.wgrad_gemm_accum_fp16(x, dy, main_grad)
    else:
        raise RuntimeError(f"gradients in {main_grad.dtype} cannot be accumulated by Megatron's kernel")
    return added_to_main_grad(weight, main_grad, x.dtype)
