"""`xact generate`: a quick look at what a model writes, from a Megatron checkpoint or a Hugging Face folder.

One sequence at a time, in fp32. A Hugging Face model keeps its keys and values; a Megatron model is run over the whole
text again for each token, which is slow, but is the very computation that was trained.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_xact.checkpoints import model as models
from megatron_xact.checkpoints.model import Model


def main(args: argparse.Namespace) -> int:
    """The subcommand: the prompt and its continuation go to stdout, token by token, the speed to stderr."""
    model = models.load(args.folder, args.step)
    tokenizer = model.tokenizer(args.tokenizer)
    ids = prompt_ids(tokenizer, args.prompt)
    temperature = 0.0 if args.greedy else args.temperature
    print(args.prompt, end="", flush=True)
    started, made = time.monotonic(), 0
    tokens = generate(model, ids, args.tokens, temperature, args.seed, end=tokenizer.eos_token_id)
    for piece in text_of(tokenizer, ids, tokens):
        print(piece, end="", flush=True)
        made += 1
    print()
    seconds = time.monotonic() - started
    full = f"; stopped at the model's context of {model.max_length}" if len(ids) + made >= model.max_length else ""
    print(f"{made} tokens in {seconds:.1f} s ({made / max(seconds, 1e-9):.1f}/s){full}", file=sys.stderr)
    return 0


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Token ids of the prompt; of an empty one, the token that separates documents."""
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids:
        if tokenizer.eos_token_id is None:
            raise ValueError("an empty prompt needs a tokenizer with an end-of-document token; give --prompt some text")
        ids = [tokenizer.eos_token_id]
    return ids


def generate(
    model: Model, ids: list[int], num_tokens: int, temperature: float = 0.0, seed: int = 0, end: int | None = None
) -> Iterator[int]:
    """Up to `num_tokens` ids after `ids`; fewer when `end` comes (it is not yielded) or the context is full.

    temperature 0: the likeliest token each time. ValueError: a negative temperature, or no room after the prompt.
    """
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature} must be 0 (greedy) or a positive number")
    if len(ids) >= model.max_length:
        raise ValueError(f"the prompt has {len(ids)} tokens, which fills the model's context of {model.max_length}")
    generator = torch.Generator().manual_seed(seed)
    predict = _Predictor(model)
    ids = list(ids)
    for _ in range(min(num_tokens, model.max_length - len(ids))):
        logits = predict(ids)
        if temperature == 0.0:
            token = int(logits.argmax())
        else:
            probabilities = torch.softmax(logits.double() / temperature, dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == end:
            return
        ids.append(token)
        yield token


def text_of(tokenizer, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
    """What each token adds to the text. A character of several tokens comes with its last one."""
    ids = list(prompt)
    shown = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield ""
            continue
        yield text[len(shown) :]
        shown = text


class _Predictor:
    """The logits [vocab_size], fp32 on the CPU, after a sequence that grows by one token per call."""

    def __init__(self, model: Model):
        self.model = model
        self.cache, self.done = None, 0

    @torch.no_grad()
    def __call__(self, ids: list[int]) -> Tensor:
        if self.model.source.kind == "megatron":
            return self.model.logits(torch.tensor([ids]))[0, -1].cpu()
        new = torch.tensor([ids[self.done :]], device=self.model.device)
        out = self.model.module(input_ids=new, past_key_values=self.cache, use_cache=True)
        self.cache, self.done = out.past_key_values, len(ids) if out.past_key_values is not None else 0
        return out.logits[0, -1, : self.model.vocab_size].float().cpu()
