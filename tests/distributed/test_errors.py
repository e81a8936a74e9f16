"""What cannot run: exit code 2 and one line that names it, before any rank starts, and nothing written.

Most of it is told by the launching process before it starts ranks, so these call the command in this process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training import DISTRIBUTED, GATED, MARKS, PP2, ROOT, TP2, VIRTUAL, Trainings, copy_of, execute, trainings

from megatron_xact import cli
from megatron_xact.pretraining import exits, status
from megatron_xact.pretraining.checks import validate
from megatron_xact.pretraining.config import load
from megatron_xact.pretraining.platform import default_processes
from megatron_xact.pretraining.watchdog import Watchdog

pytestmark = MARKS


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Trainings:
    return trainings(tmp_path_factory.getbasetemp()).start("one", "dp2")


def files_below(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def the_one_line(code: int, out: str, err: str) -> str:
    assert code == 2, err
    assert out == ""
    assert err.startswith("xact: error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def refused(runs, tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """The line told for a command that must be refused, with `save` a folder that must not come to be."""
    for name in ("RANK", "WORLD_SIZE", "XACT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str, config: Path = runs.config, ranks: int = 1) -> str:
        before = files_below(tmp_path)
        save = str(tmp_path / "save")
        capsys.readouterr()
        code = cli.main(["pretrain", str(config), "--nproc-per-node", str(ranks), "--save", save, *words])
        assert files_below(tmp_path) == before
        return the_one_line(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    "words, ranks, told",
    [
        (["--num-layer", "3"], 1, "unknown argument 'num-layer'; nearest: 'num-layers'"),
        (["--set", "modle.num-layers=3"], 1, "unknown table [modle]"),
        (["--set", "xact.guard=3"], 1, "unknown key 'guard'"),
        (["--set", "model.num-layers=two"], 1, "num-layers = 'two'"),
        (["--train-iters", "many"], 1, "--train-iters many: expected an integer"),
        (["--set", "activation.name=xielo"], 1, "unknown activation 'xielo'; did you mean xielu"),
        (["--set", "activation.alpha_n=0.1"], 1, "alpha_n"),
        ([*PP2, "--set", "xact.sample-tokens=8"], 2, "sample-tokens needs pipeline-model-parallel-size = 1"),
        ([], -1, "--nproc-per-node -1 and --nnodes 1 must be at least 1"),
        (["--nnodes", "2", "--node-rank", "2"], 1, "--node-rank 2 must be from 0 to 1"),
        (
            ["--tensor-model-parallel-size", "3"],
            3,
            "tensor-model-parallel-size = 3 must divide num-attention-heads = 4",
        ),
        (
            [*TP2, "--ffn-hidden-size", "65"],
            2,
            "tensor-model-parallel-size = 2 must divide ffn-hidden-size = 65",
        ),
        (TP2, 3, "3 process(es) cannot be split into tensor 2"),
        (
            [],
            4,
            "global-batch-size = 4 must be a multiple of micro-batch-size x data-parallel size = 2 x 4 = 8",
        ),
        ([*VIRTUAL, "--micro-batch-size", "4"], 2, "virtual pipeline stages run a step's micro-batches, here 1, in"),
        (["--train-data-path", "nowhere/text"], 1, "train-data-path: no such file nowhere/text.bin"),
        (
            ["--tokenizer-model", "no/such/tokenizer"],
            1,
            "tokenizer-model: no such file or folder no/such/tokenizer",
        ),
        (["--load", "nowhere"], 1, "load: no checkpoint in nowhere"),
        (["--seed", "0"], 1, "seed = 0 must be from 1 to 4294967295"),
        ([*PP2, "--seed", "4294967295"], 2, "seed = 4294967295 must be from 1 to 4294967195"),
        (["--lr", "inf"], 1, "lr = inf, and that be finite"),
        (["--log-interval", "0"], 1, "log-interval = 0 must be at least 1"),
        (["--weight-decay", "nan"], 1, "weight-decay = nan must be at least 0 and finite"),
        (["--adam-beta2", "1"], 1, "adam-beta2 = 1.0 must be at least 0 and below 1"),
        (["--lr-warmup-iters", "12"], 1, "lr-warmup-iters = 12 must be less than lr-decay-iters = 12"),
        (["--min-lr", "0.1"], 1, "min-lr = 0.1 must lie between 0 and lr = 0.01"),
        (["--set", "xact.keep-every=4"], 1, "keep-every = 4 has no effect without keep-checkpoints"),
        (
            ["--save-retain-interval", "8", "--set", "xact.keep-checkpoints=2"],
            1,
            "save-retain-interval = 8 and keep-checkpoints = 2 both delete checkpoints",
        ),
        (["--bf16"], 1, "bf16 with a trainable activation needs use-distributed-optimizer = true"),
        (
            ["--bf16", "--optimizer", "sgd", *DISTRIBUTED],
            1,
            "does not go with use-distributed-optimizer, which bf16 with a trainable activation needs: Megatron shards",
        ),
        (["--bf16", "--optimizer", "sgd"], 1, "= 'adam', or leave bf16 and use-distributed-optimizer out"),
        (["--optimizer", "sgd", *DISTRIBUTED], 1, "use optimizer = 'adam', or leave the latter out"),
        (
            ["--set", "activation.weight-decay=1.0", "--optimizer", "muon"],
            1,
            "lr-mult and weight-decay in [activation] need optimizer = 'adam' or 'sgd', not 'muon'",
        ),
        (
            ["--optimizer-cpu-offload", "--use-precision-aware-optimizer", *DISTRIBUTED],
            1,
            "optimizer-cpu-offload does not go with a trainable activation",
        ),
        (["--rampup-batch-size", "2", "2", "16"], 1, "rampup-batch-size has no effect in Megatron 0.19"),
        (["--step-batch-size-schedule", "0:4 1K:8"], 1, "step-batch-size-schedule needs train-samples"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, (list, tuple)) else None,
)
def test_a_config_that_cannot_run(refused, words, ranks, told):
    assert told in refused(*words, ranks=ranks)


def test_data_that_are_cut_off(runs, refused, tmp_path):
    prefix = shutil.copytree(runs.config.parent / "data", tmp_path / "data") / "train_text_document"
    whole = os.path.getsize(f"{prefix}.bin")
    os.truncate(f"{prefix}.bin", whole - 2)
    told = f"{prefix}.bin has {whole - 2} bytes, where its index promises {whole}"
    assert told in refused("--train-data-path", str(prefix))
    os.truncate(f"{prefix}.idx", 1000)
    assert f"{prefix}.idx is damaged: 1000 bytes" in refused("--train-data-path", str(prefix))


def test_a_tokenizer_that_is_not_the_datas(runs, refused, tmp_path):
    """Whose ids are other tokens, or lie beyond the embedding."""
    other = shutil.copytree(runs.config.parent / "data" / "tokenizer", tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["added_tokens"][1]["content"] = "<|padding|>"
    content["model"]["vocab"]["<|padding|>"] = content["model"]["vocab"].pop("<|pad|>")
    content["model"]["vocab"]["more"] = len(content["model"]["vocab"])
    (other / "tokenizer.json").write_text(json.dumps(content))
    config = load(runs.config).with_overrides(["--tokenizer-model", str(other)])
    validate(config, 1)  # special tokens of other names, and more tokens
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    line = refused("--tokenizer-model", str(other))
    assert "is not the data's" in line and f": 2 of their tokens, the first 'a' with id {vocabulary['b']}, are" in line


def test_a_tokenizer_that_ends_no_documents(runs, tmp_path):
    """Found when Megatron has loaded it: transformers may know an eos_token that its files do not name."""
    folder = shutil.copytree(runs.config.parent / "data" / "tokenizer", tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    done = execute(runs.command("--save", str(tmp_path / "save"), "--tokenizer-model", str(folder), "--quiet"))
    line = the_one_line(done.returncode, done.stdout, done.stderr)
    assert f"tokenizer-model = '{folder}' has no eos_token to end documents with" in line


def test_several_machines_need_a_folder_that_all_of_them_see(runs, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    code = cli.main(["pretrain", str(runs.config), "--nnodes", "2", "--rendezvous", "a:1"])
    assert "set save in [checkpoint]" in the_one_line(code, *capsys.readouterr())


def test_a_folder_in_which_a_process_trains_by_itself_takes_no_second_one(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(status, "SLOWEST_BEAT", 0.6)
    with Watchdog(tmp_path, 0, 1, 0.0, sys.stderr):  # what of a run another one sees
        code = cli.main(["pretrain", str(runs.config), "--nproc-per-node", "1", "--save", str(tmp_path)])
    told = capsys.readouterr().err.splitlines()
    assert (code, len(told)) == (exits.TAKEN, 2) and told[0].startswith("xact: looking whether rank 0 on ")
    assert f"error: a run is at work in {tmp_path}: rank 0 on {status.host_name()} (process {os.getpid()})" in told[1]
    assert os.listdir(tmp_path) == ["logs"]


def test_a_missing_config(refused, tmp_path):
    assert "no such config file" in refused(config=tmp_path / "none.toml")


@pytest.mark.parametrize(
    "run, words, ranks, told",
    [
        (
            "one",
            ["--set", "activation.name=xiprelu"],
            1,
            "trained with activation xielu (alpha_p, alpha_n trainable, beta = 0.5), but this run has xiprelu",
        ),
        (
            "one",
            ["--set", "activation.trainable=['alpha_p']"],
            1,
            "but this run has xielu (alpha_p trainable, alpha_n = 0.8, beta",
        ),
        ("one", ["--set", "activation.beta=0.25"], 1, "alpha_n trainable, beta = 0.25)"),
        ("one", [*GATED], 1, "but this run has xsilu_glu1 (alpha trainable)"),
        ("one", ["--num-layers", "4"], 1, "has num-layers = 2, but this run 4"),
        ("one", ["--lr", "0.02"], 1, "was trained with lr = 0.01, but this run has 0.02"),
        ("one", ["--min-lr", "0.001", "--override-opt-param-scheduler"], 1, "load without it (no-load-optim = true)"),
        ("one", ["--train-iters", "20"], 1, "override-opt-param-scheduler = true"),
        ("one", DISTRIBUTED, 2, "holds the state of a plain optimizer, but this run has the distributed one"),
        ("dp2", [], 1, "holds the state of the distributed optimizer, but this run has a plain one"),
        (
            "dp2",
            [*DISTRIBUTED, "--use-precision-aware-optimizer"],
            2,
            "was saved without use-precision-aware-optimizer, but this run is with it",
        ),
        (
            "dp2",
            [*DISTRIBUTED, *PP2],
            2,
            "was saved for tensor x pipeline = 1 x 1 and cannot be loaded at 1 x 2",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, (list, tuple)) else None,
)
def test_a_checkpoint_of_another_run(runs, refused, run, words, ranks, told):
    assert told in refused("--load", str(runs[run].folder), *words, ranks=ranks)


@pytest.mark.parametrize(
    "words",
    [
        ["--train-iters", "20", "--override-opt-param-scheduler"],
        ["--train-iters", "20", "--use-checkpoint-opt-param-scheduler"],
        ["--train-iters", "20", "--no-load-optim"],
        ["--lr", "0.02", "--no-load-optim"],
        ["--lr", "0.02", "--finetune"],
        [*DISTRIBUTED, "--no-load-optim"],
        [*TP2, *PP2],
    ],
    ids=" ".join,
)
def test_what_the_refusals_offer_is_accepted(runs, words):
    config = load(runs.config).with_overrides(["--load", str(runs["one"].folder), *words])
    validate(config, 4 if words[0] == TP2[0] else 1)


def test_a_pretrained_checkpoint_gives_its_weights_alone_and_to_the_first_start_only(runs, refused, tmp_path):
    """Another optimizer and schedule are no contradiction; another model is. A run with a checkpoint reads its own."""
    given = ["--pretrained-checkpoint", str(runs["one"].folder)]
    validate(load(runs.config).with_overrides([*given, *DISTRIBUTED, "--lr", "0.02", "--train-iters", "20"]), 1)
    assert "but this run has xiprelu" in refused(*given, "--set", "activation.name=xiprelu")
    assert "pretrained-checkpoint: no checkpoint in" in refused("--pretrained-checkpoint", str(tmp_path / "gone"))
    own = str(runs["one"].folder)
    words = ["--save", own, "--load", own, "--pretrained-checkpoint", str(tmp_path / "gone")]
    validate(load(runs.config).with_overrides(words), 1)
    with pytest.raises(ValueError, match="was trained with lr = 0.01"):
        validate(load(runs.config).with_overrides([*words, "--lr", "0.02"]), 1)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda checkpoint: next(checkpoint.glob("*.distcp")).open("r+b").truncate(9000), "has 9000 of at least"),
        (lambda checkpoint: next(checkpoint.glob("*.distcp")).unlink(), "has 0 of at least"),
        (lambda checkpoint: (checkpoint / ".metadata").unlink(), "no .metadata, as when saving was cut off"),
    ],
    ids=["truncated shard", "missing shard", "cut off"],
)
def test_a_damaged_checkpoint_that_was_asked_for_or_the_only_one(runs, refused, tmp_path, damage, told):
    """Where there is another, and none was asked for, the run goes on from that: test_integrity.py."""
    folder = copy_of(runs["one"], tmp_path / "run")
    damage(folder / "iter_0000012")
    line = refused("--load", str(folder), "--ckpt-step", "12")
    assert told in line and "there are: iter_0000004" in line
    for step in (4, 8):
        shutil.rmtree(folder / f"iter_{step:07d}")
    for saving in ([], ["--save", str(folder)]):
        assert told in (line := refused("--load", str(folder), *saving)) and "no whole checkpoint in" in line


@pytest.mark.parametrize(
    "words, ranks, told",
    [
        (
            (*TP2, "--lr-warmup-fraction", "0.1"),
            2,
            "can only specify one of lr-warmup-fraction and lr-warmup-iters",
        ),
        (
            ("--quiet", "--log-memory-interval", "3", "--log-interval", "2"),
            1,
            "Megatron refuses these arguments: assert",
        ),
        ((*TP2, "--load", "nowhere"), 2, "load: no checkpoint in nowhere"),
    ],
    ids=["by Megatron's own check", "by an assertion without words", "by ours"],
)
def test_the_command_itself(runs, tmp_path, words, ranks, told):
    save = tmp_path / "save"
    done = execute(runs.command("--save", str(save), *words, ranks=ranks))
    assert told in the_one_line(done.returncode, done.stdout, done.stderr)
    assert not save.exists()


CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.toml")) if path.parent.name != "studies"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid_but_for_its_data(runs, path):
    config = load(path)
    if "num-layers" not in config.megatron:
        pytest.skip("a base, which others inherit: it does not say how large the model is")
    data = runs.config.parent / "data"
    words = [
        "--train-data-path",
        f"{data}/train_text_document",
        "--valid-data-path",
        f"{data}/validation_text_document",
    ]
    config = config.with_overrides([*words, "--tokenizer-model", f"{data}/tokenizer"])
    validate(config, default_processes(config))
