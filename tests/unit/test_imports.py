"""Who may import whom, which third-party names live where, and that importing us leaves Megatron alone."""

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "megatron_xact"

# Room -> the rooms it may import. What is not listed (cli, study_command, doctor) is on top and may import all.
ROOMS = {
    "activations": set(),
    "kernels": {"activations"},
    "layers": {"activations", "kernels"},
    "pretraining": {"activations", "kernels", "layers"},
    "checkpoints": {"activations", "kernels", "layers", "pretraining"},
    "studies": set(),
}
# Room -> a module that it may import beside them: arithmetic on sizes, which itself imports nothing.
DOORS = {"studies": "megatron_xact.pretraining.planning.counts"}
# Third-party name -> where it may be named: rooms, or modules of a room.
FENCES = {
    "triton": {"kernels"},
    "quack": {"kernels/quack_epilogues.py", "kernels/quack_functions.py", "kernels/quack_gemm.py"},
    "cutlass": {"kernels/quack_epilogues.py", "kernels/quack_functions.py", "kernels/quack_gemm.py"},
    "megatron": {"layers", "pretraining", "checkpoints"},
    "transformers": {"checkpoints"},
    "tokenizers": {"pretraining/data"},
    "deepspeed": {"pretraining/zero"},
    "transformer_engine": {"layers/te"},
}
# Rooms that may use only these besides the standard library and rooms above.
ONLY = {
    "activations": {"torch"},
    "kernels": {"torch", "triton"},
    "studies": {"matplotlib", "numpy", "scipy", "tqdm"},
}


def imports(path: Path) -> Iterator[str]:
    """Every imported name in a file, inside functions too: a lazy import is still an edge."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def violations(package: Path) -> list[str]:
    """What breaks the rules in the package at this path, one sentence each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).as_posix()
        room = place.split("/")[0].removesuffix(".py")
        for name in imports(path):
            top, *rest = name.split(".")
            if not top:
                found.append(f"{place}: {name} is relative; write the absolute import")
            elif top == package.name:
                other = rest[0] if rest else ""
                allowed = {room, "__version__", "installed", "argument_types", "whole"} | ROOMS.get(
                    room, set(ROOMS) | {"cli", "doctor", "pretraining"}
                )
                if other not in allowed and not (room in DOORS and name.startswith(DOORS[room])):
                    found.append(f"{place}: {room} may not import {name}")
            elif top in FENCES:
                if not any(place == fence or place.startswith(f"{fence}/") for fence in FENCES[top]):
                    found.append(f"{place}: {top} may not be named here")
            elif top not in ONLY.get(room, {top}) and top not in sys.stdlib_module_names:
                found.append(f"{place}: {room} may only use {', '.join(ONLY[room])}, not {top}")
    return found


def test_import_direction_and_fences():
    assert len(list(PACKAGE.rglob("*.py"))) > 10  # the walk saw the package
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    "place, line, said",
    [
        (
            "activations/a.py",
            "import megatron_xact.kernels.ops",
            "activations may not import megatron_xact.kernels.ops",
        ),
        ("activations/a.py", "import numpy", "activations may only use torch, not numpy"),
        (
            "kernels/a.py",
            "from megatron_xact.layers import mlp",
            "kernels may not import megatron_xact.layers.mlp",
        ),
        ("kernels/a.py", "from megatron_xact import layers", "kernels may not import megatron_xact.layers"),
        (
            "layers/a.py",
            "from megatron_xact.pretraining import config",
            "layers may not import megatron_xact.pre",
        ),
        (
            "pretraining/a.py",
            "import megatron_xact.checkpoints",
            "pretraining may not import megatron_xact.check",
        ),
        (
            "studies/a.py",
            "import megatron_xact.activations",
            "studies may not import megatron_xact.activations",
        ),
        (
            "studies/a.py",
            "from megatron_xact.pretraining.planning import memory",
            "studies may not import megatron_xact.pretraining.planning.memory",
        ),
        ("studies/a.py", "import torch", "studies may only use"),
        ("layers/a.py", "from megatron_xact import cli", "layers may not import megatron_xact.cli"),
        ("layers/a.py", "import triton", "triton may not be named here"),
        ("kernels/linear.py", "from quack.gemm_config import GemmConfig", "quack may not be named here"),
        ("kernels/triton_gemm.py", "import cutlass", "cutlass may not be named here"),
        ("activations/a.py", "from megatron.core import mpu", "megatron may not be named here"),
        ("cli.py", "import megatron.training", "megatron may not be named here"),
        ("pretraining/a.py", "import transformers", "transformers may not be named here"),
        ("pretraining/a.py", "from tokenizers import Tokenizer", "tokenizers may not be named here"),
        ("layers/mlp.py", "import transformer_engine.pytorch", "transformer_engine may not be named here"),
        ("layers/a.py", "from . import mlp", "is relative"),
        ("layers/a.py", "def f():\n    import triton", "triton may not be named here"),
    ],
)
def test_a_planted_violation_is_named(tmp_path, place, line, said):
    path = tmp_path / "megatron_xact" / place
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    (sentence,) = violations(tmp_path / "megatron_xact")
    assert sentence.startswith(f"{place}: ") and said in sentence


