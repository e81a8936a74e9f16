"""`xact doctor` against this machine as it is, and against packages that are wrong in known ways."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import torch

from megatron_xact import activations
from megatron_xact.doctor import OLDEST

REPOSITORY = Path(__file__).parents[2]


def doctor(*paths: Path, options: tuple[str, ...] = ("--json",)) -> tuple[int, str]:
    """Exit code and output of `xact doctor` in a process that also sees the packages in `paths`."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_xact", "doctor", *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [REPOSITORY, *paths]))},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" or "Error" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def report(*paths: Path) -> tuple[dict, dict, dict]:
    """The report, its checks by name and its backends by what they are for."""
    code, output = doctor(*paths)
    result = json.loads(output)
    assert code == (0 if result["can_train"] else 1)
    return result, *({item[key]: item for item in result[part]} for part, key in PARTS)


PARTS = (("checks", "name"), ("backends", "what"))


def package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_report_agrees_with_this_machine():
    result, checks, backends = report()
    assert result["can_train"]  # these tests train here
    for name in ("torch", "megatron-core", "transformers", "tokenizers", "safetensors"):
        assert checks[name]["status"] == "ok"
        assert importlib.metadata.version(name).split("+")[0] in checks[name]["detail"]
    assert (checks["GPU"]["status"] == "ok") == torch.cuda.is_available()
    assert backends["device"]["choice"].endswith("nccl" if torch.cuda.is_available() else "gloo")
    assert result["activations"] == list(activations.names())


def test_quack_is_told_by_the_version_of_its_distribution(tmp_path):
    files = {"quack/__init__.py": "", "quack_kernels-9.9.dist-info/METADATA": "Name: quack-kernels\nVersion: 9.9\n"}
    _, checks, _ = report(package(tmp_path, files))
    assert (checks["quack"]["status"], checks["quack"]["detail"]) == ("ok", "9.9")


def test_optimizer_is_the_one_megatron_takes():
    from megatron.core.optimizer import Adam

    _, _, backends = report()
    homes = {
        "transformer_engine": "TransformerEngine FusedAdam",
        "apex": "apex FusedAdam",
        "torch": "torch AdamW",
    }
    assert backends["optimizer"]["choice"] == homes[Adam.__module__.split(".")[0]]


def test_a_compiler_that_torch_would_not_call_is_none(tmp_path, monkeypatch):
    """torch.compile calls $CXX or g++. With clang++ alone it fails, and so does a run without Python's headers."""
    (tmp_path / "clang++").write_text("#!/bin/sh\n")
    (tmp_path / "clang++").chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    _, checks, _ = report()
    assert (checks["C++ compiler"]["status"], checks["C++ compiler"]["detail"]) == (
        "warning", "torch.compile finds no C++ compiler (g++)",
    )  # fmt: skip


def test_text_report_says_what_would_be_used_and_what_is_missing():
    code, text = doctor(options=())
    assert code == 0
    for words in ("A run here would use", "A GPU run lacks", "xielu", "Training can run here."):
        assert words in text


def test_pypis_unrelated_apex_is_recognised(tmp_path):
    """The package of that name on PyPI is an old web toolkit: a package without optimizers."""
    fake = package(tmp_path, {"apex/__init__.py": "raise RuntimeError('imported')", "apex/lib/__init__.py": ""})
    _, checks, backends = report(fake)
    assert checks["apex"]["status"] == "warning"
    assert "PyPI's unrelated 'apex'" in checks["apex"]["detail"]
    assert checks["apex"]["advice"].startswith("pip uninstall apex")
    assert "apex" not in backends["optimizer"]["choice"]


def test_an_apex_module_without_a_folder_is_not_nvidias_either(tmp_path):
    _, checks, _ = report(package(tmp_path, {"apex.py": ""}))
    assert "PyPI's unrelated 'apex'" in checks["apex"]["detail"]


NVIDIA_APEX = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "class FusedAdam: pass\nclass FusedSGD: pass",
    "apex/multi_tensor_apply/__init__.py": "",
}


def test_nvidias_apex_is_used_when_transformer_engine_is_absent(tmp_path):
    _, checks, backends = report(package(tmp_path, NVIDIA_APEX | {"amp_C.py": ""}))
    assert checks["apex"]["status"] == "ok" and "NVIDIA's" in checks["apex"]["detail"]
    if checks["transformer-engine"]["status"] == "absent":
        assert backends["optimizer"]["choice"] == "apex FusedAdam"


def test_nvidias_apex_without_its_cuda_extensions_is_a_warning(tmp_path):
    _, checks, _ = report(package(tmp_path, NVIDIA_APEX))
    assert checks["apex"]["status"] == "warning" and "amp_C" in checks["apex"]["detail"]


def test_a_transformer_engine_that_does_not_import_is_not_used(tmp_path):
    broken = {"transformer_engine/__init__.py": "raise OSError('libcuda.so.1: cannot open shared object file')"}
    _, checks, backends = report(package(tmp_path, broken))
    assert checks["transformer-engine"]["status"] == "warning"
    assert "libcuda.so.1" in checks["transformer-engine"]["detail"]
    assert backends["layers"]["choice"].startswith("local")


def test_a_transformer_engine_that_imports_is_used(tmp_path):
    working = {"__init__.py": "", "pytorch/__init__.py": "", "pytorch/optimizers.py": ""}
    _, checks, backends = report(package(tmp_path, {f"transformer_engine/{k}": v for k, v in working.items()}))
    assert checks["transformer-engine"]["status"] == "ok"
    assert backends["layers"]["choice"] == "TransformerEngine"
    assert backends["optimizer"]["choice"] == "TransformerEngine FusedAdam"


def test_a_megatron_without_its_trainer_blocks(tmp_path):
    """An older megatron-core, found first, as a clone on PYTHONPATH is: without megatron.training nothing can train."""
    clone = {"megatron/core/__init__.py": "", "megatron/core/package_info.py": "__shortversion__ = '0.16.1'"}
    result, checks, _ = report(package(tmp_path, clone))
    assert not result["can_train"]
    assert checks["megatron-core"]["status"] == "blocking" and "0.16.1" in checks["megatron-core"]["detail"]
    assert "megatron-core>=0.19" in checks["megatron-core"]["advice"]


def test_what_pyproject_requires_is_looked_for_in_the_version_it_requires(tmp_path):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = dict((*need.split(">="), "")[:2] for need in project["dependencies"])
    assert {name: ".".join(map(str, version)) for name, version in OLDEST.items()} == wanted
    old = {"transformers-4.40.dist-info/METADATA": "Name: transformers\nVersion: 4.40\n"}
    result, checks, _ = report(package(tmp_path, old))
    assert not result["can_train"] and checks["transformers"]["detail"] == "4.40"
    assert checks["transformers"]["advice"] == 'pip install --upgrade "transformers>=5.1"'
