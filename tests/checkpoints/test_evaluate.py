"""`xact eval`: loss on indexed data against plain transformers, and a task of lm-evaluation-harness scored by hand."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import xact
from saved import ROOT, in_process

from megatron_xact.pretraining.data.indexed import SplitWriter

LENGTH, TOKENS = 32, 1000  # not a multiple: the last window is short


def losses(run: Path, out: Path, data: Path) -> dict:
    """Of a run and its export, as `xact eval` finds them; and of the export, one token at a time, in transformers."""
    from transformers import AutoModelForCausalLM

    from megatron_xact.checkpoints.evaluate import loss
    from megatron_xact.checkpoints.export import export
    from megatron_xact.checkpoints.model import load

    export(run, out, verify=False)
    prefix = data / "validation_text_document"
    found = {}
    for kind, folder in (("megatron", run), ("hugging face", out)):
        model = load(folder)
        for stride in (LENGTH, 8):
            found[kind, stride] = loss(model, prefix, LENGTH, stride, batch_size=3, max_tokens=TOKENS)
        found[kind, "whole"] = loss(model, prefix, LENGTH)
        found[kind, "default"] = loss(model, prefix, max_tokens=100).seq_length
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokens = torch.from_numpy(np.fromfile(f"{prefix}.bin", dtype=np.uint16)[: TOKENS + 1].astype(np.int64))
    for stride in (LENGTH, 8):
        found["plain", stride] = nats_one_by_one(plain, tokens, LENGTH, stride)
    found["all tokens"] = Path(f"{prefix}.bin").stat().st_size // 2
    return found


@torch.no_grad()
def nats_one_by_one(model, tokens: torch.Tensor, length: int, stride: int) -> float:
    """Mean cross entropy, each token predicted from its own context, which the sizes prescribe: position i is in the
    first window if i <= length, and else in the first one (they start every `stride`) that reaches it."""
    total = 0.0
    for i in range(1, len(tokens)):
        start = 0 if i <= length else -(-(i - length) // stride) * stride
        logits = model(tokens[None, start:i]).logits[0, -1].double()
        total += float(torch.logsumexp(logits, 0) - logits[tokens[i]])
    return total / (len(tokens) - 1)


@pytest.fixture(scope="module")
def measured(runs, tmp_path_factory) -> dict:
    return in_process(losses, runs["apertus tp2"], tmp_path_factory.mktemp("evaluate") / "export", runs.folder / "data")


@pytest.mark.parametrize("stride", [LENGTH, 8])
def test_the_loss_is_that_of_plain_transformers(measured, stride):
    truth = measured["plain", stride]
    for kind in ("megatron", "hugging face"):
        found = measured[kind, stride]
        assert found.nats_per_token == pytest.approx(truth, abs=2e-6), kind
        assert found.perplexity == pytest.approx(math.exp(truth), rel=1e-5)
        assert (found.tokens, found.seq_length, found.stride) == (TOKENS, LENGTH, stride)
    assert abs(measured["plain", 8] - measured["plain", LENGTH]) > 1e-5  # more context is another number


def test_every_token_of_the_file_counts_once(measured):
    assert measured["megatron", "whole"].tokens == measured["all tokens"] - 1


def test_bits_per_byte_come_from_the_bytes_that_were_encoded(measured, runs):
    record = json.loads((runs.folder / "data" / "data.json").read_text())["validation"]
    found = measured["megatron", "whole"]
    bits = found.nats_per_token / math.log(2) * record["tokens"]
    assert found.bits_per_byte == pytest.approx(bits / record["bytes"], rel=1e-12)


def test_windows_are_as_long_as_in_training_unless_told(measured):
    assert measured["megatron", "default"] == 32
    assert measured["hugging face", "default"] == 64  # an export knows only how many positions there are


# lm-evaluation-harness

TASK = """
task: nearest
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{folder}/items.jsonl"}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{stem}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
ITEMS = [
    {"stem": f"value {i} is", "choices": [f" {w}" for w in ("true", "none", "self", "print")], "answer": i % 4}
    for i in range(12)
]


PAIRS = {
    "agreement": [("these values are sorted", "these values is sorted"), ("it has a name", "it have a name")],
    "order": [("import the module", "the import module"), ("return a value", "value a return"), ("if so", "so if")],
}


