"""`xact export` of real runs, against Megatron's own model, transformers, and the safetensors library."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from saved import RUNS, VOCABULARY, execute, in_process

from megatron_xact.checkpoints import safetensors_io, tokenizer_files
from megatron_xact.checkpoints.export import export, size_in_bytes
from megatron_xact.checkpoints.folders import whole_folder
from megatron_xact.checkpoints.importing import import_checkpoint
from megatron_xact.checkpoints.megatron_io import open_checkpoint
from megatron_xact.pretraining.checkpointing import checksums

pytestmark = pytest.mark.distributed


def export_verified(checkpoints: dict[str, Path], folder: Path) -> dict[str, str]:
    """Exports with the comparison of logits, which is on by default; name -> what it said."""
    return {name: export(path, folder / name.replace(" ", "-")).verified for name, path in checkpoints.items()}


def changed_rule(rule, **changes):
    return dataclasses.replace(rule, **changes)


def swapped(stock):
    return lambda *args: [changed_rule(r, hf=(r.hf[0], r.hf[2], r.hf[1])) for r in stock(*args)]


def constrained(stock):
    def xielu(*args):
        rule = stock(*args)

        def export_effective(*raw):
            p, n, *rest = rule.export(*raw)
            return torch.nn.functional.softplus(p), torch.nn.functional.softplus(n) + 0.5, *rest

        return changed_rule(rule, export=export_effective)

    return xielu


def without_beta(stock):
    def xielu(*args):
        rule = stock(*args)
        return changed_rule(
            rule, hf=(*rule.hf[:2], rule.hf[3]), export=lambda *raw: (*rule.export(*raw)[:2], rule.export(*raw)[3])
        )

    return xielu


def other_theta(stock):
    def config(*args):
        written = stock(*args)
        written["rope_theta"] = written["rope_parameters"]["rope_theta"] = 10000.0
        if written["rope_scaling"]:
            written["rope_scaling"]["rope_theta"] = 10000.0
        return written

    return config


# What a wrong converter would do: (where, what it gets wrong, how)
FAULTS = {
    "k and v swapped": ("mapping", "_qkv", swapped),
    "alpha constrained": ("mapping", "_xielu", constrained),
    "no beta": ("mapping", "_xielu", without_beta),
    "wrong theta": ("export", "to_hf", other_theta),
}


def all_exports(checkpoints: dict[str, Path], folder: Path, broken: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What verified exports said by name, and with what a broken conversion of `broken` ended, by fault."""
    import importlib

    said = export_verified(checkpoints, folder)
    ended = {}
    for fault, (module, name, wrong) in FAULTS.items():
        where = importlib.import_module(f"megatron_xact.checkpoints.{module}")
        stock = getattr(where, name)
        setattr(where, name, wrong(stock))
        try:
            export(broken, folder / "broken" / "out")
            ended[fault] = "not noticed"
        except ValueError as error:
            ended[fault] = str(error)
        setattr(where, name, stock)
    return said, ended


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory) -> tuple[Path, dict[str, str], dict[str, str]]:
    runs.start(*RUNS)
    folder = tmp_path_factory.mktemp("exports")
    return folder, *in_process(all_exports, {name: runs[name] for name in RUNS}, folder, runs["apertus tp2"])


def exported(exports, name: str) -> Path:
    return exports[0] / name.replace(" ", "-")


@pytest.mark.parametrize("name", RUNS)
def test_logits_are_those_of_megatrons_own_model(exports, name):
    said = exports[1][name]
    assert "tensors equal" in said and "16 of 16 greedy tokens alike" in said
    assert float(said.partition("logits within ")[2].split()[0]) <= 1e-4


@pytest.mark.parametrize("name", RUNS)
def test_transformers_finds_all_it_wants_and_no_more(exports, name):
    import transformers

    folder = exported(exports, name)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=RUNS[name][0] == "xact"
    )
    assert not any(info.values()), info
    assert model.config.model_type == RUNS[name][0]
    assert model.config.vocab_size == VOCABULARY == model.get_input_embeddings().weight.shape[0]
    text = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=RUNS[name][0] == "xact")
    ids = text("def f(x):", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False, min_new_tokens=4).shape[1] == ids.shape[1] + 4
    assert (model.config.eos_token_id, model.config.pad_token_id) == (text.eos_token_id, text.pad_token_id)
    # What vLLM's transformers backend builds.
    without_head = transformers.AutoModel.from_pretrained(folder, trust_remote_code=RUNS[name][0] == "xact")
    assert torch.equal(model.lm_head(without_head(ids).last_hidden_state), model(ids).logits)


