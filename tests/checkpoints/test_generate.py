"""`xact generate`: the same greedy text from a run and from its export, sampling that repeats, and clear refusals."""

from pathlib import Path

import pytest
import torch
from commands import xact
from saved import in_process

PROMPT = "def decode(text):\n    return"


def texts(run: Path, out: Path) -> dict:
    """What a run and its export generate, in one process."""
    from transformers import AutoModelForCausalLM

    from megatron_xact.checkpoints.export import export
    from megatron_xact.checkpoints.generate import generate, prompt_ids, text_of
    from megatron_xact.checkpoints.model import load

    export(run, out, verify=False)
    megatron, hugging_face = load(run), load(out)
    tokenizer = hugging_face.tokenizer()
    ids = prompt_ids(tokenizer, PROMPT)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    theirs = plain.generate(
        torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False
    )[0, len(ids) :]
    pieces = list(text_of(tokenizer, ids, iter(generate(megatron, ids, 24))))
    euro = tokenizer("€")["input_ids"]  # not in the training text: three byte tokens
    found = {
        "megatron": list(generate(megatron, ids, 24)),
        "hugging face": list(generate(hugging_face, ids, 24)),
        "transformers": theirs.tolist(),
        "text": "".join(pieces),
        "whole text": tokenizer.decode(ids + list(generate(megatron, ids, 24))),
        "sampled": [
            list(generate(model, ids, 20, temperature=1.5, seed=seed))
            for model in (megatron, hugging_face)
            for seed in (0, 1)
        ],
        "room": (len(list(generate(megatron, ids, 1000))) + len(ids), megatron.max_length),
        "euro": (len(euro), list(text_of(tokenizer, ids, iter(euro)))),
        "empty": prompt_ids(tokenizer, ""),
    }
    found["command"] = xact("generate", out, "--greedy", "--prompt", "import os", "--tokens", 5)
    first = found["megatron"][0]
    found["ended"] = list(generate(megatron, ids, 24, end=first))
    for name, options in {"hot": {"temperature": -1.0}, "long": {}}.items():
        try:
            list(generate(megatron, ids * 20 if name == "long" else ids, 4, **options))
            found[name] = "nothing was said"
        except ValueError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def generated(runs, tmp_path_factory) -> dict:
    return in_process(texts, runs["apertus tp2"], tmp_path_factory.mktemp("generate") / "export")


def test_greedy_tokens_are_those_of_transformers(generated):
    assert len(generated["transformers"]) == 24
    assert generated["megatron"] == generated["hugging face"] == generated["transformers"]


def test_the_pieces_make_up_the_text(generated):
    assert PROMPT + generated["text"] == generated["whole text"]


def test_a_character_of_several_tokens_comes_with_its_last(generated):
    count, pieces = generated["euro"]
    assert count > 1 and pieces == [""] * (count - 1) + ["€"]


def test_samples_depend_on_the_seed_and_not_on_the_kind_of_model(generated):
    megatron_0, megatron_1, hugging_face_0, hugging_face_1 = generated["sampled"]
    assert megatron_0 == hugging_face_0 and megatron_1 == hugging_face_1
    assert megatron_0 != megatron_1


def test_it_stops_at_the_end_token_and_at_the_context(generated):
    assert generated["ended"] == []
    found, context = generated["room"]
    assert found == context == 64


def test_an_empty_prompt_begins_a_document(generated):
    assert generated["empty"] == [0]


def test_impossible_requests_are_refused(generated):
    assert "temperature -1.0 must be 0 (greedy) or a positive number" in generated["hot"]
    assert "fills the model's context of 64" in generated["long"]


def test_the_command_prints_the_prompt_and_its_continuation(generated):
    code, out, error = generated["command"]
    assert code == 0, error
    assert out.startswith("import os") and len(out) > len("import os\n")
    assert error.startswith("5 tokens in")
