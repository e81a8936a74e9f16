"""Real checkpoints, each made once per test session: tiny `xact pretrain` runs, and tiny transformers models.

A run takes seconds, so there is one per way of saving, and each is of another family.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ranks import processes
from warm import warm

ROOT = Path(__file__).parents[2]
VOCABULARY = 500  # not a multiple of 128: Megatron pads to 512

CONFIG = """
base = "{root}/configs/llama.toml"
[model]
num-layers = 4
hidden-size = 32
ffn-hidden-size = 48
num-attention-heads = 4
seq-length = 32
max-position-embeddings = 64
[data]
train-data-path = ["{data}/train_text_document"]
valid-data-path = ["{data}/validation_text_document"]
tokenizer-type = "HuggingFaceTokenizer"
tokenizer-model = "{data}/tokenizer"
num-workers = 0
[optimizer]
lr = 2e-2
[schedule]
micro-batch-size = 2
global-batch-size = 4
train-iters = 2
eval-interval = 2
eval-iters = 1
lr-wsd-decay-iters = 1
[checkpoint]
save-interval = 2
[logging]
log-interval = 1
tensorboard-log-interval = 1
"""

GQA = "--group-query-attention --num-query-groups 2"
UNTIED = "--untie-embeddings-and-output-weights"
# name: (family of the export, ranks, words of the command)
RUNS = {
    # Llama 3's scaling, two query heads to a key head, tensor parallel, distributed optimizer
    "apertus tp2": (
        "apertus",
        2,
        f"--qk-layernorm {GQA} {UNTIED} --use-rope-scaling --use-distributed-optimizer --tensor-model-parallel-size 2",
    ),
    # tied, beta trained, pipeline parallel
    "apertus pp2": (
        "apertus",
        2,
        "--qk-layernorm --pipeline-model-parallel-size 2 --set activation.trainable=['alpha_p','alpha_n','beta']",
    ),
    "llama tp4": ("llama", 4, f"--set activation.name=swiglu {UNTIED} --tensor-model-parallel-size 4"),
    # biases and LayerNorm, two pipeline stages of two chunks each
    "xact vpp2": (
        "xact",
        2,
        f"--set activation.name=xiprelu {GQA} --set model.disable-bias-linear=false --normalization LayerNorm "
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "arcee": ("arcee", 1, "--set activation.name=relu2 --kv-channels 12 --bf16 --async-save"),
}


class Runs:
    """The runs' folders by name; a run starts when it is first asked for."""

    def __init__(self, folder: Path, session: Path):
        """folder: of the runs; session: the session's temporary folder."""
        from megatron_xact.pretraining.data.preprocess import prepare

        self.folder = folder
        prepare(folder / "data", source="stdlib", vocab_size=VOCABULARY, max_bytes=300_000)
        self.config, self.tokenizer = folder / "tiny.toml", folder / "data" / "tokenizer"
        self.config.write_text(CONFIG.format(root=ROOT, data=folder / "data"))
        self._threads = ThreadPoolExecutor(2)
        self.server = warm(session)
        self._futures: dict = {}

    def start(self, *names: str) -> Runs:
        for name in names:
            _, ranks, words = RUNS[name]
            if name not in self._futures:
                self._futures[name] = self._threads.submit(self.train, name, ranks, words.split())
        return self

    def __getitem__(self, name: str) -> Path:
        self.start(name)
        return self._futures[name].result()

    def train(self, name: str, ranks: int, words: list[str], config: Path | None = None) -> Path:
        save = self.folder / name.replace(" ", "-")
        saving = ["--save", str(save), "--load", str(save)]
        self.server.run(str(config or self.config), *saving, *words, ranks=ranks)
        return save


def execute(command: list[str], timeout: float = 300.0) -> subprocess.CompletedProcess:
    """From the repository's root, without a GPU; stdout and stderr together."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), tmp_path_factory.getbasetemp())


def hf_configs() -> dict:
    """A transformers config per family and option, tiny."""
    from transformers import ApertusConfig, ArceeConfig, LlamaConfig, Qwen2Config, Qwen3Config, Starcoder2Config

    llama3 = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    size = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0,
        "pad_token_id": 1,
    }  # fmt: skip
    gqa, mha = size | {"num_key_value_heads": 2}, size | {"num_key_value_heads": 4}
    return {
        "apertus": ApertusConfig(**gqa, rope_parameters=llama3),
        "apertus tied mha": ApertusConfig(**mha, rope_parameters=plain, tie_word_embeddings=True),
        "apertus relu2": ApertusConfig(**gqa, rope_parameters=plain, hidden_act="relu2"),
        "llama": LlamaConfig(**gqa, rope_parameters=llama3, rms_norm_eps=1e-5),
        "llama geglu biases": LlamaConfig(
            **mha,
            rope_parameters=plain,
            hidden_act="gelu",
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
        # more rows than the tokenizer has ids, and than Megatron would pad those to
        "llama head_dim": LlamaConfig(
            **gqa | {"vocab_size": 530}, rope_parameters=plain, head_dim=12, hidden_act="relu"
        ),
        "arcee": ArceeConfig(**gqa, rope_parameters=plain),
        "qwen2": Qwen2Config(**gqa, rope_parameters=plain, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**gqa, rope_parameters=plain, head_dim=8),
        "starcoder2": Starcoder2Config(**gqa, rope_parameters=plain),
        "starcoder2 untied": Starcoder2Config(
            **mha, rope_parameters=plain, use_bias=False, hidden_act="relu2", tie_word_embeddings=False
        ),
    }


def save_hf(config, folder: Path, tokenizer: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A random model of this config, no two tensors alike, as transformers saves it, with a tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def hf_models(runs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hf")
    configs = hf_configs().items()
    return {name: save_hf(config, folder / name.replace(" ", "-"), runs.tokenizer) for name, config in configs}


def in_process(function: Callable, *args):
    """function(*args) in a process of its own, without a GPU: there Megatron may take the process over."""
    with processes() as context, context.Pool(1) as pool:
        return pool.apply(_told, (function, *args))


def _told(function: Callable, *args):
    try:
        return function(*args)
    except Exception as error:
        raise AssertionError(traceback.format_exc()) from error