def log_probability(model, context: list[int], ids: list[int]) -> float:
    with torch.no_grad():
        logs = model(torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
    return float(sum(logs[len(context) + i - 1, token] for i, token in enumerate(ids)))


def by_hand(folder: Path) -> tuple[float, float]:
    """Accuracy of ITEMS (the choice with the largest summed log-probability after the stem), and the mean of those of
    PAIRS (whole sentences, after the end-of-document token and, as the harness has it, a space)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = []
    for item in ITEMS:
        stem = tokenizer(item["stem"])["input_ids"]
        wholes = [tokenizer(item["stem"] + choice)["input_ids"] for choice in item["choices"]]
        sums = [log_probability(model, stem, ids[len(stem) :]) for ids in wholes]
        right.append(int(np.argmax(sums)) == item["answer"])
    means = []
    for pairs in PAIRS.values():
        sums = [[log_probability(model, [0], tokenizer(" " + s)["input_ids"]) for s in pair] for pair in pairs]
        means.append(np.mean([good > bad for good, bad in sums]))
    return float(np.mean(right)), float(np.mean(means))


def tasks(model: Path, folder: Path) -> dict:
    output = folder / "results.json"
    words = ("--include-path", folder, "--output", output, "--batch-size", 1)
    code, out, error = xact("eval", model, "--tasks", "nearest,pairs", *words)
    scores = json.loads(output.read_text())["tasks"] if code == 0 else []
    unknown = xact("eval", model, "--tasks", "nearst", "--include-path", folder)
    return {"code": code, "out": out, "error": error, "scores": scores, "unknown": unknown, "truth": by_hand(model)}


def test_local_tasks_are_scored_as_by_hand(hf_models, tmp_path):
    for needed in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed (the eval extra)")
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(item) for item in ITEMS))
    (tmp_path / "nearest.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "pairs").mkdir()
    for name, pairs in PAIRS.items():
        lines = (json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in pairs)
        (tmp_path / "pairs" / f"{name}.jsonl").write_text("\n".join(lines))
    command = [sys.executable, ROOT / "tools" / "blimp_tasks.py", tmp_path / "pairs", tmp_path, "--group", "pairs"]
    subprocess.run(command, check=True, capture_output=True)

    found = in_process(tasks, hf_models["llama"], tmp_path)
    assert found["code"] == 0, found["error"]
    scores = {(score["task"], score["metric"]): score for score in found["scores"]}
    assert set(scores) == {(name, "acc") for name in ("nearest", "pairs", "pairs_agreement", "pairs_order")}
    nearest, pairs = found["truth"]
    assert scores["nearest", "acc"]["value"] == pytest.approx(nearest) and 0 < nearest < 1
    assert scores["pairs", "acc"]["value"] == pytest.approx(pairs) and 0 < pairs < 1
    row = next(line for line in found["out"].splitlines() if line.startswith("nearest"))
    assert row.split()[1:3] == ["acc", f"{nearest:.4f}"] and "+-" in row
    code, _, error = found["unknown"]
    assert code == 2 and "unknown task 'nearst'" in error


# The command

REFUSED = {
    "nothing": ([], "nothing to evaluate"),
    "no data": (["--data", "no/such"], "there is no no/such.idx: is the path right?"),
    "long": (["--data", "DATA", "--seq-length", "65"], "--seq-length 65 must be from 1 to the model's context of 64"),
    "stride": (["--data", "DATA", "--stride", "65"], "--stride 65 must be from 1 to --seq-length 64"),
    "tokens": (["--data", "OTHER"], "holds token 59999, the model knows 500: made with another tokenizer"),
    "tasks": (["--tasks", "x", "--include-path", "no/such"], "no such folder: no/such"),
}


def commands(model: Path, run: Path, data: Path, other: Path) -> dict:
    places = {"DATA": data, "OTHER": other}
    found = {
        name: xact("eval", model, *(places.get(word, word) for word in words)) for name, (words, _) in REFUSED.items()
    }
    few = ("--data", data, "--max-tokens", 300)
    found |= {"json": xact("eval", model, *few, "--json"), "table": xact("eval", model, *few)}
    return found | {"tasks of a run": xact("eval", run, "--tasks", "x")}


@pytest.fixture(scope="module")
def commanded(hf_models, runs, tmp_path_factory) -> dict:
    other = tmp_path_factory.mktemp("other")
    writer = SplitWriter(other, "other", 60_000)
    writer.add([1, 2, 59_999], 9)
    writer.finish()
    data = runs.folder / "data" / "validation_text_document"
    return in_process(commands, hf_models["llama"], runs["apertus tp2"], data, other / "other")


def test_the_command_prints_json_and_a_table(commanded):
    code, out, error = commanded["json"]
    assert code == 0, error
    [found] = json.loads(out)["losses"]
    assert found["tokens"] == 300 and found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    _, table, _ = commanded["table"]
    assert f"loss {found['nats_per_token']:.4f} nats/token" in table and "bits/byte" in table


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_end_in_one_line(commanded, name):
    code, out, error = commanded[name]
    assert (code, out) == (2, "") and REFUSED[name][1] in error
    assert len(error.strip().splitlines()) == 1, error


def test_tasks_of_a_run_ask_for_its_export(commanded):
    code, _, error = commanded["tasks of a run"]
    assert code == 2 and "xact export" in error
