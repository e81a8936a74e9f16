"""An activation between TransformerEngine's modules, which hands the next linear layer its input already in FP8."""

from __future__ import annotations

import math

import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.pytorch.cpu_offload import is_cpu_offload_enabled
from transformer_engine.pytorch.distributed import is_fp8_activation_recompute_enabled
from transformer_engine.pytorch.ops._common import maybe_dequantize
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.tensor import Quantizer

from megatron_xact.activations import Activation
from megatron_xact.kernels import backends
from megatron_xact.kernels.ops import learned_of, values_of
from megatron_xact.layers.activation import TrainableActivation
from megatron_xact.layers.te.quantized import can_quantize, quantized_forward


class QuantizingActivation(TrainableActivation):
    """`TrainableActivation` in front of a `te.pytorch.Linear`, whose input it hands over in FP8 where it can.

    TE's Linear takes a quantized input as it is, and then keeps its row-wise copy until backward, one byte per element
    more than of an input it quantizes itself. The quantizer is Linear's own. So where Linear has none yet (its first
    step), runs unquantized, wants the 16-bit input for its backward pass, or may exchange its scales (delayed scaling
    under activation recomputation), its input comes in 16 bits.
    """

    def __init__(self, activation: Activation, tp_group: torch.distributed.ProcessGroup, follower: te.Linear):
        super().__init__(activation, tp_group)
        self._follower = (follower,)  # in a tuple: not a submodule of this one too

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `TrainableActivation`; y may be one of TE's quantized tensors."""
        quantizer = _input_quantizer(self._follower[0])
        columns = x.shape[-1] // (1 + self.activation.gated)
        if math.prod(x.shape) == 0 or not can_quantize(quantizer, self.activation, x, columns):
            return super().forward(x, bias)
        learned = learned_of(self.activation, self.differentiable_values())
        transposed = torch.is_grad_enabled() and self._follower[0].weight.requires_grad
        return _ToQuantized.apply(x, bias, self.activation, quantizer, transposed, *learned)


class _ToQuantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, activation: Activation, quantizer: Quantizer, transposed: bool, *learned):
        ctx.activation = activation
        ctx.save_for_backward(x, bias, *learned)
        p = values_of(activation, learned)
        return quantized_forward(
            activation, x.contiguous(), p, quantizer, bias=bias, rows=True, columns=transposed, internal=False
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, bias, *learned = ctx.saved_tensors
        dy = maybe_dequantize(dy, x.dtype)
        p = values_of(ctx.activation, learned)
        back = backends.backend_of(ctx.activation, x).backward(ctx.activation, x, p, dy, bias)
        sums = (value.reshape(1) for value in learned_of(ctx.activation, back.parameters))
        dbias = None if bias is None else back.bias.to(bias.dtype)
        return back.dx, dbias, None, None, None, *sums


def _input_quantizer(follower: te.Linear) -> Quantizer | None:
    """The quantizer with which this layer is about to quantize its input; None where it may not come quantized."""
    if not FP8GlobalStateManager.is_fp8_enabled():
        return None
    recipe, metas = FP8GlobalStateManager.get_fp8_recipe(), follower.fp8_meta
    known = follower.quantizers.get("scaling_fwd")
    differs = (
        not known
        or type(metas.get("recipe")) is not type(recipe)
        or getattr(recipe, "backward_override", None) is not None
        or getattr(follower, "te_quant_params", None) is not None  # Megatron's settings layer by layer
        or getattr(follower, "save_original_input", False)
        or getattr(follower, "fsdp_group", None) is not None
        or te_debugs()
        or is_cpu_offload_enabled()
        or (recipe.delayed() and is_fp8_activation_recompute_enabled())
    )
    return None if differs else known[0]


def te_debugs() -> bool:
    """Is TE's debugger (nvdlfw-inspect) in between? It wants to see 16-bit inputs."""
    from transformer_engine.debug.pytorch.debug_state import TEDebugState

    return bool(TEDebugState.debug_enabled)
