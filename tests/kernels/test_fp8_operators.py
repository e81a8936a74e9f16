"""The FP8 operators as PyTorch sees them: opcheck, gradients and transforms refused, autocast, torch.compile."""

import pytest
import torch

from megatron_xact import activations
from megatron_xact.activations.baselines import IDENTITY
from megatron_xact.kernels import fp8, fp8_product
from megatron_xact.kernels.keys import key_of

E4M3, E5M2 = fp8.DTYPES
RECORDS = {"xielu": activations.get("xielu"), "swiglu": activations.get("swiglu"), "identity": IDENTITY}
SHAPES = {"ragged": (2, 75, 256), "strided": (256, 64), "a row": (1, 256), "a column": (65, 2), "nothing": (0, 256)}
SCALES = {"tensor": (torch.tensor([0.5]), False), "powers": (None, True), "any": (None, False)}
WANTED = {"both": (True, True), "rows": (True, False), "columns": (False, True)}


def given(name, shape):
    """(x, dy, learned parameters, bias, multiplier, key); "strided": column-major."""
    record, g = RECORDS[name], torch.Generator().manual_seed(1)
    x = torch.randn(SHAPES[shape], generator=g)
    x = x.T if shape == "strided" else x
    dy = torch.randn(record.output_shape(x.shape), generator=g)
    bias, multiplier = torch.randn(x.shape[-1], generator=g), torch.rand(dy.shape[-1], generator=g)
    return x, dy, [torch.full((1,), 0.7) for _ in record.trainable], bias, multiplier, key_of(record)


CASES = [(name, "ragged", scale, "both") for name in RECORDS for scale in SCALES]
CASES += [("identity", shape, scale, wanted) for shape in SHAPES for scale in ("tensor", "powers") for wanted in WANTED]


@pytest.mark.parametrize("name, shape, scale, wanted", CASES)
def test_opcheck_of_casts(name, shape, scale, wanted):
    x, dy, learned, bias, multiplier, key = given(name, shape)
    bias, multiplier = (None, None) if name == "identity" else (bias, multiplier)
    options = *SCALES[scale], E4M3, *WANTED[wanted], key
    torch.library.opcheck(torch.ops.xact.fp8_forward.default, (x, learned, bias, multiplier, *options))
    if dy.shape[-1] % 128 == 0:
        torch.library.opcheck(torch.ops.xact.fp8_backward.default, (dy, x, learned, bias, *options))


@pytest.mark.parametrize("name", RECORDS)
def test_opcheck_of_amax(name):
    x, dy, learned, bias, _, key = given(name, "ragged")
    for by_column in (False, True):
        torch.library.opcheck(torch.ops.xact.fp8_forward_amax.default, (x, learned, bias, by_column, key))
    torch.library.opcheck(torch.ops.xact.fp8_backward_amax.default, (dy, x, learned, None, key))


def test_opcheck_of_factors_and_products():
    """What opcheck finds out about a schema it cannot about inputs in FP8, which torch does not compare."""
    torch.library.opcheck(torch.ops.xact.fp8_factor.default, (torch.rand(5), E5M2, True))
    torch.library.opcheck(torch.ops.xact.fp8_smoothing.default, (torch.rand(5), torch.rand(5)))
    one = torch.ones(1)
    a, b = torch.randn(5, 16).to(E5M2), torch.randn(7, 16).to(E4M3)
    operator, before = torch.ops.xact.fp8_product.default, [t.float() for t in (a, b)]
    for dtype in (torch.bfloat16, torch.float32):
        rest = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, (a, one, b, one, dtype), test_utils=rest)
    assert all(torch.equal(t.float(), was) for t, was in zip((a, b), before, strict=True))


def calls(x, dy, p):
    """Every function of the two modules, by the name of its operator."""
    record, scaling = activations.get("xielu"), fp8.PerTensor(torch.ones(1))
    eight = fp8.quantize(x.detach(), scaling, E4M3).rows_RC
    return {
        "fp8_forward": lambda: fp8.forward(record, x, p, scaling).row_scale_inv,
        "fp8_backward": lambda: fp8.backward(record, x, p, dy, scaling).dx.amax,
        "fp8_forward_amax": lambda: fp8.forward_amax(record, x, p),
        "fp8_backward_amax": lambda: fp8.backward_amax(record, x, p, dy),
        "fp8_factor": lambda: fp8.factor(x, E4M3),
        "fp8_smoothing": lambda: fp8_product.smoothing(x, x),
        "fp8_product": lambda: fp8_product.product(eight, x.sum().reshape(1), eight, torch.ones(1), torch.float32),
    }


OPERATORS = list(calls(torch.ones(4, 16), torch.ones(4, 16), {"a_p": torch.ones(1), "a_n": torch.ones(1), "b": 0.5}))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gradient_is_refused_and_never_silently_zero(operator):
    x = torch.linspace(-2, 2, 64).reshape(4, 16).requires_grad_()
    p = {"a_p": torch.ones(1), "a_n": torch.ones(1), "b": 0.5}
    result = calls(x, torch.ones(4, 16), p)[operator]()
    with pytest.raises(NotImplementedError, match="rounding to FP8 has no derivative"):
        (result.sum() + x.sum()).backward()
    with torch.no_grad():
        assert not calls(x, torch.ones(4, 16), p)[operator]().requires_grad


@pytest.mark.parametrize("operator", OPERATORS)
def test_transforms_are_refused(operator):
    dy, p = torch.ones(4, 16), {"a_p": torch.ones(1), "a_n": torch.ones(1), "b": 0.5}
    for transform in (torch.func.vmap, torch.func.grad, torch.func.jacfwd):
        with pytest.raises(NotImplementedError, match=f"cannot transform xact::{operator}; "):
            transform(lambda x: calls(x, dy, p)[operator]().sum())(torch.ones(4, 4, 16))


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_changes_no_bit(operator):
    x, dy = torch.linspace(-2, 2, 64).reshape(4, 16), torch.linspace(1, 3, 64).reshape(4, 16)
    call = calls(x, dy, {"a_p": torch.ones(1), "a_n": torch.ones(1), "b": 0.5})[operator]
    with torch.autocast("cpu", torch.bfloat16):
        ours = call()
    plain = call()
    assert ours.dtype == plain.dtype and torch.equal(ours, plain)


@pytest.mark.parametrize("scaling", [fp8.PerTensor(torch.tensor([2.0])), fp8.Blockwise()], ids=["tensor", "blockwise"])
@pytest.mark.parametrize("wanted", WANTED)
def test_compiled_as_one_graph_with_the_bits_of_eager_code(scaling, wanted):
    """Whatever the number of rows, without another compilation."""
    record, (rows, columns), graphs = activations.get("xielu"), WANTED[wanted], []

    def count(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    def call(x, dy, a):
        p = {"a_p": a, "a_n": a, "b": 0.5}
        y = fp8.forward(record, x, p, scaling, rows=rows, columns=columns)
        back = fp8.backward(record, x, p, dy, scaling, rows=rows, columns=columns)
        results = [(q.rows_RC, q.columns_CR, q.row_scale_inv, q.column_scale_inv, q.amax) for q in (y, back.dx)]
        return results, back.parameters

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for tokens in (30, 130):
        x, dy = torch.randn(2, tokens, 200), torch.randn(2, tokens, 200)
        ours, eager = (f(x, dy, torch.ones(1)) for f in (compiled, call))
        torch.testing.assert_close(ours, eager, rtol=0.0, atol=0.0)
    (graph,) = graphs
    assert torch.ops.xact.fp8_forward.default in graph and torch.ops.xact.fp8_backward.default in graph
