"""Stand-ins in torch for what TransformerEngine's compiled extension does here: multiply, quantize, normalize.

Written from TE's C++ sources, so that its Python layer, unchanged, can be run and compared on a machine without a GPU.
"""

import torch

BLOCK = 128


class Counter:
    """How often TE quantized something itself, by shape."""

    def __init__(self):
        self.shapes: list[tuple[int, ...]] = []


def general_gemm(a, b, out_dtype=None, layout="TN", out=None, accumulate=False, bias=None, **kwargs):
    """As `transformer_engine.pytorch.cpp_extensions.general_gemm`: column-major, so b comes first in a product of rows.

    Of quantized operands the copy is read that Hopper's FP8 products read: inner dimension contiguous.
    """
    assert kwargs.get("quantization_params") is None, "no stand-in for a product with quantized output"
    assert {kwargs.get("alpha"), kwargs.get("beta")} <= {None, 1.0}, "no stand-in for a scaled product"
    first, second = operand(a, columns=layout[0] == "N"), operand(b, columns=layout[1] == "T")
    first = first.reshape(-1, first.shape[-1])
    if layout == "TN":
        result = (second.reshape(-1, second.shape[-1]) @ first.T).view(*second.shape[:-1], -1)
    elif layout == "NN":
        result = (second.reshape(-1, second.shape[-1]) @ first).view(*second.shape[:-1], -1)
    else:
        result = second.reshape(-1, second.shape[-1]).T @ first
    result = result if bias is None else result + bias
    result = result.to(out_dtype)
    if out is not None:
        result = out.add_(result) if accumulate else out.copy_(result)
    return result, None, None, None


def operand(tensor, columns: bool) -> torch.Tensor:
    """In fp32 (fp64 if it is); of quantized tensors only the copy that is asked for counts."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    return decoded(tensor, columns)


def decoded(tensor, columns: bool) -> torch.Tensor:
    """What one copy of one of TE's FP8 tensors says, in fp32, by the layouts that TE documents; logical shape."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    dtype = TE_DType_To_Torch[tensor._fp8_dtype]
    if hasattr(tensor, "_scale_inv"):
        data = tensor._transpose if columns else tensor._data
        value = data.view(dtype).float() * tensor._scale_inv
    else:
        data = tensor._columnwise_data if columns else tensor._rowwise_data
        scale = tensor._columnwise_scale_inv if columns else tensor._rowwise_scale_inv
        value = data.view(dtype).float()
        matrix = value.view(value.shape[0], -1) if columns else value.view(-1, value.shape[-1])
        if tensor._is_2D_scaled:
            factors = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        else:
            factors = scale.T.repeat_interleave(BLOCK, 1)
        value = (matrix * factors[: matrix.shape[0], : matrix.shape[1]]).view(value.shape)
    return value.movedim(0, -1) if columns else value


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, margin, zero_centered):
    """As `transformer_engine_torch.rmsnorm_fwd`: (y, None, 1 / RMS of every row)."""
    assert quantizer is None and out is None and not zero_centered, "no stand-in for such a norm"
    scale = torch.rsqrt(x.float().square().mean(-1) + eps)
    return (x.float() * scale[:, None] * weight.float()).to(x.dtype), None, scale


def rmsnorm_bwd(dy, x, scale, weight, margin, zero_centered):
    """As `transformer_engine_torch.rmsnorm_bwd`: (dx, dweight)."""
    unit, dunit = x.float() * scale[:, None], dy.float() * weight.float()
    dx = scale[:, None] * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * unit).sum(0).to(weight.dtype)


class Quantize:
    """As `transformer_engine_torch.quantize(tensor, quantizer)`, for the FP8 quantizers."""

    def __init__(self, counter: Counter):
        self.counter = counter

    def __call__(self, tensor, quantizer, output=None, noop=None):
        from transformer_engine.pytorch.constants import TE_DType_To_Torch

        self.counter.shapes.append(tuple(tensor.shape))
        dtype = TE_DType_To_Torch[quantizer.dtype]
        matrix = tensor.detach().float().reshape(-1, tensor.shape[-1])
        kind = type(quantizer).__name__
        if kind == "Float8BlockQuantizer":
            return self.blockwise(tensor, matrix, quantizer, dtype)
        amax = matrix.abs().max().reshape(1)
        if kind == "Float8Quantizer":
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
            scale = quantizer.scale.reshape(1)
        else:
            scale = scale_of(amax, quantizer, dtype)
        q = cast(matrix * scale, dtype)
        from transformer_engine.pytorch.tensor.storage import float8_tensor_storage

        rows, columns = quantizer.rowwise_usage, quantizer.columnwise_usage
        return float8_tensor_storage.Float8TensorStorage(
            data=q.view(tensor.shape) if rows else None,
            data_transpose=q.T.contiguous().view(tensor.shape[-1], *tensor.shape[:-1]) if columns else None,
            fp8_scale_inv=1 / scale,
            fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
            fake_dtype=tensor.dtype,
        )

    def blockwise(self, tensor, matrix, quantizer, dtype):
        from transformer_engine.pytorch.tensor.storage import float8_blockwise_tensor_storage

        square = quantizer.block_scaling_dim == 2

        def copy(matrix, shape):
            height = BLOCK if square else 1
            tiles = matrix.view(matrix.shape[0] // height, height, matrix.shape[1] // BLOCK, BLOCK)
            scale = scale_of(tiles.abs().amax((1, 3)), quantizer, dtype)
            q = cast(tiles * scale[:, None, :, None], dtype).view(shape)
            return q, (1 / scale if square else (1 / scale).T).contiguous()  # sizes here need no padding to 4

        rows = copy(matrix, tensor.shape) if quantizer.rowwise_usage else (None, None)
        columns = (None, None)
        if quantizer.columnwise_usage:
            columns = copy(matrix.T.contiguous(), (tensor.shape[-1], *tensor.shape[:-1]))
        return float8_blockwise_tensor_storage.Float8BlockwiseQTensorStorage(
            rowwise_data=rows[0],
            rowwise_scale_inv=rows[1],
            columnwise_data=columns[0],
            columnwise_scale_inv=columns[1],
            fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
            is_2D_scaled=square,
            fake_dtype=tensor.dtype,
        )


def scale_of(amax, quantizer, dtype) -> torch.Tensor:
    """TE's compute_scale_from_amax."""
    scale = torch.finfo(dtype).max / amax.clamp(min=quantizer.amax_epsilon)
    if quantizer.force_pow_2_scales:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return torch.where(amax > 0, scale, 1.0)


def cast(value, dtype) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    return value.clamp(-largest, largest).to(dtype).view(torch.uint8)
