"""An MLP's two linear layers and the activation between them as one of TransformerEngine's operations. TE >= 2.17.

In 16 or 32 bits (FP8 matrix products stay TE's), through `kernels.linear`; only what that saves is. TE's fuser
calls `fuse`, which is registered once an activation asks to be joined.
"""

from __future__ import annotations

import functools
import logging

import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.pytorch.cpu_offload import is_cpu_offload_enabled, mark_activation_offload
from transformer_engine.pytorch.distributed import gather_along_first_dim
from transformer_engine.pytorch.ops import BasicLinear, Bias, FusedOperation, FusibleOperation
from transformer_engine.pytorch.ops._common import is_quantized_tensor, maybe_dequantize
from transformer_engine.pytorch.ops.op import OperationContext
from transformer_engine.pytorch.utils import clear_tensor_data

from megatron_xact.kernels import linear
from megatron_xact.layers.te.operation import ActivationOperation, autocast_dtype

logger = logging.getLogger(__name__)

JOINT_FUSION = hasattr(te.ops, "register_forward_backward_fusion")  # TE >= 2.17


class LinearActivationLinear(FusedOperation):
    """BasicLinear, (Bias), ActivationOperation, BasicLinear: forward and backward together.

    Forward keeps fc1's input and the pre-activation; the activation's output is made again by the backward pass (or it
    is what is kept, see `linear.saves_output`). The gradients of both weights, fc1's collectives, main_grad and all
    that goes with it are BasicLinear's own.
    """

    def __init__(self, fc1: BasicLinear, bias: Bias | None, activation: ActivationOperation, fc2: BasicLinear):
        super().__init__([op for op in (fc1, bias, activation, fc2) if op is not None])

    def _parts(self) -> tuple[BasicLinear, Bias | None, ActivationOperation, BasicLinear]:
        fc1, *bias, activation, fc2 = self.basic_ops
        return fc1, bias[0] if bias else None, activation, fc2

    def fuser_forward(
        self, basic_op_ctxs: list[OperationContext], input_: Tensor, *, next_op_input_quantizer, **_
    ) -> tuple[Tensor, list[tuple]]:
        fc1, bias, activation, fc2 = self._parts()
        ctx1, ctx_act, ctx2 = basic_op_ctxs[0], basic_op_ctxs[-2], basic_op_ctxs[-1]
        dtype = autocast_dtype() or fc1.weight.dtype
        x_local, w1 = maybe_dequantize(input_, dtype), maybe_dequantize(fc1.weight, dtype)
        x = x_local
        if fc1.sequence_parallel:
            x, _ = gather_along_first_dim(x_local, fc1.tensor_parallel_group)
        bias_W = None if bias is None else bias.bias.detach()
        hooked = bool(activation._forward_hooks)
        way = activation.fused_linear
        saved, y, pre = linear.forward(
            way.backend, activation.activation,
            _matrix(x), w1, activation.detached_values(), bias_W, tile=way.forward, with_pre=hooked,
        )  # fmt: skip
        y = y.view(*x.shape[:-1], y.shape[-1])
        if hooked:
            activation.tell_hooks(pre.view(*x.shape[:-1], pre.shape[-1]), bias_W, y)
        out = fc2.op_forward(
            ctx2, y, prev_op_grad_output_quantizer=None, next_op_input_quantizer=next_op_input_quantizer
        )
        if ctx2.requires_grad:
            if is_cpu_offload_enabled():
                mark_activation_offload(x_local, saved)
            ctx1.save_for_backward(x_local if ctx1.requires_grad and fc1.weight.requires_grad else None, w1)
            ctx_act.save_for_backward(saved, bias_W, *activation.parameters())
            ctx2.save_for_backward(maybe_dequantize(fc2.weight, dtype))  # not y, which op_forward saved with it
            ctx1.dtype = dtype
        return out, [()] * len(basic_op_ctxs)

    def fuser_backward(
        self, basic_op_ctxs: list[OperationContext], grad_output: Tensor, **_
    ) -> tuple[Tensor | None, list, list[tuple]]:
        fc1, bias, activation, fc2 = self._parts()
        ctx1, ctx_act, ctx2 = basic_op_ctxs[0], basic_op_ctxs[-2], basic_op_ctxs[-1]
        x_local, w1 = ctx1.saved_tensors
        saved, bias_W, *raw = ctx_act.saved_tensors
        (w2,) = ctx2.saved_tensors
        dtype = ctx1.dtype
        dout = maybe_dequantize(grad_output, dtype)
        way = activation.fused_linear
        back = linear.backward(
            way.backend, activation.activation,
            _matrix(dout), w2, saved, activation.detached_values(raw), bias_W, tile=way.backward,
        )  # fmt: skip
        dpre, y = (t.view(*dout.shape[:-1], t.shape[-1]) for t in back[:2])
        sums, dbias = back[2:]
        del back  # and with it y, below, before fc1's gradients need memory
        if not linear.saves_output(activation.activation, dtype):
            clear_tensor_data(saved)
        _as_basic_linear(ctx2, y, None, dtype, fc2, needs_dx=False)
        _, dw2 = fc2.op_backward(ctx2, dout)
        del y
        ctx2.saved_tensors = None
        dx, dw1 = None, [None]
        if ctx1.requires_grad:
            _as_basic_linear(ctx1, x_local, w1, dtype, fc1, needs_dx=True)
            dx, dw1 = fc1.op_backward(ctx1, dpre)
        gradients = [dw1, activation.raw_gradients(sums, raw), dw2]
        if bias is not None:
            gradients.insert(1, [dbias.to(bias.bias.dtype)])
        return dx, gradients, [()] * len(basic_op_ctxs)


