"""A first look at what a model writes: plain sampling from the Megatron model in memory, on all its ranks at once."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.tokenizers import MegatronTokenizer

TEMPERATURE = 0.8


@torch.no_grad()
def generate(
    model: torch.nn.Module, tokenizer: MegatronTokenizer, prompt: str, num_tokens: int, seq_length: int
) -> str:
    """`prompt` and up to `num_tokens` more, as text. Recomputes the whole window for each token: for small models.

    A collective over the tensor-parallel group: the gathered logits and the seed are the same on every rank, so the
    samples are too. Without pipeline parallelism only. Stops at the end-of-document token.
    """
    device = torch.cuda.current_device()
    generator = torch.Generator().manual_seed(0)
    ids = list(tokenizer.tokenize(prompt))
    training = model.training
    model.eval()
    for _ in range(num_tokens):
        window = ids[-seq_length:]
        # A full window, whatever its content: the mask is causal, and sequence parallelism needs a fixed length.
        tokens = torch.full((1, seq_length), tokenizer.eod, dtype=torch.long, device=device)
        tokens[0, : len(window)] = torch.tensor(window, device=device)
        positions = torch.arange(seq_length, device=device)[None]
        logits = model(tokens, positions, None)[:, len(window) - 1]  # [1, vocab/tp]
        logits = gather_from_tensor_model_parallel_region(logits)[0, : tokenizer.vocab_size].float().cpu()
        probabilities = torch.softmax(logits / TEMPERATURE, dim=-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if ids[-1] == tokenizer.eod:
            break
    model.train(training)
    return tokenizer.detokenize(ids)
