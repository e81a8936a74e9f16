"""Every shipped kernel, compiled for sm_80 and sm_90 without a GPU: no spills, 128-bit accesses, as few special
functions as the formula needs, ceilings on registers and shared memory. And the gate: it names planted regressions."""

import pytest
import torch
from accuracy import SERVED
from compiled import BACKWARD, FORWARD, Expectation, compile_kernel, violations
from oracles import ORACLES, oracle_of

from megatron_xact import activations

# MUFU instructions per element of y, (forward, backward), where the result is 16 bits wide.
SPECIAL_FUNCTIONS = {name: oracle.special_functions for name, oracle in ORACLES.items()}
# Instructions per element of y at most, (forward, backward). While an H200 moves the bytes of an element at 4.3 TB/s it
# issues 27 forward and 41 backward (of gated ones 41 and 69): what comes near to that is no longer bound by memory.
MOST_ISSUED = {"relu2": (7, 10), "xiprelu": (9, 23), "xielu": (17, 30), "swiglu": (18, 29), "xsilu_glu2": (20, 48)}
MAX_REGISTERS = {FORWARD: 64, BACKWARD: 128}  # four and two programs of 256 threads per multiprocessor


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")


def expected(name, direction, dtype=torch.bfloat16, emit_y=False):
    record = activations.get(name)
    special = SPECIAL_FUNCTIONS[name][direction == BACKWARD]
    if dtype != torch.bfloat16 and ("gelu" in name or "silu" in name):
        special -= 1  # exp is a polynomial
    per_thread = 8 if direction == BACKWARD and record.gated else 16
    accesses = per_thread * dtype.itemsize // 16  # of 16 bytes, per matrix as wide as y
    width, learned = 1 + record.gated, len(record.trainable)
    registers = MAX_REGISTERS[direction]
    if dtype != torch.bfloat16 and direction == FORWARD:
        registers = 80  # three programs; in fp32, of twice the bytes, these have more in flight than four in bf16
    return Expectation(
        registers=registers,
        shared_bytes=32 if direction == BACKWARD else 0,  # eight warps' sums
        special_functions=special,
        wide_loads=accesses * (width + (direction == BACKWARD)),
        wide_stores=accesses * (width + emit_y if direction == BACKWARD else 1),
        narrow_loads=learned,
        narrow_stores=learned if direction == BACKWARD else 0,
    )


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", SERVED)
def test_machine_code(name, direction, arch):
    oracle_of(name)
    assert violations(compile_kernel(name, direction, arch), expected(name, direction)) == []


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", MOST_ISSUED)
def test_memory_stays_the_bound(name, direction):
    binary = compile_kernel(name, direction, 90)
    assert binary.issued <= MOST_ISSUED[name][direction == BACKWARD]
    assert 0 < binary.lead_in <= 40, "too much is computed before the first load is on its way"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", ["xielu", "xgelu", "xatlu_glu1", "xsilu_glu2"])
def test_machine_code_of_other_dtypes(name, direction, dtype):
    assert violations(compile_kernel(name, direction, 90, dtype), expected(name, direction, dtype)) == []


@pytest.mark.parametrize("name", ["xielu", "xgelu_glu2"])
def test_machine_code_with_y_again(name):
    binary = compile_kernel(name, BACKWARD, 90, emit_y=True)
    assert violations(binary, expected(name, BACKWARD, emit_y=True)) == []


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", ["xielu", "xgelu_glu2"])
def test_machine_code_with_bias_and_scale(name, direction, arch):
    binary = compile_kernel(name, direction, arch, bias=True, scale=True)
    assert binary.stack_bytes == binary.count("LDL") == binary.count("STL") == 0
    assert binary.registers <= 168 and binary.shared_bytes <= 8192
    wide = sum(n for opcode, n in binary.instructions.items() if opcode.startswith("LDG") and ".128" in opcode)
    matrices = 1 + activations.get(name).gated + (direction == BACKWARD)  # as wide as y: x (or gate and up), dy
    assert wide >= matrices * binary.elements // 8


# Planted regressions: what each must be called


def test_narrow_accesses_are_noticed():
    found = violations(compile_kernel("xielu", FORWARD, 90, divisible=False), expected("xielu", FORWARD))
    assert any(phrase.startswith("loads: 0 of 128 bits") for phrase in found)
    assert any(phrase.startswith("stores: 0 of 128 bits") for phrase in found)


def test_spills_are_noticed():
    binary = compile_kernel("xielu", BACKWARD, 90, options={"maxnreg": 24})
    assert any(phrase.startswith("spills") for phrase in violations(binary, expected("xielu", BACKWARD)))


def test_too_many_registers_are_noticed():
    twice_the_tile = {"TILE_ROWS": 32, "TILE_COLUMNS": 128}
    binary = compile_kernel("xsilu_glu2", BACKWARD, 90, scale=True, options=twice_the_tile)
    found = violations(binary, expected("xsilu_glu2", BACKWARD))
    assert any(phrase.startswith("registers") for phrase in found)


def test_an_extra_special_function_is_noticed():
    from megatron_xact.kernels.device_functions import xsilu

    binary = compile_kernel("xielu", FORWARD, 90, options={"FUNCTION": xsilu})
    assert any(phrase.startswith("special functions: 2") for phrase in violations(binary, expected("xielu", FORWARD)))


def test_more_shared_memory_is_noticed():
    binary = compile_kernel("xielu", BACKWARD, 90, bias=True)
    assert any(phrase.startswith("shared memory") for phrase in violations(binary, expected("xielu", BACKWARD)))
