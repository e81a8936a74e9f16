"""The device functions, evaluated by Triton's interpreter, against the records in fp64.

The bound: twice the error of rounding the exact result to the output's dtype, plus 4 fp32 ulps of the formula's largest
term. What lies below the smallest normal fp32 may come out as 0. A GPU's special functions are less exact than numpy's:
test_emulated.py asks the same of what is compiled, with errors as large as a GPU's, and tools/gpu_suite.py of the GPU.
"""

import pytest
import torch
from accuracy import DTYPES, NAMES, excess, largest_term, parameters, sample, truth, ulp
from interpreter import in_interpreter

from megatron_xact import activations


@pytest.mark.parametrize("moved", [False, True], ids=["initial", "moved"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@in_interpreter
def test_value_and_derivatives(name, dtype, moved):
    from probe import evaluate

    record, x = activations.get(name), sample(DTYPES[dtype])
    p = parameters(record, moved)
    ours = evaluate(record, x, p, exact=dtype != "bf16")
    true = truth(record, x, p)
    for key in true:
        worst, at = excess(record, key, x, p, ours[key], true[key], DTYPES[dtype])
        assert worst <= 1, f"{name} {key}: {worst:.2f} x the bound, at x = {at!r}"
        if dtype == "bf16" and key == "f":
            # where terms cancel to less than fp32 can tell, as xiprelu's do at -0.625, there is no sign to get right
            told = true[key].abs() > ulp(largest_term(record, key, x.double(), p, true[key])) / 2
            wrong = x[told & (ours[key].to(torch.bfloat16).sign() != true[key].to(torch.bfloat16).sign())]
            assert not len(wrong), f"{name}: wrong sign at x = {wrong[:5].tolist()}"


@pytest.mark.parametrize("name", NAMES)
@in_interpreter
def test_limits_are_those_of_the_record(name):
    from probe import evaluate

    record = activations.get(name)
    p = parameters(record, moved=True)
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    for exact in (False, True):
        ours, true = evaluate(record, x, p, exact), truth(record, x, p)
        assert torch.allclose(ours["f"], true["f"].float(), equal_nan=True), f"{name}: {ours['f']} is not {true['f']}"
        at_0 = ours["slope"][3:].double()
        assert torch.allclose(at_0, true["slope"][3:]), f"{name}: slope at 0 is {at_0}, not {true['slope'][3:]}"


@in_interpreter
def test_the_bound_sees_what_others_get_wrong():
    """exp(x) - 1 in bf16 arithmetic (a published kernel), and in fp32: both are over it."""
    record, x = activations.get("xielu"), sample(torch.float32)
    p = parameters(record, moved=False)
    true = truth(record, x, p)["f"]
    for dtype in (torch.bfloat16, torch.float32):
        e = x.to(dtype).exp() - 1
        naive = torch.where(x > 0, 0.8 * x * x + 0.5 * x, 0.8 * (e.float() - x) + 0.5 * x)
        assert excess(record, "f", x, p, naive, true, torch.float32)[0] > 2
