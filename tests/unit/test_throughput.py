"""The share of the GPUs' peak that progress shows, against a count by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_xact.pretraining import arguments, cpu_platform, throughput

WORDS = """--num-layers 3 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --kv-channels 16
--group-query-attention --num-query-groups 2 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2
--global-batch-size 16 --train-iters 10 --lr 1e-3 --swiglu --mock-data --tokenizer-type NullTokenizer --vocab-size 500
--transformer-impl local --untie-embeddings-and-output-weights --disable-bias-linear
"""


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),  # dense bf16, of the boards' data sheets
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 PCIe", None),  # slower than its name
        ("Some GPU", None),
    ],
)
def test_mfu_is_the_models_operations_over_the_peak_of_all_gpus(monkeypatch, name, peak):
    args = arguments.parse(WORDS.split())
    args.rank, args.world_size = 0, 8
    arguments.fill_in(args)
    args.padded_vocab_size = 512
    monkeypatch.setattr(cpu_platform, "is_active", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96  # q; k and v of half as many heads; output; a gated MLP
    scores = 2 * 32 * 64 / 2  # and values: of each position, with half of the others on average
    per_token = 6 * (3 * (layer + scores) + 64 * 512)  # a multiplication and an addition; forward, and twice that back
    assert throughput.model_flops(args, 1000.0) == pytest.approx(1000.0 * per_token)
    assert throughput.mfu(args, 1000.0) == (peak and pytest.approx(1000.0 * per_token / (8 * peak), rel=1e-3))
    assert throughput.mfu(args, None) is None
