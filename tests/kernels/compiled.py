"""Kernels compiled for a GPU that is not there, and what their machine code says: registers, spills, memory accesses.

The compile-time arguments are those the launcher itself would use, so the gates are about what is shipped.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_xact import activations
from megatron_xact.kernels import triton_pointwise
from megatron_xact.kernels.device_functions import MAX_PARAMETERS
from megatron_xact.kernels.triton_pointwise import backward_kernel, forward_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ROWS, COLUMNS = 16384, 12288
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Binary:
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: Counter  # of one thread, by opcode with modifiers
    elements: int  # of y, per thread
    lead_in: int = 0  # instructions before the first wide load

    @property
    def issued(self) -> float:
        """Instructions per element of y."""
        return (self.instructions.total() - self.count("NOP")) / self.elements

    def count(self, prefix: str) -> int:
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefix))


@dataclass(frozen=True)
class Expectation:
    """Ceilings and exact counts for one kernel, per thread."""

    registers: int
    shared_bytes: int
    special_functions: float  # per element of y
    wide_loads: int
    wide_stores: int
    narrow_loads: int
    narrow_stores: int


def violations(binary: Binary, expected: Expectation) -> list[str]:
    """What the machine code does that it must not, one phrase each."""
    found = []
    if binary.stack_bytes or binary.count("LDL") or binary.count("STL"):
        found.append(f"spills: stack {binary.stack_bytes} B, {binary.count('LDL')} LDL, {binary.count('STL')} STL")
    if binary.registers > expected.registers:
        found.append(f"registers: {binary.registers} > {expected.registers}")
    if binary.shared_bytes > expected.shared_bytes:
        found.append(f"shared memory: {binary.shared_bytes} B > {expected.shared_bytes} B")
    # ptxas may compute a quarter twice to save registers
    special = binary.count("MUFU") - expected.special_functions * binary.elements
    if not 0 <= special <= binary.elements / 4:
        found.append(f"special functions: {binary.count('MUFU') / binary.elements} per element")
    for kind, opcode, wide, narrow in (
        ("loads", "LDG", expected.wide_loads, expected.narrow_loads),
        ("stores", "STG", expected.wide_stores, expected.narrow_stores),
    ):
        is_wide = sum(n for name, n in binary.instructions.items() if name.startswith(opcode) and ".128" in name)
        if (is_wide, binary.count(opcode) - is_wide) != (wide, narrow):
            found.append(f"{kind}: {is_wide} of 128 bits and {binary.count(opcode) - is_wide} narrower, "
                         f"not {wide} and {narrow}")  # fmt: skip
    return found


def compile_kernel(
    name: str,
    direction: str,
    arch: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = False,
    scale: bool = False,
    emit_y: bool = False,
    divisible: bool = True,
    options: dict | None = None,
) -> Binary:
    """The kernel of an activation for [16384, 12288]; divisible: pointers and sizes are multiples of 16, as usual."""
    activation = activations.get(name)
    p = {q.symbol: torch.ones(1) if q.trainable else q.init for q in activation.parameters}
    rows = ROWS if activation.gated or bias or scale else 1
    columns = COLUMNS if rows > 1 else ROWS * COLUMNS
    kernel = forward_kernel if direction == FORWARD else backward_kernel
    constants = triton_pointwise.launch(activation, p, direction, rows, columns)[1] | (options or {})
    data = f"*{NAMES[dtype]}"
    given = {
        "x_ptr": data,
        "dy_ptr": data,
        "dx_ptr": data,
        "y_ptr": data if emit_y or direction == FORWARD else None,
        "bias_ptr": data if bias else None,
        "dbias_ptr": "*fp32" if bias else None,
        "scale_ptr": "*fp32" if scale else None,
        "dscale_ptr": "*fp32" if scale else None,
        "dp_ptr": "*fp32",
        "rows": "i32" if rows > 1 else None,
        "columns": "i32",
    }
    given |= parameters(constants["LEARNED"])
    elements = constants["TILE_ROWS"] * constants["TILE_COLUMNS"] // (32 * constants["num_warps"])
    return compiled(kernel, given, constants | {"rows": 1}, arch, elements, divisible)


def parameters(learned: int) -> dict[str, str]:
    """Types of p0, p1, p2 where the bits of `learned` say which are on the device."""
    return {f"p{i}": "*fp32" if learned >> i & 1 else "fp32" for i in range(MAX_PARAMETERS)}


def compiled(
    kernel: triton.JITFunction, given: dict, constants: dict, arch: int, elements: int, divisible: bool = True
) -> Binary:
    """given: argument -> its type, None for a pointer that is None; constants: compile-time values and options."""
    binary = compiled_by_triton(kernel, given, constants, arch, kernel.arg_names if divisible else ())
    return disassembled(binary.asm["cubin"], elements, binary.metadata.shared)


def compiled_by_triton(
    kernel: triton.JITFunction, given: dict, constants: dict, arch: int, divisible: Collection[str]
) -> triton.compiler.CompiledKernel:
    """divisible: the arguments that are multiples of 16."""
    signature, values, hints = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        signature[argument] = given.get(argument) or "constexpr"
        if signature[argument] == "constexpr":
            values[argument] = constants.get(argument)
        elif argument in divisible and not signature[argument].startswith(("fp32", "tensordesc")):
            hints[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, values, hints),
        target=GPUTarget("cuda", arch, 32),
        options={key: value for key, value in constants.items() if key not in kernel.arg_names},
    )


def disassembled(cubin: bytes, elements: int, shared_bytes: int = 0) -> Binary:
    """shared_bytes: what is asked for at launch, which a cubin does not say."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dumps = [
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-sass", "-res-usage")
        ]
    sass, usage = dumps[0].stdout, dumps[1].stdout + dumps[1].stderr
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", sass)
    return Binary(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared_bytes=shared_bytes,
        instructions=Counter(opcodes),
        elements=elements,
        lead_in=next((i for i, opcode in enumerate(opcodes) if opcode.startswith("LDG") and ".128" in opcode), 0),
    )