def _as_basic_linear(ctx: OperationContext, x, w, dtype: torch.dtype, op: BasicLinear, *, needs_dx: bool) -> None:
    """The state that BasicLinear's forward leaves for its backward, where nothing is quantized."""
    ctx.saved_tensors = (x, w)
    ctx.dtype = dtype
    ctx.input_requires_grad = needs_dx
    ctx.weight_requires_grad = op.weight.requires_grad
    ctx.with_quantized_compute = False
    ctx.backward_override = None
    ctx.input_quantizer = ctx.weight_quantizer = ctx.grad_output_quantizer = ctx.grad_input_quantizer = None


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def fuse(ops: list[FusibleOperation], *, recipe=None, **_) -> list[FusibleOperation]:
    """Replace every MLP whose activation is ours and asks for it by one operation, where nothing speaks against it."""
    fused, i = [], 0
    while i < len(ops):
        parts = _mlp_at(ops[i : i + 4])
        if parts is None or _against(*parts, recipe):
            fused.append(ops[i])
            i += 1
        else:
            fused.append(LinearActivationLinear(*parts))
            i += len(fused[-1].basic_ops)
    return fused


def _mlp_at(ops: list[FusibleOperation]) -> tuple[BasicLinear, Bias | None, ActivationOperation, BasicLinear] | None:
    """The MLP that begins here, if one does and its activation asks to be fused; ops: the next four or fewer."""
    fc1, *rest = ops
    bias = rest.pop(0) if rest and isinstance(rest[0], Bias) else None
    activation, fc2 = (*rest, None, None)[:2]
    linear_layers = isinstance(fc1, BasicLinear) and isinstance(fc2, BasicLinear)
    if not linear_layers or not isinstance(activation, ActivationOperation) or activation.fused_linear is None:
        return None
    return fc1, bias, activation, fc2


def _against(fc1: BasicLinear, bias, activation: ActivationOperation, fc2: BasicLinear, recipe) -> bool:
    """Says once why an MLP that asks to be fused is not. ValueError if the backend it names cannot run here."""
    weights = (fc1.weight, fc2.weight)
    reason = None
    if any(op._userbuffers_options is not None for op in (fc1, fc2)):
        reason = "its communication overlaps with TE's matrix products (tp-comm-overlap), which a fused one excludes"
    elif recipe is not None or any(is_quantized_tensor(weight) for weight in weights):
        reason = "it computes in FP8; activation and cast are one pass there"
    elif fc1.tensor_parallel_mode not in (None, "column") or fc2.tensor_parallel_mode is not None:
        reason = "one of its layers reduces over ranks itself; use te.ops.Linear, or BasicLinear and ReduceScatter"
    elif fc1.weight.dtype != fc2.weight.dtype:
        reason = f"its weights are {fc1.weight.dtype} and {fc2.weight.dtype}"
    if reason:
        _say_once(f"this MLP's linear layers stay TransformerEngine's: {reason}")
        return True
    backend, dtype = activation.fused_linear.backend, autocast_dtype() or fc1.weight.dtype
    why = linear.unavailable_reason(backend, activation.activation, dtype, fc1.weight.device)
    if why:
        raise ValueError(f"fused_linear = {backend!r} cannot run here: {why}; use 'unfused' or None")
    return False


@functools.cache
def _say_once(line: str) -> None:
    logger.warning(line)


@functools.cache
def register() -> None:
    """Once per process, for all: TE's registry is global, and `fuse` leaves alone what has no activation of ours."""
    if JOINT_FUSION:
        te.ops.register_forward_backward_fusion(fuse, prepend=True)
    else:
        _say_once("this MLP's linear layers stay TransformerEngine's: joining them needs TransformerEngine >= 2.17")
