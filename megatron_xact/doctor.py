"""`xact doctor`: what is installed, which backends a run here would use and why, what a GPU run lacks.

Optional packages are looked up, not imported: their metadata and files say enough, and importing is slow. Two
exceptions: torch, which must answer for the GPU, and TransformerEngine if present, tried in a process of
its own, because a broken one looks whole from outside.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_xact import installed
from megatron_xact.kernels import toolchain

OK, WARNING, ABSENT, BLOCKING = "ok", "warning", "absent", "blocking"
# The dependencies of pyproject.toml and their oldest versions. pip sees to them, but not in a container where this runs
# from a clone by PYTHONPATH.
OLDEST = {"megatron-core": (0, 19), "torch": (2, 8), "numpy": (), "psutil": (), "tensorboard": (), "tokenizers": (),
          "transformers": (5, 1), "safetensors": (), "matplotlib": (), "scipy": (), "tqdm": ()}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line of the report. ABSENT: an optional part is not there; BLOCKING: training cannot run."""

    name: str
    status: str
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Backend:
    """What a run here would use for one thing, and why."""

    what: str
    choice: str
    reason: str


def main(args: argparse.Namespace) -> int:
    """Prints the report; 0 if training can run here, else 1."""
    result = report()
    print(json.dumps(result, indent=2) if args.json else _text(result))
    return 0 if result["can_train"] else 1


def report() -> dict:
    """Keys: can_train, checks, backends, gpu_run_lacks, activations (names)."""
    checks = [*_system(), *_torch(), *_required(), *_optional()]
    status = {check.name: check for check in checks}
    blocked = any(check.status == BLOCKING for check in checks)
    return {
        "can_train": not blocked,
        "checks": [asdict(check) for check in checks],
        "backends": [asdict(backend) for backend in _backends(status)],
        "gpu_run_lacks": _gpu_run_lacks(status),
        "activations": _activation_names(),
    }


def _at_least(version: str, *wanted: int) -> bool:
    return tuple(map(int, re.findall(r"\d+", version)[: len(wanted)])) >= wanted


def _upgrade(name: str) -> str:
    oldest = ".".join(map(str, OLDEST[name]))
    return f'pip install --upgrade "{name}>={oldest}"' if oldest else f"pip install {name}"


def _system() -> Iterator[Check]:
    ok = (3, 12) <= sys.version_info < (3, 14)
    yield Check(
        "python", OK if ok else BLOCKING, f"{platform.python_version()} ({sys.executable})",
        "" if ok else "megatron-core 0.19 needs Python 3.12 or 3.13: bash launch/env.sh",
    )  # fmt: skip
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Check(
        "machine", OK if free > 5 else WARNING, f"{os.cpu_count()} CPUs, {free:.0f} GiB free on this disk",
        "" if free > 5 else "a checkpoint holds 14 to 18 bytes per parameter: make room first",
    )  # fmt: skip
    lacking = toolchain.lacks_for_torch()
    yield Check(
        "C++ compiler", WARNING if lacking else OK, lacking or toolchain.cxx(),
        "on the CPU activations run unfused, slower: apt install g++ python3-dev" if lacking else "",
    )  # fmt: skip


def _torch() -> Iterator[Check]:
    if not installed.present("torch"):
        yield Check("torch", BLOCKING, "not installed", "pip install torch")
        return
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    new = _at_least(torch.__version__, *OLDEST["torch"])
    yield Check(
        "torch", OK if new else BLOCKING, f"{torch.__version__}, built {build}", "" if new else _upgrade("torch")
    )
    backends = [name for name in ("nccl", "gloo") if getattr(torch.distributed, f"is_{name}_available")()]
    yield Check(
        "collectives", OK if backends else BLOCKING, ", ".join(backends) or "neither nccl nor gloo",
        "" if backends else "pip install torch (a build with torch.distributed)",
    )  # fmt: skip
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            detail = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
            yield Check(f"GPU {i}" if i else "GPU", OK, detail)
    elif torch.version.cuda:
        yield Check(
            "GPU",
            ABSENT,
            f"torch is built for CUDA {torch.version.cuda} but sees no GPU (driver, nvidia-smi?)",
        )
    else:
        yield Check("GPU", ABSENT, "torch is built without CUDA", "install a CUDA build of torch: pytorch.org")