@pytest.mark.parametrize(
    "place, line",
    [
        ("layers/a.py", "from megatron_xact.kernels.ops import f\nimport megatron.core, torch"),
        ("pretraining/data/a.py", "import tokenizers, numpy"),
        ("layers/te/a.py", "import transformer_engine.pytorch as te"),
        ("checkpoints/a.py", "import transformers, megatron.core"),
        ("kernels/a.py", "import triton, torch, math\nfrom megatron_xact.activations import get"),
        ("kernels/quack_gemm.py", "def f():\n    import quack.epilogue.frontend, cutlass"),
        ("studies/a.py", "from megatron_xact.pretraining.planning.counts import flops_per_token"),
        ("cli.py", "from megatron_xact import __version__\nimport megatron_xact.pretraining.config"),
    ],
)
def test_what_is_allowed_passes(tmp_path, place, line):
    path = tmp_path / "megatron_xact" / place
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert violations(tmp_path / "megatron_xact") == []


# Importing us changes nothing in Megatron

CHANGES = """
import importlib, importlib.util, pkgutil, sys, types, warnings
warnings.simplefilter("ignore")

def ours():
    import megatron_xact
    walk = pkgutil.walk_packages(megatron_xact.__path__, "megatron_xact.")
    absent = "__main__" if importlib.util.find_spec("transformer_engine") else ("__main__", "layers.te.")
    return [m.name for m in walk if not m.name.removeprefix("megatron_xact.").startswith(absent)]

def snapshot():
    # id() of every attribute of every loaded megatron module, and of every class defined in one. The objects
    # are kept alive too, or the id of a replaced one could be given out again.
    symbols = {}
    for name, module in list(sys.modules.items()):
        if name != "megatron" and not name.startswith("megatron."):
            continue
        for key, value in list(vars(module).items()):
            symbols[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                symbols.update({(name, f"{key}.{k}"): v for k, v in vars(value).items()})
    return symbols

# First Megatron alone: what our modules name, found by their imports.
for name in NAMES:
    importlib.import_module(name)
before = snapshot()
for name in ours():
    importlib.import_module(name)
PLANTED
after = snapshot()
def is_module(key):  # a submodule that was loaded only now appears as an attribute of its parent
    return isinstance(after[key], types.ModuleType) and key not in before
known = {module for module, _ in before}
changed = [k for k in before if k not in after or before[k] is not after[k]]
added = [k for k in after if k not in before and k[0] in known and not is_module(k)]
print(len(before), len(ours()))
print(sorted(map(".".join, changed + added)))
"""


def changes_to_megatron(planted: str = "") -> tuple[int, list[str]]:
    """How many symbols were compared, and those that differ after importing every module of ours."""
    loaded = sorted({module for path in PACKAGE.rglob("*.py") for module in megatron_modules(path)})
    assert "megatron.core.tensor_parallel.layers" in loaded or len(loaded) > 10
    script = CHANGES.replace("NAMES", repr(loaded)).replace("PLANTED", textwrap.dedent(planted))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counts, names = done.stdout.splitlines()[-2:]
    symbols, modules = map(int, counts.split())
    assert symbols > 10_000 and modules > 10
    return symbols, ast.literal_eval(names)


def megatron_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("megatron."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
            yield node.module


def test_importing_us_changes_no_symbol_of_megatron():
    _, changed = changes_to_megatron()
    assert changed == []


def test_a_planted_patch_is_noticed():
    planted = """
    import megatron.core.transformer.mlp as mlp, megatron.training.training as training
    mlp.MLP.forward = lambda self, x: x
    mlp.MLP.extra = 1
    training.pretrain = None
    """
    _, changed = changes_to_megatron(planted)
    expected = [
        "core.transformer.mlp.MLP.extra",
        "core.transformer.mlp.MLP.forward",
        "training.training.pretrain",
    ]
    assert changed == [f"megatron.{name}" for name in expected]