def test_rows_of_every_tensor_parallel_rank_are_in_their_place(runs, exports):
    """Gated, saved by 4 ranks: against the shards themselves, read with torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    folder = runs["llama tp4"] / "iter_0000002"
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    key = "decoder.layers.mlp.linear_fc1.weight"
    assert isinstance(entries[key], TensorStorageMetadata) and len(entries[key].chunks) >= 4 * 4
    whole = {key: torch.empty(entries[key].size)}
    load(whole, storage_reader=FileSystemReader(folder), no_dist=True)
    weights = load_file(exported(exports, "llama tp4") / "model.safetensors")
    for layer in range(4):
        gate, up = (weights[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up"))
        assert torch.equal(torch.cat([gate, up]), whole[key][layer])


def test_alphas_are_raw_and_all_four_tensors_are_there(runs, exports):
    weights = load_file(exported(exports, "apertus pp2") / "model.safetensors")
    recorded = [json.loads(line) for line in (runs["apertus pp2"] / "alphas.jsonl").read_text().splitlines()][-1]
    for layer in range(4):
        act = {n: weights[f"model.layers.{layer}.mlp.act_fn.{n}"] for n in ("alpha_p", "alpha_n", "beta", "eps")}
        assert [tuple(t.shape) for t in act.values()] == [(1,), (1,), (), ()]
        a_p, a_n = (float(torch.nn.functional.softplus(act[n])) for n in ("alpha_p", "alpha_n"))
        effective = recorded["alphas"][str(layer + 1)]  # as the run itself saw them
        assert a_p == pytest.approx(effective["alpha_p"], rel=1e-6)
        assert float(act["beta"]) == pytest.approx(effective["beta"], rel=1e-6)
        assert a_n + float(act["beta"]) == pytest.approx(effective["alpha_n"], rel=1e-6)
        assert float(act["beta"]) != 0.5  # it was trained


def test_the_model_card_tells_recipe_and_losses(runs, exports):
    text = (exported(exports, "apertus tp2") / "README.md").read_text()
    loss = json.loads((runs["apertus tp2"] / "progress.jsonl").read_text().splitlines()[-1])["loss"]
    assert f"{loss:.4f} nats per token at step 2" in text and "validation loss" in text
    assert 'name = "xielu"' in text and "lr = 0.02" in text and "`ApertusForCausalLM`" in text
    assert str(runs.folder) not in text  # nothing of the machine
    assert "trust_remote_code" in (exported(exports, "xact vpp2") / "README.md").read_text()


@pytest.mark.parametrize("dtype, kind", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_dtypes_and_shards(runs, exports, tmp_path, dtype, kind):
    done = export(runs["apertus tp2"], tmp_path / "out", dtype=dtype, max_shard_size="20KB", verify=False)
    exact = load_file(exported(exports, "apertus tp2") / "model.safetensors")
    index = json.loads((tmp_path / "out" / safetensors_io.INDEX).read_text())
    assert done.files == len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(t.numel() * kind.itemsize for t in exact.values()) == done.bytes
    assert index["weight_map"].keys() == exact.keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), exact[name].to(kind))
    for file in set(index["weight_map"].values()):
        path = tmp_path / "out" / file
        assert path.stat().st_size < 21_000 or len(load_file(path)) == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")


def test_one_iteration_by_folder_or_by_step(runs, tmp_path):
    run = runs["arcee"]
    a = export(run / "iter_0000002", tmp_path / "a", verify=False)
    b = export(run, tmp_path / "b", step=2, verify=False)
    assert a.dtype == b.dtype == "bfloat16"  # the run's own
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_weights_that_are_not_what_was_saved(runs, tmp_path):
    """A flipped bit makes another weight: only the run's checksums tell it."""
    run = shutil.copytree(runs["arcee"], tmp_path / "run")
    (checkpoint,) = run.glob("iter_*")
    shard = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for into in (export, import_checkpoint):
        with pytest.raises(ValueError, match=f"is damaged: {shard.name} is not what was saved"):
            into(run, tmp_path / "out", verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_conversion_is_noticed_and_leaves_nothing(exports, fault):
    folder, _, ended = exports
    assert "the exported model is not the checkpoint's" in ended[fault] or "lacks" in ended[fault], ended[fault]
    assert "A: the checkpoint, B: the export" in ended["wrong theta"]
    assert list((folder / "broken").iterdir()) == []


# Clean ends


@pytest.fixture
def refused(runs, tmp_path):
    """The one line with which an export of (a copy of) the tied run ends; nothing is left then."""

    def run(checkpoint: Path | None = None, kind=ValueError, **options) -> str:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(kind) as error:
            export(checkpoint or runs["apertus pp2"], tmp_path / "out", **({"verify": False} | options))
        assert sorted(tmp_path.iterdir()) == before
        assert "\n" not in str(error.value)
        return str(error.value)

    return run


@pytest.fixture
def damaged(runs, tmp_path):
    """A copy of the run, its index changed by a function of {name: entry}."""

    def make(change) -> Path:
        copy = shutil.copytree(runs["apertus pp2"], tmp_path / "damaged")
        path = copy / "iter_0000002" / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata.state_dict_metadata)
        path.write_bytes(pickle.dumps(metadata))
        (copy / "iter_0000002" / checksums.NAME).unlink()  # which would tell it first
        return copy

    return make