def _required() -> Iterator[Check]:
    version = _megatron_version()
    if version is None:
        yield Check("megatron-core", BLOCKING, "not installed", _upgrade("megatron-core"))
    elif not _at_least(version, *OLDEST["megatron-core"]) or not installed.present("megatron.training"):
        found = "holds megatron.training" if installed.present("megatron.training") else "without megatron.training"
        yield Check(
            "megatron-core", BLOCKING, f"{version}, {found}",
            f"{_upgrade('megatron-core')} (the first wheel with megatron.training)",
        )  # fmt: skip
    else:
        yield Check("megatron-core", OK, f"{version}, holds megatron.training")
    for name in (name for name in OLDEST if name not in ("megatron-core", "torch")):
        version = installed.version(name)
        if version is not None and _at_least(version, *OLDEST[name]):
            yield Check(name, OK, version)
        else:
            yield Check(name, BLOCKING, version or "not installed", _upgrade(name))


def _megatron_version() -> str | None:
    """Of the Megatron that would be imported, which may be a clone on PYTHONPATH that pip knows nothing of."""
    if not installed.present("megatron.core"):
        return None
    core = Path(importlib.util.find_spec("megatron.core").origin).parent
    return runpy.run_path(str(core / "package_info.py"))["__shortversion__"]


def _optional() -> Iterator[Check]:
    yield _transformer_engine()
    yield _apex()
    packages = {  # name: (module, distributions, what it adds, how to get it)
        "triton": ("triton", ("triton",), "torch.compile on GPUs", "pip install triton"),
        "flash-attn": (
            "flash_attn", ("flash-attn",), "TransformerEngine's flash attention backend (torch has its own)",
            "pip install flash-attn --no-build-isolation",
        ),
        "quack": (
            "quack", ("quack-kernels",), 'activations inside matrix products on Hopper ([xact] mlp = "quack")',
            installed.extra("quack"),
        ),
        "deepspeed": (
            "deepspeed", ("deepspeed",), 'ZeRO 1-3 and offload to host memory ([xact] engine = "deepspeed")',
            installed.extra("deepspeed"),
        ),
        "dali": (
            "nvidia.dali", ("nvidia-dali-cuda120", "nvidia-dali-cuda130"),
            'a loader of batches ([xact] loader = "dali")', installed.extra("dali"),
        ),
        "wandb": ("wandb", ("wandb",), "Weights & Biases logging", installed.extra("wandb")),
        "datasets": ("datasets", ("datasets",), "corpora by Hugging Face name", installed.extra("data")),
        "pyarrow": ("pyarrow", ("pyarrow",), "parquet corpora", installed.extra("data")),
    }  # fmt: skip
    for name, (module, distributions, adds, install) in packages.items():
        version = next(filter(None, map(installed.version, distributions)), None)
        if installed.present(module):
            yield Check(name, OK, version or "present (built from source)")
        else:
            yield Check(name, ABSENT, f"adds {adds}", install)


def _transformer_engine() -> Check:
    name, install = "transformer-engine", installed.extra("te", "--no-build-isolation ")
    if not installed.present("transformer_engine"):
        return Check(name, ABSENT, "adds fused layers, FusedAdam and FP8 on GPUs", install)
    # What Megatron itself imports to decide whether it has TransformerEngine.
    error = _import_error("transformer_engine.pytorch.optimizers")
    version = installed.version("transformer-engine") or "unknown version"
    if error:
        return Check(name, WARNING, f"{version}, but it does not import: {error}", install)
    return Check(name, OK, version)


