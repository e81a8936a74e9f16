"""What an activation's kernels write in FP8, as TransformerEngine's quantized tensors.

Where a linear layer beside the activation computes in FP8, activation and cast are one pass over memory
(`kernels.fp8`), with one rounding where TE's two passes round twice. By kind of quantizer, as TE fills its tensors
(scales, both layouts):

    Float8Quantizer (delayed scaling)  one pass; the quantizer's amax, which sets later scales, is raised to this one's
    Float8CurrentScalingQuantizer      a pass that reads and only finds the amax, then one to quantize
    Float8BlockQuantizer (1 x 128)     one pass
    any other                          none: 16-bit results, which the linear layer quantizes itself, as it always can

The others are MXFP8 and NVFP4, 128 x 128 blocks, an amax floor (epsilon) with blocks, an amax reduced over ranks, and
whatever a newer TE brings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.tensor import Quantizer
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer, Float8BlockwiseQTensor
from transformer_engine.pytorch.tensor.float8_tensor import (
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    Float8Tensor,
)
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

from megatron_xact.activations import Activation
from megatron_xact.activations.record import Grads, Values
from megatron_xact.kernels import backends, fp8


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