def test_a_missing_and_an_unexpected_tensor(damaged, refused):
    def rename(entries):
        entries["decoder.layers.mlp.extra.weight"] = entries.pop("decoder.layers.mlp.linear_fc2.weight")

    said = refused(damaged(rename))
    assert "lacks decoder.layers.0.mlp.linear_fc2.weight" in said and "and 1 more" in said


def test_an_unexpected_tensor(damaged, refused):
    def add(entries):
        entries["decoder.layers.mlp.extra.weight"] = entries["decoder.layers.mlp.linear_fc2.weight"]

    assert "has unexpected decoder.layers.0.mlp.extra.weight" in refused(damaged(add))


def test_a_damaged_checkpoint(runs, tmp_path, refused):
    copy = shutil.copytree(runs["apertus pp2"], tmp_path / "copy")
    (copy / "iter_0000002" / ".metadata").write_bytes(b"nothing")
    assert "is damaged" in refused(copy) or "cannot be read" in refused(copy)
    shutil.rmtree(copy / "iter_0000002")
    assert "is missing" in refused(copy, OSError)
    assert "no such checkpoint" in refused(tmp_path / "nowhere", OSError)


def test_a_missing_tokenizer(runs, tmp_path, refused):
    assert "no tokenizer.json" in refused(tokenizer=tmp_path)
    with pytest.raises(ValueError, match="the run used none; name a Hugging Face one's folder with --tokenizer"):
        tokenizer_files.of_checkpoint(Namespace(), tmp_path)
    small = tmp_path / "small"
    small.mkdir()
    (small / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 600}}, "added_tokens": []}))
    assert "has 601 ids, the model's embedding 512 rows" in refused(tokenizer=small)