def _import_error(module: str) -> str | None:
    """The last line that importing `module` in a fresh process says, or None if it works."""
    try:
        done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "no answer in 300 s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _apex() -> Check:
    """NVIDIA's apex, or the unrelated project of that name on PyPI, told apart by its files."""
    build = "build NVIDIA's from source (github.com/NVIDIA/apex)"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        adds = "adds weight gradients into main_grad within their products, and FusedAdam without TransformerEngine"
        return Check("apex", ABSENT, adds, build)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    parts = ("optimizers", "multi_tensor_apply")
    if not all(any((folder / part).is_dir() for folder in folders) for part in parts):
        return Check(
            "apex", WARNING,
            "this is PyPI's unrelated 'apex'; Megatron takes it for NVIDIA's and fails building its norms",
            f"pip uninstall apex; {build}",
        )  # fmt: skip
    if not installed.present("amp_C"):
        return Check("apex", WARNING, "NVIDIA's, but built without CUDA extensions (amp_C): FusedAdam fails", build)
    return Check("apex", OK, f"NVIDIA's, {installed.version('apex') or 'unknown version'}")


def _backends(status: dict[str, Check]) -> Iterator[Backend]:
    def ok(name: str) -> bool:
        return name in status and status[name].status == OK

    if ok("GPU"):
        count = sum(name.startswith("GPU") for name in status)
        yield Backend("device", "cuda, nccl", f"torch sees {count} GPU{'s' if count > 1 else ''}")
    else:
        why = status["GPU"].detail if "GPU" in status else "no torch"
        yield Backend("device", "CPU platform, gloo", f"{why}; for development and small models")
    te, apex = status["transformer-engine"], status["apex"]
    no_te = "TransformerEngine does not import" if te.status == WARNING else "TransformerEngine is not installed"
    if te.status == OK:
        yield Backend("layers", "TransformerEngine", f"transformer-engine {te.detail} is installed")
        yield Backend("optimizer", "TransformerEngine FusedAdam", "Megatron prefers it to apex and torch")
    else:
        yield Backend("layers", "local: torch norms and scaled_dot_product_attention", no_te)
        # Megatron takes apex wherever `apex.optimizers` is importable, with or without its CUDA extensions.
        if apex.status == OK or "amp_C" in apex.detail:
            yield Backend("optimizer", "apex FusedAdam", f"{no_te}; apex is")
        else:
            why = "the package 'apex' is not NVIDIA's" if apex.status == WARNING else "apex is not installed"
            yield Backend("optimizer", "torch AdamW", f"{no_te} and {why}")
    yield _activation_backend(on_gpu=ok("GPU"))


def _activation_backend(on_gpu: bool) -> Backend:
    eager = "PyTorch formulas, analytic backward"
    if not installed.present("torch"):
        return Backend("activation", "none", "no torch")
    from megatron_xact.kernels import cpu, ops

    reason = ops.triton_unavailable_reason() if on_gpu else cpu.unavailable_reason()
    if reason:
        return Backend("activation", eager, f"{reason}; several times slower than fused")
    built_by = "Triton" if on_gpu else "torch.compile, in C++"
    return Backend("activation", "one fused pass each way", f"built by {built_by}")


def _gpu_run_lacks(status: dict[str, Check]) -> list[str]:
    """What a run on GPUs would still need, or be slow without, with the way to get it."""
    needed = (status[name] for name in ("GPU", "transformer-engine", "triton") if name in status)
    lacks = [f"{check.name}: {check.advice or check.detail}" for check in needed if check.status != OK]
    if "collectives" in status and "nccl" not in status["collectives"].detail:
        lacks.append("nccl: install a CUDA build of torch: pytorch.org")
    return lacks


def _activation_names() -> list[str]:
    if not installed.present("torch"):
        return []
    from megatron_xact import activations

    return list(activations.names())


def _text(result: dict) -> str:
    marks = {OK: "ok", WARNING: "WARN", ABSENT: "-", BLOCKING: "MISSING"}
    lines = []
    for check in result["checks"]:
        lines.append(f"  {marks[check['status']]:8}{check['name']:20}{check['detail']}")
        if check["advice"]:
            lines.append(f"{'':30}-> {check['advice']}")
    lines += ["", "A run here would use"]
    lines += [f"  {b['what']:12}{b['choice']}  ({b['reason']})" for b in result["backends"]]
    lines += ["", "A GPU run lacks"] + [f"  {line}" for line in result["gpu_run_lacks"] or ["nothing"]]
    lines += ["", "Activations: " + ", ".join(result["activations"])]
    verdict = "Training can run here." if result["can_train"] else "Training cannot run here: see MISSING above."
    return "\n".join([*lines, "", verdict])
