"""What only runs beside a GPU, on fake tensors: from an operator to the launch of its kernels.

Nothing may wait for the GPU or mix devices, results must be what torch.compile was told they are, and CUDA must be able
to take every launch; also where sizes are odd, or there is nothing to do.
"""

from __future__ import annotations

import pytest
import torch
from fake_gpu import fake_gpu, violations

from megatron_xact import activations
from megatron_xact.kernels import backends, fp8_operators, fp8_product, linear, ops, triton_fp8, triton_pointwise
from megatron_xact.kernels.backends import backend_of

DEVICE = 1
SIZES = [(2048, 512), (517, 1001), (1, 4096), (0, 256)]  # rows, columns of y
NAMES = ["xielu", "xsilu_glu2", "relu2", "swiglu"]


def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device=f"cuda:{DEVICE}")


def parameters(record) -> dict:
    return {q.symbol: empty(1, dtype=torch.float32) if q.trainable else q.init for q in record.parameters}


def described(results) -> list:
    """Of each tensor all that a compiler is told; lists and tuples are nested."""
    if isinstance(results, (list, tuple)):
        return [described(result) for result in results]
    return (results.shape, results.stride(), results.dtype, results.device) if results is not None else None


def assert_taken(launches: list, at_least: int = 1) -> None:
    assert len(launches) >= at_least and [violations(launch, DEVICE) for launch in launches] == [[]] * len(launches)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", NAMES)
def test_activations(name, arch):
    record = activations.get(name)
    with fake_gpu(arch) as launches:
        learned = ops.learned_of(record, parameters(record))
        for rows, columns in SIZES:
            width = columns * (1 + record.gated)
            for bias, scale in ((None, None), (empty(width), empty(rows, dtype=torch.float32))):
                x, dy = empty(rows, width), empty(rows, columns)
                assert backend_of(record, x) is triton_pointwise
                args = x, learned, bias, scale, record.key
                assert described(ops._forward(*args)) == described(ops._fake_forward(*args))
                assert described(ops._backward(dy, *args)) == described(ops._fake_backward(dy, *args))
        assert_taken(launches, 2 * 2 * (len(SIZES) - 1))


@pytest.mark.parametrize("name", NAMES)
def test_casts_to_fp8(name):
    record = activations.get(name)
    with fake_gpu() as launches:
        learned = ops.learned_of(record, parameters(record))
        factor = empty(1, dtype=torch.float32)
        for rows, columns in SIZES:
            width = columns * (1 + record.gated)
            x, dy, bias = empty(rows, width), empty(rows, columns), empty(width)
            multiplier = empty(columns, dtype=torch.float32)
            for scale in (factor, None) if columns % 128 == 0 else (factor,):
                for layouts in ((True, True), (False, True)):
                    given = scale, True, torch.float8_e4m3fn, *layouts, record.key
                    args = x, learned, bias, multiplier, *given
                    assert described(fp8_operators._forward(*args)) == described(fp8_operators._fake_forward(*args))
                    args = dy, x, learned, bias, *given
                    assert described(fp8_operators._backward(*args)) == described(fp8_operators._fake_backward(*args))
            for by_column in (False, True):
                args = x, learned, bias, by_column, record.key
                real = fp8_operators._forward_amax(*args)
                assert described(real) == described(fp8_operators._fake_forward_amax(*args))
            args = dy, x, learned, bias, record.key
            assert described(fp8_operators._backward_amax(*args)) == described(fp8_operators._fake_backward_amax(*args))
        assert_taken(launches, 7 * (len(SIZES) - 1))


def test_reference_kernels_rule_those_of_fp8_out():
    record = activations.get("xielu")
    with fake_gpu():
        x = empty(4, 8)
        assert fp8_operators._triton_for(record, x) is triton_fp8
        backends.select_backend("reference")
        try:
            assert fp8_operators._triton_for(record, x) is None
        finally:
            backends.select_backend("auto")


def test_fp8_products():
    with fake_gpu():
        factor = empty(1, dtype=torch.float32)
        for m, n, k in ((2048, 512, 256), (517, 512, 256), (512, 256, 517)):
            a, b = (empty(size, k, dtype=torch.float8_e4m3fn) for size in (m, n))
            for dtype in (torch.bfloat16, torch.float32):
                args = a, factor, b, factor, dtype
                assert described(fp8_product._product(*args)) == described(fp8_product._fake_product(*args))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", NAMES)
def test_matrix_products_with_their_activation(name, arch):
    record = activations.get(name)
    with fake_gpu(arch) as launches:
        p, dtype = parameters(record), torch.bfloat16
        assert linear.unavailable_reason("triton", record, dtype, torch.device("cuda", DEVICE)) is None
        for rows, hidden, columns in ((2048, 256, 512), (517, 328, 1016), (517, 333, 1001), (1, 64, 256), (0, 64, 128)):
            width = columns * (1 + record.gated)
            x, w1, w2 = empty(rows, hidden), empty(width, hidden), empty(hidden, columns)
            for bias in (None, empty(width)):
                there = linear.forward("triton", record, x, w1, p, bias, with_pre=True)
                assert there.pre_MW.shape == (rows, width) and there.y_MF.shape == (rows, columns)
                back = linear.backward("triton", record, x, w2, there.saved, p, bias)
                assert back.dpre_MW.shape == (rows, width) and back.y_MF.shape == (rows, columns)
                assert bias is None or back.bias.shape == (width,)
        assert_taken(launches, 2 * 2 * 4)
        modules = {launch.kernel.__module__.rpartition("_")[2] for launch in launches}
        assert modules == ({"hopper", "pointer"} if arch == 90 else {"pointer"})


def test_another_device_and_a_descriptor_that_cuda_refuses_are_noticed():
    record = activations.get("xielu")
    with fake_gpu() as launches:
        x, w1 = empty(64, 64), empty(128, 64)
        linear.forward("triton", record, x, w1, parameters(record))
        (launch,) = launches
        assert violations(launch, 0)[0] == "device 1 is current, not 0"
        launch.arguments["x"].base = empty(64 * 64 + 1).narrow(0, 1, 64 * 64).view(64, 64)
        assert violations(launch, DEVICE) == ["x: address"]
        launch.arguments["x"].strides = [65, 1]
        assert violations(launch, DEVICE) == ["x: address", "x: pitch"]


def test_waiting_for_the_gpu_is_noticed():
    with fake_gpu(), pytest.raises(Exception, match="item|data-dependent|_local_scalar_dense"):
        empty(1, dtype=torch.float32).item()