def test_an_existing_folder_is_kept(runs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(runs["arcee"], out, verify=False)
    export(runs["arcee"], out, verify=False, overwrite=True)
    assert (out / "config.json").is_file()
    assert (tmp_path / "out.replaced-1" / "mine").read_text() == "precious"


def test_too_little_room(tmp_path):
    with pytest.raises(OSError, match="not enough room"):
        with whole_folder(tmp_path / "out", 10**18):
            raise AssertionError("written without room")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_its_name_only_when_its_files_are_on_the_disk(tmp_path, monkeypatch):
    on_disk, fsync, rename = set(), os.fsync, Path.rename

    def synced(number: int) -> None:
        fsync(number)
        on_disk.add(os.fstat(number).st_ino)

    def renamed(folder: Path, target: Path) -> Path:
        assert {path.stat().st_ino for path in folder.rglob("*") if path.is_file()} <= on_disk
        return rename(folder, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    with whole_folder(tmp_path / "out", 0) as folder:
        (folder / "tokenizer").mkdir()
        for name in ("model.safetensors", "tokenizer/tokenizer.json"):
            (folder / name).write_text(name)
    assert len(list((tmp_path / "out").rglob("*.*"))) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left")], ids=["Ctrl-C", "full disk"])
def test_interrupted_while_writing(runs, tmp_path, monkeypatch, error):
    from megatron_xact.pretraining.data.progress import Progress

    blocks = []

    def interrupted(self, size):
        blocks.append(size)
        if len(blocks) == 7:
            (partial,) = tmp_path.iterdir()
            assert partial.name.startswith(".out.partial") and (partial / "model.safetensors").is_file()
            raise error

    monkeypatch.setattr(Progress, "update", interrupted)
    with pytest.raises((KeyboardInterrupt, OSError)):
        export(runs["arcee"], tmp_path / "out", verify=False)
    assert len(blocks) == 7 and list(tmp_path.iterdir()) == []


def poisoned(runs, folder: Path, name: str, value: float) -> Path:
    """A checkpoint like the tied run's, with one value changed."""
    from megatron_xact.checkpoints import mapping, megatron_io
    from megatron_xact.checkpoints.architecture import from_megatron

    source = open_checkpoint(runs["apertus pp2"])
    tensors = [t for rule in mapping.table(from_megatron(source.args, VOCABULARY)) for t in rule.megatron]

    def produce(tensor):
        data = source.read(tensor)
        if tensor.name == name:
            data.view(-1)[-1] = value
        return data

    megatron_io.write(folder / "release", tensors, {t.name: torch.float32 for t in tensors}, produce, source.args)
    return folder / "release"


@pytest.mark.parametrize(
    "name, value, dtype, said",
    [
        ("decoder.layers.2.mlp.activation_func.alpha_n", float("nan"), "fp32", "alpha_n has the effective value nan"),
        ("decoder.layers.2.mlp.activation_func.alpha_p", 1e8, "fp32", "out of range"),
        ("decoder.layers.1.mlp.linear_fc2.weight", float("inf"), "fp32", "down_proj.weight holds inf, which is not"),
        ("decoder.layers.1.mlp.linear_fc2.weight", 1e6, "fp16", "holds 1000000.0, which does not fit into"),
    ],
)
def test_values_that_no_model_has(runs, tmp_path, refused, name, value, dtype, said):
    assert said in refused(poisoned(runs, tmp_path / "bad", name, value), dtype=dtype, tokenizer=runs.tokenizer)


def test_a_byte_that_changed_on_disk_is_noticed(tmp_path):
    shapes = {"a": (3, 5), "b": (7,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    shards = safetensors_io.plan(shapes, torch.float32, 10**9)
    sums = safetensors_io.write(tmp_path, shards, tensors.items(), torch.float32, lambda size: None)
    safetensors_io.verify_checksums(tmp_path, shards, sums)
    path = tmp_path / shards[0].file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="b in model.safetensors reads back differently"):
        safetensors_io.verify_checksums(tmp_path, shards, sums)


def test_sizes():
    assert [size_in_bytes(s) for s in ("2GB", "1.5mb", "100", 7, "3K")] == [2 * 10**9, 1_500_000, 100, 7, 3000]
    for wrong in ("", "0", "much", "-1GB"):
        with pytest.raises(ValueError, match="max-shard-size"):
            size_in_bytes(wrong)


def test_the_command(runs, tmp_path):
    command = [sys.executable, "-m", "megatron_xact", "export", str(runs["arcee"]), str(tmp_path / "out")]
    done = execute(command)
    assert done.returncode == 0, done.stdout
    assert "ArceeForCausalLM, relu2, bfloat16" in done.stdout and "greedy tokens alike" in done.stdout
    again = execute(command)
    assert again.returncode == 2 and again.stdout.splitlines()[-1].startswith("xact: error: ")
    assert "exists already" in again.stdout.splitlines()[-1]
