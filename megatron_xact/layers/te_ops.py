"""TransformerEngine's side of our activations, and the only file that imports it. TE >= 2.13; the fusion >= 2.17.

`ActivationOperation` is an activation for `transformer_engine.pytorch.ops.Sequential`, beside TE's own GELU or SwiGLU.
Where the neighbouring linear layers compute in FP8, activation and cast are one pass over memory (`kernels.fp8`), with
one rounding where TE's two passes round twice. By kind of quantizer, as TE fills its tensors (scales, both layouts):

    Float8Quantizer (delayed scaling)  one pass; the quantizer's amax, which sets later scales, is raised to this one's
    Float8CurrentScalingQuantizer      a pass that reads and only finds the amax, then one to quantize
    Float8BlockQuantizer (1 x 128)     one pass
    any other                          none: 16-bit results, which the linear layer quantizes itself, as it always can

The others are MXFP8 and NVFP4, 128 x 128 blocks, an amax floor (epsilon) with blocks, an amax reduced over ranks, and
whatever a newer TE brings. A recipe's `backward_override` wants 16-bit inputs kept, so nothing is quantized early then.

`LinearActivationLinear` joins an MLP's two linear layers with the activation between them, through `kernels.linear`, in
16 or 32 bits (FP8 matrix products stay TE's). It saves the pre-activation only. TE's API says of itself that it may
change: everything here keeps to what TE's own operations do, and tests/te runs it on several versions.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.cpu_offload import is_cpu_offload_enabled, mark_activation_offload
from transformer_engine.pytorch.distributed import gather_along_first_dim, is_fp8_activation_recompute_enabled
from transformer_engine.pytorch.ops import BasicLinear, BasicOperation, Bias, FusedOperation, FusibleOperation
from transformer_engine.pytorch.ops._common import is_quantized_tensor, maybe_dequantize
from transformer_engine.pytorch.ops.op import OperationContext
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.tensor import Quantizer
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer, Float8BlockwiseQTensor
from transformer_engine.pytorch.tensor.float8_tensor import (
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    Float8Tensor,
)
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
from transformer_engine.pytorch.utils import clear_tensor_data, is_non_tn_fp8_gemm_supported

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Grads, Values
from megatron_xact.kernels import backends, fp8, linear
from megatron_xact.kernels.ops import values_of
from megatron_xact.layers.activation import TrainableActivation
from megatron_xact.layers.tensor_parallel import sum_gradients_over_tensor_parallel

logger = logging.getLogger(__name__)

JOINT_FUSION = hasattr(te.ops, "register_forward_backward_fusion")  # TE >= 2.17


# --- quantized tensors ------------------------------------------------------------------------------------------------


def can_quantize(quantizer: Quantizer | None, activation: Activation, x: Tensor, columns: int) -> bool:
    """Is there one pass for activation and this quantizer's cast? columns: last dimension of what is quantized.

    Not with `[xact] kernels = "reference"`, which asks for separate operations everywhere.
    """
    if quantizer is None or activation.eps or backends.selected() == "reference":
        return False
    if x.is_cuda and backends.triton_unavailable_reason():
        return False
    if type(quantizer) is Float8Quantizer:
        return True
    if type(quantizer) is Float8CurrentScalingQuantizer:
        # use_existing_amax: TE <= 2.16, for an amax that a kernel of TE's left in the quantizer
        return not quantizer.with_amax_reduction and not getattr(quantizer, "use_existing_amax", False)
    if type(quantizer) is Float8BlockQuantizer:
        return quantizer.block_scaling_dim == 1 and quantizer.amax_epsilon == 0.0 and columns % fp8.BLOCK == 0
    return False


def quantized_forward(
    activation: Activation,
    x: Tensor,
    p: Values,
    quantizer: Quantizer,
    *,
    bias: Tensor | None = None,
    rows: bool,
    columns: bool,
    internal: bool,
) -> Tensor | Float8TensorStorage | Float8BlockwiseQTensorStorage:
    """y = activation(x + bias) as TE's quantized tensor. x: [..., F] (gated: [..., 2F]); what `can_quantize` allows.

    rows, columns: which layouts are wanted (TE's row-wise and column-wise usage). internal: TE's bare storage, for its
    own autograd functions, instead of a tensor that autograd may see.
    """
    dtype = TE_DType_To_Torch[quantizer.dtype]
    scaling = _scaling(quantizer, dtype, lambda: fp8.forward_amax(activation, x, p, bias))
    rows, columns = _layouts(quantizer, rows, columns)
    y = fp8.forward(activation, x, p, scaling, dtype, rows=rows, columns=columns, bias=bias)
    shape = (*x.shape[:-1], x.shape[-1] // (1 + activation.gated))
    return _te_tensor(y, quantizer, shape, x, internal)


def quantized_backward(
    activation: Activation, x: Tensor, p: Values, dy: Tensor, quantizer: Quantizer
) -> tuple[Float8TensorStorage | Float8BlockwiseQTensorStorage, Grads]:
    """(dx in the layouts the quantizer is set to, sums over elements by symbol); what `can_quantize` allows."""
    dtype = TE_DType_To_Torch[quantizer.dtype]
    scaling = _scaling(quantizer, dtype, lambda: fp8.backward_amax(activation, x, p, dy))
    rows, columns = _layouts(quantizer, quantizer.rowwise_usage, quantizer.columnwise_usage)
    back = fp8.backward(activation, x, p, dy, scaling, dtype, rows=rows, columns=columns)
    return _te_tensor(back.dx, quantizer, tuple(x.shape), x, quantizer.internal), back.parameters


def _scaling(quantizer: Quantizer, dtype: torch.dtype, amax: Callable[[], Tensor]) -> fp8.Scaling:
    if isinstance(quantizer, Float8Quantizer):
        return fp8.PerTensor(quantizer.scale.reshape(1))
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        floored = amax().clamp(min=quantizer.amax_epsilon)
        return fp8.PerTensor(fp8.factor(floored, dtype, quantizer.force_pow_2_scales))
    return fp8.Blockwise(quantizer.force_pow_2_scales)


def _layouts(quantizer: Quantizer, rows: bool, columns: bool) -> tuple[bool, bool]:
    """What to fill: GPUs whose FP8 products take any layout (Blackwell) have per-tensor data row by row only."""
    if not isinstance(quantizer, Float8BlockQuantizer) and is_non_tn_fp8_gemm_supported():
        return True, False
    return rows, columns


def _te_tensor(q: fp8.Quantized, quantizer: Quantizer, shape: tuple[int, ...], like: Tensor, internal: bool):
    """Our result in TE's class, of nominal shape and of like's dtype; raises a delayed quantizer's amax."""
    if isinstance(quantizer, Float8Quantizer):
        torch.fmax(quantizer.amax, q.amax, out=quantizer.amax)
    rows, columns = _bytes(q.rows_RC, shape), _bytes(q.columns_CR, (shape[-1], *shape[:-1]))
    if isinstance(quantizer, Float8BlockQuantizer):
        storage, tensor = Float8BlockwiseQTensorStorage, Float8BlockwiseQTensor
        data = {
            "rowwise_data": rows,
            "rowwise_scale_inv": q.row_scale_inv,
            "columnwise_data": columns,
            "columnwise_scale_inv": q.column_scale_inv,
            "is_2D_scaled": False,
        }
    else:
        storage, tensor = Float8TensorStorage, Float8Tensor
        scale_inv = q.row_scale_inv if q.row_scale_inv is not None else q.column_scale_inv
        data = {"data": rows, "data_transpose": columns, "fp8_scale_inv": scale_inv}
    data |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if internal:
        return storage(fake_dtype=like.dtype, **data)
    return tensor(shape=shape, dtype=like.dtype, device=like.device, **data)


def _bytes(matrix: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return None if matrix is None else matrix.view(torch.uint8).view(shape)


# --- the operation ----------------------------------------------------------------------------------------------------


class ActivationOperation(TrainableActivation, BasicOperation):
    """A trainable activation among TE's operations: parameters, names, fp32 and checkpoints as `TrainableActivation`.

    tp_group: the ranks that hold the other slices of the ffn dimension, over which gradients of the parameters are
    summed; None where it is not sharded. fused_linear: how an MLP made of BasicLinear, (Bias), this and BasicLinear is
    run as one: "unfused" (two matrix products and our kernels, saving the pre-activation only) or a backend of
    `kernels.linear`; None leaves the linear layers to TE. fused_cast: activation and FP8 cast in one pass, or apart.
    """

    def __init__(
        self,
        activation: Activation,
        tp_group: torch.distributed.ProcessGroup | None = None,
        *,
        fused_linear: str | None = None,
        fused_cast: bool = True,
    ):
        if fused_linear not in (None, linear.UNFUSED, *linear.BACKENDS):
            choices = ", ".join(map(repr, (None, linear.UNFUSED, *linear.BACKENDS)))
            raise ValueError(f"fused_linear = {fused_linear!r} is not one of {choices}")
        super().__init__(activation, tp_group)
        self.fused_linear = fused_linear
        self.fused_cast = fused_cast
        if fused_linear is not None:
            _register_fusion()

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
        x = maybe_dequantize(input_, _autocast_dtype() or input_.dtype)
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
        symbols = [q.symbol for q in self.activation.trainable]
        partial = [sums[symbol].reshape(1).to(p[symbol].dtype) for symbol in symbols]
        return list(torch.autograd.grad([p[symbol] for symbol in symbols], leaves, partial))

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


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled() else None


def _backward_override() -> str | None:
    """What the recipe in force says about a backward pass in more bits than the forward (TE >= 2.17)."""
    if not FP8GlobalStateManager.is_fp8_enabled():
        return None
    return getattr(FP8GlobalStateManager.get_fp8_recipe(), "backward_override", None)


# --- the joint fusion -------------------------------------------------------------------------------------------------


class LinearActivationLinear(FusedOperation):
    """BasicLinear, (Bias), ActivationOperation, BasicLinear: forward and backward together.

    Forward keeps fc1's input and the pre-activation; the activation's output is made again by the backward pass. The
    gradients of both weights, fc1's collectives, main_grad and all that goes with it are BasicLinear's own.
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
        dtype = _autocast_dtype() or fc1.weight.dtype
        x_local, w1 = maybe_dequantize(input_, dtype), maybe_dequantize(fc1.weight, dtype)
        x = x_local
        if fc1.sequence_parallel:
            x, _ = gather_along_first_dim(x_local, fc1.tensor_parallel_group)
        bias_W = None if bias is None else bias.bias.detach()
        pre, y = linear.forward(
            activation.fused_linear, activation.activation, _matrix(x), w1, activation.detached_values(), bias_W
        )
        pre, y = (t.view(*x.shape[:-1], t.shape[-1]) for t in (pre, y))
        activation.tell_hooks(pre, bias_W, y)
        out = fc2.op_forward(
            ctx2, y, prev_op_grad_output_quantizer=None, next_op_input_quantizer=next_op_input_quantizer
        )
        if ctx2.requires_grad:
            if is_cpu_offload_enabled():
                mark_activation_offload(x_local, pre)
            ctx1.save_for_backward(x_local if ctx1.requires_grad and fc1.weight.requires_grad else None, w1)
            ctx_act.save_for_backward(pre, bias_W, *activation.parameters())
            ctx2.save_for_backward(maybe_dequantize(fc2.weight, dtype))  # not y, which op_forward saved with it
            ctx1.dtype = dtype
        return out, [()] * len(basic_op_ctxs)

    def fuser_backward(
        self, basic_op_ctxs: list[OperationContext], grad_output: Tensor, **_
    ) -> tuple[Tensor | None, list, list[tuple]]:
        fc1, bias, activation, fc2 = self._parts()
        ctx1, ctx_act, ctx2 = basic_op_ctxs[0], basic_op_ctxs[-2], basic_op_ctxs[-1]
        x_local, w1 = ctx1.saved_tensors
        pre, bias_W, *raw = ctx_act.saved_tensors
        (w2,) = ctx2.saved_tensors
        dtype = ctx1.dtype
        dout = maybe_dequantize(grad_output, dtype)
        back = linear.backward(
            activation.fused_linear, activation.activation,
            _matrix(dout), w2, _matrix(pre), activation.detached_values(raw), bias_W,
        )  # fmt: skip
        dpre, y = (t.view(*pre.shape[:-1], t.shape[-1]) for t in back[:2])
        sums, dbias = back[2:]
        del back  # and with it y, below, before fc1's gradients need memory
        clear_tensor_data(pre)
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
    backend, dtype = activation.fused_linear, _autocast_dtype() or fc1.weight.dtype
    why = linear.unavailable_reason(backend, activation.activation, dtype, fc1.weight.device)
    if why:
        raise ValueError(f"fused_linear = {backend!r} cannot run here: {why}; use 'unfused' or None")
    return False


@functools.cache
def _say_once(line: str) -> None:
    logger.warning(line)


@functools.cache
def _register_fusion() -> None:
    """Once per process, for all: TE's registry is global, and `fuse` leaves alone what has no activation of ours."""
    if JOINT_FUSION:
        te.ops.register_forward_backward_fusion(fuse, prepend=True)
    else:
        _say_once("this MLP's linear layers stay TransformerEngine's: joining them needs TransformerEngine >= 2.17")


# --- between TE's modules ---------------------------------------------------------------------------------------------


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
        p = self.differentiable_values()
        transposed = torch.is_grad_enabled() and self._follower[0].weight.requires_grad
        learned = [p[q.symbol] for q in self.activation.trainable]
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
        sums = (back.parameters[q.symbol].reshape(1) for q in ctx.activation.trainable)
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
