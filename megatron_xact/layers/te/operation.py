"""An activation for `transformer_engine.pytorch.ops.Sequential`, beside TE's own GELU or SwiGLU."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor
from transformer_engine.pytorch.cpu_offload import is_cpu_offload_enabled, mark_activation_offload
from transformer_engine.pytorch.ops import BasicOperation
from transformer_engine.pytorch.ops._common import maybe_dequantize
from transformer_engine.pytorch.ops.op import OperationContext
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.tensor import Quantizer
from transformer_engine.pytorch.utils import clear_tensor_data

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Grads, Values
from megatron_xact.kernels import backends, linear
from megatron_xact.kernels.linear import Way
from megatron_xact.kernels.ops import learned_of
from megatron_xact.layers.activation import TrainableActivation
from megatron_xact.layers.te.quantized import can_quantize, quantized_backward, quantized_forward
from megatron_xact.layers.tensor_parallel import sum_gradients_over_tensor_parallel


class ActivationOperation(TrainableActivation, BasicOperation):
    """A trainable activation among TE's operations: parameters, names, fp32 and checkpoints as `TrainableActivation`.

    tp_group: the ranks that hold the other slices of the ffn dimension, over which gradients of the parameters are
    summed; None where it is not sharded. fused_linear: how an MLP made of BasicLinear, (Bias), this and BasicLinear is
    run as one: "unfused" (two matrix products and our kernels, saving the pre-activation only), a backend of
    `kernels.linear`, or a `Way` of it with tiles; None leaves the linear layers to TE. fused_cast: activation and FP8
    cast in one pass, or apart.
    """

    def __init__(
        self,
        activation: Activation,
        tp_group: torch.distributed.ProcessGroup | None = None,
        *,
        fused_linear: Way | str | None = None,
        fused_cast: bool = True,
    ):
        super().__init__(activation, tp_group)
        self.fused_linear = fused_linear
        self.fused_cast = fused_cast

    @property
    def fused_linear(self) -> Way | None:
        """May be set until a pipeline that this belongs to has run: TE keeps what it has joined."""
        return self._fused_linear

    @fused_linear.setter
    def fused_linear(self, way: Way | str | None) -> None:
        way = Way(way) if isinstance(way, str) else way
        if way is not None and way.backend not in (linear.UNFUSED, *linear.BACKENDS):
            choices = ", ".join(map(repr, (None, linear.UNFUSED, *linear.BACKENDS)))
            raise ValueError(f"fused_linear = {way.backend!r} is not one of {choices}")
        self._fused_linear = way
        if way is not None:
            from megatron_xact.layers.te import joint  # which is made of this

            joint.register()

    def forward(self, x: Tensor) -> Tensor:
        """The operation on its own, as TE's are called: x as in `op_forward`."""
        with without_forward_hooks(self):  # they are called once this returns
            return BasicOperation.forward(self, x)

    # No quantizer is ours, so there is no state of one to keep in checkpoints, which other layers would not have.
    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state

    def op_forward(
        self,
        ctx: OperationContext,
        input_: Tensor,
        *,
        prev_op_grad_output_quantizer: Quantizer | None,
        next_op_input_quantizer: Quantizer | None,
    ) -> Tensor:
        """input_: [..., F] (gated: [..., 2F]), quantized or not -> [..., F], quantized if the next operation wants."""
        x = maybe_dequantize(input_, autocast_dtype() or input_.dtype)
        p = self.detached_values()
        may = self.fused_cast and _backward_override() is None
        columns = x.shape[-1] // (1 + self.activation.gated)
        if may and can_quantize(next_op_input_quantizer, self.activation, x, columns):
            quantizer = next_op_input_quantizer
            y = quantized_forward(
                self.activation, x, p, quantizer,
                rows=quantizer.rowwise_usage, columns=quantizer.columnwise_usage, internal=quantizer.internal,
            )  # fmt: skip
        else:
            y = backends.backend_of(self.activation, x).forward(self.activation, x, p).contiguous()
        self.tell_hooks(x, None, y)
        if ctx.requires_grad:
            if is_cpu_offload_enabled():
                mark_activation_offload(x)
            ctx.save_for_backward(x, *self.parameters())
            ctx.grad_input_quantizer = prev_op_grad_output_quantizer if may else None
        return y

    def op_backward(self, ctx: OperationContext, grad_output: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, *raw = ctx.saved_tensors
        dy = maybe_dequantize(grad_output, x.dtype)
        p = self.detached_values(raw)
        if can_quantize(ctx.grad_input_quantizer, self.activation, x, dy.shape[-1]):
            dx, sums = quantized_backward(self.activation, x, p, dy, ctx.grad_input_quantizer)
        else:
            back = backends.backend_of(self.activation, x).backward(self.activation, x, p, dy)
            dx, sums = back.dx.contiguous(), back.parameters
        clear_tensor_data(x)
        return dx, self.raw_gradients(sums, raw)

    @torch.no_grad()
    def detached_values(self, raw: list[Tensor] | None = None) -> Values:
        """Effective values by symbol, for a kernel."""
        return self.activation.effective(self._named(list(self.parameters()) if raw is None else raw))

    def raw_gradients(self, sums: Grads, raw: list[Tensor]) -> list[Tensor]:
        """Gradients of the parameters, in their order, from this rank's sums over elements (of effective values).

        Autograd goes back through the constraint and through the tensor-parallel rule, whose one home is elsewhere.
        """
        if not raw:
            return []
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in raw]
            p = self.activation.effective(self._named(leaves))
            if self.tp_group is not None:
                p = sum_gradients_over_tensor_parallel(p, self.tp_group)
            values = learned_of(self.activation, p)
        partial = [value.reshape(1).to(torch.float32) for value in learned_of(self.activation, sums)]
        return list(torch.autograd.grad(values, leaves, partial))

    def tell_hooks(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Also of a quantized y, which they see in x's dtype."""
        if self._forward_hooks:
            super().tell_hooks(x, bias, maybe_dequantize(y, x.dtype))

    def _named(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip((name for name, _ in self.named_parameters()), tensors, strict=True))


@contextlib.contextmanager
def without_forward_hooks(module: torch.nn.Module) -> Iterator[None]:
    """Nobody finds the module's forward hooks meanwhile."""
    hooks, module._forward_hooks = module._forward_hooks, OrderedDict()
    try:
        yield
    finally:
        module._forward_hooks = hooks


def autocast_dtype() -> torch.dtype | None:
    return torch.getautocast_dtype("cuda") if torch.is_autocast_enabled() else None


def _backward_override() -> str | None:
    """What the recipe in force says about a backward pass in more bits than the forward (TE >= 2.17).

    It wants 16-bit inputs kept, so nothing is quantized early then.
    """
    if not FP8GlobalStateManager.is_fp8_enabled():
        return None
    return getattr(FP8GlobalStateManager.get_fp8_recipe(), "backward_override", None)
