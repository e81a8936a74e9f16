"""Megatron's MLP of TE's operations with `mlp = "auto"` on two tensor-parallel ranks that have measured differently.

What stands for a GPU: Triton's interpreter, said to be available and for Hopper, and timings in each rank's cache.
"""

import json
import os
from pathlib import Path

import torch

os.environ["TRITON_INTERPRET"] = "1"  # read as kernels are imported, which is after this
HIDDEN, FFN, DTYPE = 64, 128, torch.float16  # the interpreter multiplies bf16 wrongly
FUSED, APART = 16, 32  # tokens at which the first rank has measured that fusion wins, and loses


def rank(number: int, folder: Path) -> dict:
    """What one rank does: which way each layer goes, and what TE makes of it."""
    os.environ["XACT_CACHE"] = str(folder / f"cache {number}")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from spec import build

    from megatron_xact.kernels import mlp_choice, triton_gemm

    parallel_state.initialize_model_parallel(2, 1)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    torch.cuda.is_available = lambda: True  # TE refuses to build modules otherwise
    options = {"use_transformer_engine_op_fuser": True, "tensor_model_parallel_size": 2}
    options |= {"bf16": False, "fp16": True, "params_dtype": DTYPE}
    joined, apart = (layer.mlp for layer in build("transformer_engine", **options).decoder.layers)
    mlp_choice.select_mlp("auto")
    mlp_choice.unavailable_reasons = lambda *_: {"quack": "it is not installed"}
    triton_gemm._is_hopper = lambda device: True  # which has several tiles for each direction
    for tokens in (FUSED, APART):
        fusion_wins = (tokens == FUSED) == (number == 0)
        seconds = {"unfused": 2.0 if fusion_wins else 1.0, "triton": 1.5}
        found = {"planted": plant(joined.activation_func.activation, tokens, seconds, number)}

    joined.eval()
    before = joined(inputs(FUSED))[0].detach()  # with gradients: TE would make its pipeline anew for these
    found["evaluated first"] = way_and_operations(joined)
    joined.train()
    launched = note_launches()
    after = joined(inputs(FUSED))[0]
    after.sum().backward()
    found["fused"], found["launched"] = way_and_operations(joined), list(launched)
    found["difference"] = ((after - before).abs().max() / before.abs().max()).item()
    found["gradients"] = all(p.grad.any().item() for p in joined.parameters())
    joined(inputs(APART))
    found["other tokens"] = way_and_operations(joined)
    apart(inputs(APART))
    found["unfused"] = way_and_operations(apart)

    for name in ("fp8", "tp_comm_overlap"):
        apart.way, apart._fused_impl = None, None
        setattr(apart.config, name, True)
        apart(inputs(FUSED))
        found[name] = way_and_operations(apart)
        setattr(apart.config, name, False)
    for name in ("quack", "fp8"):
        apart.way = None
        mlp_choice.select_mlp(name)
        try:
            apart(inputs(FUSED))
        except ValueError as error:
            found[f"named {name}"] = str(error)
    return found


def plant(activation, tokens: int, seconds: dict[str, float], rank: int) -> list[str]:
    """A file of timings as `mlp_choice` writes them; the fastest tiles are the last ones, on other ranks the first.

    Returns the last ones.
    """
    from megatron_xact.kernels import mlp_choice
    from megatron_xact.kernels.mlp_timing import Shape, tiles_of

    shape, cpu = Shape(tokens, HIDDEN, FFN // 2, DTYPE), torch.device("cpu")
    tiles = {direction: tiles_of("triton", direction, activation, shape, cpu) for direction in ("forward", "backward")}
    timed = {
        direction: {name: 1.0 + (-i if rank == 0 else i) / 10 for i, name in enumerate(names)}
        for direction, names in tiles.items()
    }
    key = mlp_choice._key(activation, shape, cpu)
    file = mlp_choice.path_of(key)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"key": key, "seconds": seconds, "tiles": {"triton": timed}}))
    return [names[-1] for names in tiles.values()]


def note_launches() -> list[str]:
    """Names of the tiles with which Triton's kernels are launched from now on."""
    from megatron_xact.kernels import triton_gemm

    launched, options = [], triton_gemm._options

    def noted(activation, p, tile):
        launched.append(str(tile))
        return options(activation, p, tile)

    triton_gemm._options = noted
    return launched


def inputs(tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens // 2, 2, HIDDEN, generator=generator).to(DTYPE).requires_grad_()


def way_and_operations(mlp) -> tuple[str | None, list[str]]:
    (fuser,) = mlp._fused_impl[0]._module_groups
    return mlp.way and mlp.way.backend, [type(op).__name__ for op, _ in fuser._forward_ops]
