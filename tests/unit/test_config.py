"""The TOML config: what reaches Megatron's own parser, what is refused and how, and that it round-trips."""

import argparse
import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.training.arguments import add_megatron_arguments

from megatron_xact import activations
from megatron_xact.pretraining import arguments
from megatron_xact.pretraining.checkpointing.folder import check_checkpoint
from megatron_xact.pretraining.checks import validate
from megatron_xact.pretraining.config import RunConfig, load
from megatron_xact.pretraining.data.indexed import SplitWriter

CONFIGS = [
    path for path in sorted((Path(__file__).parents[2] / "configs").rglob("*.toml")) if path.parent.name != "studies"
]
PARSER = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))

TINY = """
[model]
num-layers = 2
hidden_size = 64
ffn-hidden-size = 192
num-attention-heads = 4
seq-length = 32
max-position-embeddings = 32
disable-bias-linear = true
untie-embeddings-and-output-weights = false
attention-backend = "unfused"

[data]
mock-data = true
tokenizer-type = "NullTokenizer"

[optimizer]
lr = 1e-3

[schedule]
train-iters = 10
micro-batch-size = 2

[activation]
name = "xielu"
alpha_p = 0.7
"""


@pytest.fixture
def tiny(tmp_path) -> RunConfig:
    return write(tmp_path / "tiny.toml", TINY)


def write(path: Path, text: str) -> RunConfig:
    path.write_text(text)
    return load(path)


def error(tmp_path: Path, text: str) -> str:
    with pytest.raises(ValueError) as caught:
        write(tmp_path / "bad.toml", text)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(tmp_path) + "/", "")


def megatron_reads(config: RunConfig) -> argparse.Namespace:
    """What Megatron makes of the command line, by a parser of its own."""
    return PARSER.parse_args(config.arguments())


# What Megatron gets


def test_megatron_parses_the_values(tiny):
    args = megatron_reads(tiny)
    assert (args.num_layers, args.hidden_size, args.train_iters, args.lr) == (2, 64, 10, 1e-3)
    assert args.add_bias_linear is False  # disable-bias-linear = true
    assert args.untie_embeddings_and_output_weights is False
    assert args.attention_backend.name == "unfused"
    assert args.swiglu is False


def test_every_flag_of_megatron_can_be_set_and_reads_back_as_given():
    """Each of Megatron's arguments, through check, tokens and Megatron's parser, for a value of its kind."""
    names = {flag.name: flag for flag in arguments._flags().values() if flag.name not in arguments.REFUSED}
    assert len(names) > 700
    for name, flag in names.items():
        action = flag.action
        if flag.boolean:
            value, expected = True, not isinstance(action, argparse._StoreFalseAction)
        else:
            kind = {int: -7, float: -2.5e-6, str: "a b", None: "a b"}.get(action.type)
            if action.choices or kind is None:
                continue
            count = action.nargs if isinstance(action.nargs, int) else 2
            # argparse takes -2.5e-6 for a flag, so in a list it cannot stand; alone it goes as --flag=value
            value = expected = [abs(kind) if action.type is float else kind] * count if flag.many else kind
        read = getattr(PARSER.parse_args(flag.tokens(flag.check(value))), action.dest)
        assert read == expected, name


def test_evaluations_have_an_interval_though_megatron_has_no_default(tiny):
    """Megatron 0.19.2 divides by it before the first step, also where nothing is evaluated."""
    assert PARSER.parse_args([]).eval_interval is None and "eval-interval" not in tiny.megatron
    assert megatron_reads(tiny).eval_interval == 1000
    assert megatron_reads(tiny.with_overrides(["--eval-interval", "5"])).eval_interval == 5


@pytest.mark.parametrize(
    "sets, made",
    [
        ([], False),
        (["data.reset-attention-mask=true"], True),
        (["data.no-create-attention-mask-in-dataloader=false"], True),
    ],
)
def test_a_mask_is_made_only_where_attention_needs_one(tiny, sets, made):
    assert megatron_reads(tiny.with_overrides(sets=sets)).create_attention_mask_in_dataloader is made


@pytest.mark.parametrize("value, expected", [(True, True), (False, False)])
def test_boolean_optional_flags_take_both_values(tiny, value, expected):
    flag = "rl-partial-rollouts"
    config = tiny.with_overrides(sets=[f"runtime.{flag}={str(value).lower()}"])
    assert megatron_reads(config).rl_partial_rollouts is expected
    negated = tiny.with_overrides(sets=[f"runtime.no-{flag}={str(value).lower()}"])
    assert megatron_reads(negated).rl_partial_rollouts is not expected


@pytest.mark.parametrize("name", activations.names())
def test_gated_activations_and_only_they_add_swiglu(tiny, name):
    config = tiny.with_overrides(sets=[f"activation.name={name}"])
    assert megatron_reads(config).swiglu is activations.get(name).gated


def test_data_blends_may_mix_weights_and_names(tiny):
    config = tiny.with_overrides(sets=['data.data-path=[0.3, "a", 7, "b"]'])
    assert megatron_reads(config).data_path == ["0.3", "a", "7", "b"]
    single = tiny.with_overrides(sets=["data.data-path=a"])
    assert megatron_reads(single).data_path == ["a"]


# What is refused when the file is read


@pytest.mark.parametrize(
    "line, message",
    [
        ("num-layer = 2", "unknown argument 'num-layer'; nearest: 'num-layers' (bad.toml [model])"),
        ("add_bias_linear = false", "Megatron's flag for it is 'disable-bias-linear'"),
        ("kv-channels = 'abc'", "kv-channels = 'abc' (bad.toml [model]): expected an integer"),
        ("kv-channels = 16.0", "kv-channels = 16.0 (bad.toml [model]): expected an integer"),
        ("kv-channels = true", "expected an integer"),
        ("init-method-std = '0.1'", "expected a number"),
        ("bf16 = 1", "bf16 = 1 (bad.toml [model]): expected true or false"),
        ("normalization = 'Norm'", "expected one of LayerNorm, RMSNorm"),
        ("attention-backend = 'flashy'", "expected one of flash, fused, unfused, local, auto"),
        ("rampup-batch-size = [1, 2]", "expected a list of 3 values, each an integer"),
        ("data-path = [true]", "expected a list of values, each a string"),
        ("moe-layer-freq = 'x'", "expected a value that Megatron can parse"),
        ("num_layers = 3", "num_layers is given twice in bad.toml: in [model] and in [model]"),
        ("swiglu = true", "'swiglu' cannot be set here: the MLP follows from the activation"),
        ("squared-relu = true", 'set name = "..." in [activation]'),
        ("spec = ['local']", "the layer spec follows from [activation]"),
    ],
)
def test_bad_arguments_are_told_in_one_line(tmp_path, line, message):
    text = TINY.replace('attention-backend = "unfused"', line)
    assert message in error(tmp_path, text)


@pytest.mark.parametrize(
    "text, message",
    [
        (TINY + "[modle]\nx = 1", "unknown table [modle] (bad.toml); the tables are [model], [parallel]"),
        ("seed = 1\n" + TINY, "seed = 1 (bad.toml) stands in no table"),
        (TINY + "[runtime]\nnum-layers = 3", "given twice in bad.toml: in [model] and in [runtime]"),
        (
            "[model]\nnum-layers = 2",
            'no activation (bad.toml): add a table [activation] with e.g. name = "xielu"',
        ),
        (TINY.replace("xielu", "xielo"), "xielo"),
        (TINY + "alpha_q = 1.0", "alpha_q"),
        (TINY + "alpha_n = 0.2\nbeta = 0.5", "alpha_n"),
        (TINY + "beta = 'half'", "beta = 'half' (bad.toml [activation]): expected a number"),
        (TINY + "nam = 'xielu'", "unknown key 'nam' (bad.toml [activation]); nearest: 'name'"),
        (TINY + "lr-mult = -1", "a multiplier must be finite and not negative"),
        (TINY + "weight-decay = nan", "a multiplier must be finite and not negative"),
        (TINY + "trainable = 'beta'", "expected a list of parameter names"),
        (TINY + "trainable = [1]", "expected a list of parameter names"),
        (
            TINY + "[xact]\nguard-intervall = 3",
            "unknown key 'guard-intervall' (bad.toml [xact]); it has guard-interval",
        ),
        (TINY + "[xact]\nguard-interval = -1", "expected a whole number"),
        ("num-layers = ", "bad.toml is not valid TOML"),
        ("base = 3", "base = 3 (bad.toml): expected a file name"),
    ],
)
def test_bad_tables_are_told_in_one_line(tmp_path, text, message):
    assert message in error(tmp_path, text)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such config file: .*none.toml"):
        load(tmp_path / "none.toml")
    with pytest.raises(FileNotFoundError, match=r"none.toml \(base of .*child.toml\)"):
        write(tmp_path / "child.toml", 'base = "none.toml"')


# Inheritance, overrides, dump


def test_base_merges_key_by_key_and_is_relative_to_its_file(tmp_path):
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "root.toml").write_text(TINY)
    (tmp_path / "bases" / "mid.toml").write_text('base = "root.toml"\n[model]\nnum_layers = 3\nhidden-size = 128\n')
    text = 'base = "bases/mid.toml"\n[model]\nhidden-size = 256\n[activation]\nalpha_n = 0.9\n'
    text += "[xact]\nguard_interval = 5"
    config = write(tmp_path / "child.toml", text)
    assert [config.megatron[key] for key in ("num-layers", "hidden-size", "train-iters")] == [3, 256, 10]
    assert config.activation.init == {"alpha_p": 0.7, "alpha_n": 0.9}
    assert (config.xact.guard_interval, config.xact.telemetry_interval) == (5, 10)


def test_another_activation_drops_the_inherited_parameters_but_not_the_multipliers(tmp_path, tiny):
    config = tiny.with_overrides(sets=["activation.lr-mult=3", "activation.trainable=['alpha_p']"])
    assert config.activation.trainable == ("alpha_p",)
    other = config.with_overrides(sets=["activation.name=relu2"]).activation
    assert (other.init, other.trainable, other.lr_mult) == ({}, None, 3)


def test_a_circle_of_bases_is_named(tmp_path):
    (tmp_path / "a.toml").write_text('base = "b.toml"')
    (tmp_path / "b.toml").write_text('base = "a.toml"')
    with pytest.raises(ValueError, match=r"base goes in a circle: \S*a.toml -> \S*b.toml -> \S*a.toml"):
        load(tmp_path / "a.toml")


def test_overrides_win_and_sets_come_first(tiny):
    config = tiny.with_overrides(
        ["--train-iters", "7", "--bf16", "--lr=-1", "--init-method-std", "-1e-6", "--data-path", "a", "b"],
        ["schedule.train-iters=5", "model.disable-bias-linear=false", "activation.alpha_p=0.9"],
    )
    args = megatron_reads(config)
    assert (args.train_iters, args.bf16, args.lr, args.init_method_std) == (7, True, -1.0, -1e-6)
    assert args.data_path == ["a", "b"] and args.add_bias_linear is True
    assert config.activation.init == {"alpha_p": 0.9}
    assert tiny.megatron["train-iters"] == 10  # the original is untouched


@pytest.mark.parametrize(
    "words, sets, message",
    [
        (["--num-layer", "3"], [], "unknown argument 'num-layer'; nearest: 'num-layers'"),
        (["--train-iters", "abc"], [], "--train-iters abc: expected an integer"),
        (["--train-iters"], [], "--train-iters : expected an integer"),
        (["--bf16", "true"], [], "--bf16 true: it takes no value"),
        (["stray"], [], "'stray' belongs to no argument"),
        (["--swiglu"], [], "'swiglu' cannot be set here"),
        ([], ["train-iters=3"], "expected table.key=value"),
        ([], ["modle.x=3"], r"unknown table \[modle\]"),
        (
            [],
            ["schedule.train-iters=x"],
            r"train-iters = 'x' \(--set schedule.train-iters=x\): expected",
        ),
        ([], ["activation.name=xielo"], r"xielu .*\? \(--set activation.name=xielo\)"),
        ([], ["activation.alpha_p=-1"], r"\(--set activation.alpha_p=-1\)"),
    ],
)
def test_bad_overrides_are_told_in_one_line(tiny, words, sets, message):
    with pytest.raises(ValueError, match=message):
        tiny.with_overrides(words, sets)


@pytest.mark.parametrize("name", activations.names())
def test_dump_loads_to_an_equal_config(tmp_path, tiny, name):
    strings = 'a "quoted"\\path\twith\nlines, ünï ☃ \U0001f600 \x7f'
    config = tiny.with_overrides(
        ["--data-path", "0.3", strings, "--lr", "3e-05", "--adam-eps", "1e-30", "--no-rl-partial-rollouts"],
        [
            f"activation.name={name}",
            "activation.weight-decay=0.5",
            "xact.telemetry-interval=0",
            "model.bf16=true",
        ],
    )
    learned = [q.name for q in config.activation.record().parameters]
    config = config.with_overrides(sets=[f"activation.trainable={learned}"])
    text = config.dump()
    assert "base" not in tomllib.loads(text)
    again = write(tmp_path / "dump.toml", text)
    assert again == config
    assert vars(megatron_reads(again)) == vars(megatron_reads(config))
    assert again.with_overrides(["--train-iters", "11"]) != config  # equality can fail


def is_base(path: Path) -> bool:
    """Others inherit from it: it may leave out what they must say, and is read with them."""
    bases = ((other.parent, tomllib.loads(other.read_text()).get("base")) for other in CONFIGS)
    return any(base is not None and (folder / base).samefile(path) for folder, base in bases)


@pytest.mark.parametrize("path", [path for path in CONFIGS if not is_base(path)], ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    assert megatron_reads(load(path)).num_layers >= 1


# What must fit together before training


@pytest.mark.parametrize(
    "words, world_size, message",
    [
        (["--num-attention-heads", "3"], 1, "num-attention-heads = 3 must divide hidden-size = 64"),
        (["--tensor-model-parallel-size", "3"], 3, "size = 3 must divide num-attention-heads = 4"),
        (["--tensor-model-parallel-size", "4", "--padded-vocab-size", "510"], 4, "divide padded-vocab-size = 510"),
        (
            ["--tensor-model-parallel-size", "4", "--ffn-hidden-size", "90"],
            4,
            "= 4 must divide ffn-hidden-size = 90",
        ),
        (
            ["--group-query-attention", "--num-query-groups", "3"],
            1,
            "groups = 3 must divide num-attention-heads = 4",
        ),
        (["--num-query-groups", "2"], 1, "no effect without group-query-attention"),
        (["--tensor-model-parallel-size", "2"], 3, r"3 process\(es\) cannot be split into tensor 2"),
        (
            ["--pipeline-model-parallel-size", "4"],
            4,
            "pipeline-model-parallel-size = 4 must divide num-layers = 2",
        ),
        (["--context-parallel-size", "2", "--seq-length", "30"], 2, "context-parallel-size = 4 must divide seq-length"),
        (["--global-batch-size", "6"], 2, "global-batch-size = 6 must be a multiple of .* 2 x 2 = 4"),
        (["--seq-length", "64"], 1, "max-position-embeddings = 32 must be at least seq-length = 64"),
        (["--tensor-model-parallel-size", "0"], 1, "tensor-model-parallel-size = 0 must be at least 1"),
        (["--train-samples", "5"], 1, "set one of train-iters and train-samples; both are set"),
        (["--data-path", "none"], 1, "data-path: no such file none.bin"),
        (["--data-path", "1", "none"], 1, "data-path: no such file none.bin"),
        (["--data-args-path", "none"], 1, "data-args-path: no such file none"),
        (["--tokenizer-model", "none/a/b"], 1, "no such file or folder none/a/b"),
        (["--load", "none"], 1, "load: no checkpoint in none"),
        (["--load", "none", "--save", "other"], 1, "load: no checkpoint in none"),
        (
            ["--pretrained-checkpoint", "none", "--save", "none"],
            1,
            "pretrained-checkpoint: no checkpoint in none",
        ),
    ],
)
def test_validate_tells_the_first_problem(tiny, words, world_size, message):
    validate(tiny, world_size)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        validate(tiny.with_overrides(words), world_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["num-layers", "seq-length", "micro-batch-size", "lr", "train-iters", "mock-data"])
def test_validate_names_what_is_missing(tmp_path, missing):
    lines = [line for line in TINY.splitlines() if not line.startswith(missing)]
    word = {"train-iters": "neither is", "mock-data": "no data"}.get(missing, f"{missing} is missing")
    with pytest.raises(ValueError, match=word):
        validate(write(tmp_path / "short.toml", "\n".join(lines)), 1)


@pytest.mark.parametrize(
    "words, world_size",
    [
        (["--sequence-parallel"], 1),  # Megatron switches it off at tensor-parallel size 1 and says so
        (
            [
                "--tensor-model-parallel-size",
                "2",
                "--sequence-parallel",
                "--pipeline-model-parallel-size",
                "2",
            ],
            8,
        ),
        (["--tensor-model-parallel-size", "4", "--group-query-attention", "--num-query-groups", "2"], 4),
        (
            [
                "--pipeline-model-parallel-size",
                "2",
                "--num-layers",
                "3",
                "--decoder-first-pipeline-num-layers",
                "1",
            ],
            2,
        ),
        (["--num-attention-heads", "3", "--kv-channels", "16"], 1),
        (["--tokenizer-model", "gpt2", "--tokenizer-type", "HuggingFaceTokenizer"], 1),
        (["--load", "fresh", "--save", "fresh"], 1),
        (["--skip-train"], 1),
    ],
)
def test_validate_accepts_what_megatron_accepts(tiny, words, world_size):
    validate(tiny.with_overrides(words), world_size)


def test_world_size_comes_from_the_environment(tiny, monkeypatch):
    config = tiny.with_overrides(["--tensor-model-parallel-size", "2"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="1 process"):
        validate(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    validate(config)


def test_default_ffn_size_is_checked_as_megatron_sizes_it(tiny):
    """Gated: 2/3 of 4 x 64 in multiples of 64 is 128, which 3 heads and ranks do not divide; ungated: 256."""
    words = ["--tensor-model-parallel-size", "3", "--num-attention-heads", "3", "--kv-channels", "16"]
    lines = [line for line in TINY.splitlines() if not line.startswith("ffn-hidden-size")]
    config = write(tiny.source.with_name("noffn.toml"), "\n".join(lines)).with_overrides(words)
    with pytest.raises(ValueError, match="= 256; change"):
        validate(config, 3)
    with pytest.raises(ValueError, match="= 128; change"):
        validate(config.with_overrides(sets=["activation.name=swiglu"]), 3)


def test_existing_data_and_tokenizer_pass_and_one_missing_half_is_named(tmp_path, tiny):
    writer = SplitWriter(tmp_path, "text", vocab_size=512)
    writer.add([1, 2, 3], num_bytes=3)
    writer.finish()
    (tmp_path / "tokenizer").touch()
    prefix, tokenizer = str(tmp_path / "text"), str(tmp_path / "tokenizer")
    config = tiny.with_overrides(["--data-path", prefix, "--tokenizer-model", tokenizer])
    validate(config, 1)
    (tmp_path / "text.idx").unlink()
    with pytest.raises(FileNotFoundError, match=r"no such file .*text\.idx"):
        validate(config, 1)


# Checkpoints


@pytest.fixture
def saved(tmp_path) -> Path:
    """A sharded checkpoint of iteration 7, as torch's own writer makes it, beside Megatron's tracker file."""
    folder = tmp_path / "run"
    checkpoint = folder / "iter_0000007"
    dcp.save({"weight": torch.arange(1000.0), "bias": torch.zeros(3)}, checkpoint_id=checkpoint, no_dist=True)
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "latest_checkpointed_iteration.txt").write_text("7\n")
    return folder


def test_a_whole_checkpoint_is_found(saved, tiny):
    assert check_checkpoint(saved) == saved / "iter_0000007" == check_checkpoint(saved, step=7)
    validate(tiny.with_overrides(["--load", str(saved)]), 1)


@pytest.mark.parametrize(
    "word, message",
    [("seven", "corrupt: 'seven' is no iter"), ("", "is empty"), ("9", "iter_0000009 is missing or empty")],
)
def test_a_useless_tracker_stops_those_who_want_one_checkpoint_but_no_run(saved, tiny, word, message):
    (saved / "latest_checkpointed_iteration.txt").write_text(word)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_checkpoint(saved)
    for save in ([], ["--save", str(saved)]):
        validate(tiny.with_overrides(["--load", str(saved), *save]), 1)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda c: shutil.rmtree(c), "no whole checkpoint in .*: iter_0000007 is missing or empty"),
        (lambda c: (c / ".metadata").unlink(), "damaged: no .metadata"),
        (lambda c: (c / ".metadata").write_bytes(b"\x80\x04junk"), r"damaged: .metadata cannot be read"),
        (lambda c: (c / "__0_0.distcp").unlink(), "damaged: __0_0.distcp has 0 of at least"),
        (
            lambda c: (c / "__0_0.distcp").open("r+b").truncate(2000),
            "damaged: __0_0.distcp has 2000 of at least",
        ),
        (  # of the last tensor in it
            lambda c: os.truncate(c / "__0_0.distcp", (c / "__0_0.distcp").stat().st_size - 1),
            r"damaged: __0_0.distcp has \d+ of at least",
        ),
    ],
)
def test_a_damaged_checkpoint_is_told_before_training(saved, tiny, damage, message):
    damage(saved / "iter_0000007")
    for save in ([], ["--save", str(saved)]):  # also where it would be resumed
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            validate(tiny.with_overrides(["--load", str(saved), *save]), 1)


def test_data_and_mock_data_replace_each_other(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[data]\ntrain-data-path = ["a"]\n[activation]\nname = "relu2"\n')
    words = load(path).with_overrides(["--mock-data"]).arguments()
    assert "--mock-data" in words and "--train-data-path" not in words
    assert "--train-data-path" in load(path).arguments()
    again = load(path).with_overrides(["--mock-data"]).with_overrides(["--data-path", "b"]).arguments()
    assert "--mock-data" not in again and again[again.index("--data-path") + 1] == "b"


@pytest.mark.parametrize(
    "words, sets, message",
    [
        (["--pipeline-model-parallel-size", "2"], [], "needs pipeline-model-parallel-size = 1, not 2"),
        (
            ["--sequence-parallel", "--tensor-model-parallel-size", "2"],
            [],
            "does not go with sequence-parallel = True at tensor sizes > 1",
        ),
        (["--fp16"], [], "does not go with fp16 = True"),
        (["--optimizer", "sgd"], [], "needs optimizer = 'adam', not 'sgd'"),
        ([], ["deepspeed.offload-parameters=true"], "offload-parameters in [deepspeed] needs zero-stage = 3, not 1"),
    ],
)
def test_what_does_not_go_with_deepspeed(tiny, words, sets, message):
    config = tiny.with_overrides(words, ["xact.engine=deepspeed", *sets])
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(config, 2)


def test_the_stage_of_zero_is_1_2_or_3(tiny):
    with pytest.raises(ValueError, match="zero-stage = 4 .*expected 1 or 2 or 3"):
        tiny.with_overrides(sets=["deepspeed.zero-stage=4"])


def test_zero_takes_the_place_of_the_distributed_optimizer(tiny):
    given = tiny.with_overrides(["--use-distributed-optimizer", "--overlap-grad-reduce"])
    assert {"--use-distributed-optimizer", "--overlap-grad-reduce"} < set(given.arguments())
    instead = given.with_overrides(sets=["xact.engine=deepspeed"])
    assert instead.arguments() == tiny.arguments()


def test_the_deepspeed_table_is_kept_where_it_means_something(tiny, tmp_path):
    assert "[deepspeed]" not in tiny.dump()
    zero3 = tiny.with_overrides(sets=["xact.engine=deepspeed", "deepspeed.zero-stage=3"])
    assert write(tmp_path / "again.toml", zero3.dump()) == zero3


@pytest.mark.parametrize(
    "words, sets, message",
    [
        (["--fp8-format", "hybrid"], ["xact.mlp=fp8"], "fp8-format = 'hybrid' are two ways to compute in FP8"),
        ([], ["fp8.smooth=true"], "smooth = true in [fp8] needs mlp = 'fp8' in [xact], not 'unfused'"),
        (["--first-last-layers-bf16"], ["xact.mlp=fp8"], "keeps 2 layers out of FP8, of num-layers = 2: none is left"),
        ([], ["xact.mlp=fp8", "xact.engine=deepspeed"], 'does not go with mlp = "fp8"'),
    ],
)
def test_what_does_not_go_with_fp8(tiny, words, sets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(tiny.with_overrides(words, sets))


NEEDS_TE = "needs TransformerEngine's layer, and this run has the local one (transformer-impl = 'local'); "


@pytest.mark.parametrize(
    "words, message",
    [
        (["--fp8-format", "hybrid"], NEEDS_TE + 'mlp = "fp8" in [xact] computes the MLPs in FP8 without it'),
        (["--fp4-format", "e2m1"], NEEDS_TE + 'mlp = "fp8" in [xact]'),
        (["--context-parallel-size", "2"], NEEDS_TE + "for long sequences use tensor-model-parallel-size"),
        (["--window-size", "(8, 0)"], NEEDS_TE + "leave it out, for attention to all of the past"),
        (["--softmax-type", "learnable"], NEEDS_TE),
        (["--reset-attention-mask"], NEEDS_TE),
        (["--apply-layernorm-1p"], NEEDS_TE),
        (["--tp-comm-overlap"], "tp-comm-overlap = True needs TransformerEngine's layer"),
        (["--num-experts", "8"], "mixture of experts (num-experts = 8) is not supported"),
        (["--multi-latent-attention"], "multi-latent attention (multi-latent-attention = True) is not supported"),
        (["--mtp-num-layers", "1"], "multi-token prediction (mtp-num-layers = 1) is not supported"),
        (["--experimental-attention-variant", "dsa"], "(experimental-attention-variant = 'dsa') is not supported"),
        (["--use-megatron-fsdp"], "use-megatron-fsdp is not supported: alphas"),
        (["--use-torch-fsdp2"], "engine = 'deepspeed' in [xact] with zero-stage = 3 in [deepspeed] the parameters too"),
        (["--ckpt-format", "torch"], "ckpt-format = 'torch' is not supported: such a run cannot be resumed"),
        (["--cuda-graph-impl", "full_iteration"], "'full_iteration' is not supported: what is done between"),
        (["--enable-cuda-graph", "--cuda-graph-scope", "full_iteration"], "use 'local' or 'transformer_engine'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_layers_and_the_trainer_do_not_cover_is_told_before_a_start(tiny, words, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        validate(tiny.with_overrides(["--transformer-impl", "local", *words]), 2 if words[-1] == "2" else 1)
    assert "\n" not in str(caught.value)


def test_a_graph_of_the_optimizer_would_keep_the_alphas_first_learning_rate(tiny):
    validate(tiny.with_overrides(["--optimizer-cuda-graph"]), 1)
    with pytest.raises(ValueError, match="lr-mult and weight-decay in .* do not go with optimizer-cuda-graph"):
        validate(tiny.with_overrides(["--optimizer-cuda-graph"], ["activation.lr-mult=2.0"]), 1)


@pytest.mark.parametrize("words", [["--main-grads-dtype", "bf16"], ["--grad-reduce-in-bf16"]], ids=" ".join)
def test_gradients_of_two_dtypes_do_not_reach_kernels_that_know_one(tiny, words):
    """TransformerEngine's norm would read half of an alpha's fp32 gradient as a bf16 number, any number."""
    aware = tiny.with_overrides(["--bf16", "--use-distributed-optimizer", "--use-precision-aware-optimizer"])
    validate(aware)
    with pytest.raises(ValueError, match=f"{words[0][2:]} = .* whose gradients are fp32: leave {words[0][2:]} out$"):
        validate(aware.with_overrides(words))
    validate(aware.with_overrides(words, ["activation.trainable=[]"]))
    validate(tiny.with_overrides(["--bf16", "--use-distributed-optimizer", "--grad-reduce-in-bf16"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are CUDA graphs here")
@pytest.mark.parametrize("words", [["--cuda-graph-impl", "local"], ["--enable-cuda-graph"]], ids=" ".join)
def test_cuda_graphs_need_a_gpu(tiny, words):
    with pytest.raises(ValueError, match="needs a GPU, which torch does not see here; leave CUDA graphs out"):
        validate(tiny.with_overrides(words))


def test_gradients_have_one_of_two_formats(tiny):
    assert tiny.with_overrides(sets=["fp8.gradients=e5m2"]).fp8.gradients == "e5m2"
    with pytest.raises(ValueError, match="gradients = 'e3m4' .*expected 'e4m3' or 'e5m2'"):
        tiny.with_overrides(sets=["fp8.gradients=e3m4"])


def test_the_fp8_table_is_kept_where_it_means_something(tiny, tmp_path):
    assert "[fp8]" not in tiny.dump()
    for sets in (["xact.mlp=fp8"], ["fp8.enabled=false"]):
        kept = tiny.with_overrides(sets=sets)
        assert "[fp8]" in kept.dump() and write(tmp_path / "again.toml", kept.dump()) == kept


def test_one_flag_takes_fp8_out(tiny):
    """Both ways to ask for it, and what belongs to them."""
    off = ["fp8.enabled=false"]
    theirs = tiny.with_overrides(["--fp8-format", "hybrid", "--fp8-recipe", "blockwise"])
    assert theirs.asks_for_fp8 and "--fp8-format" in theirs.arguments()
    bf16 = theirs.with_overrides(sets=off)
    assert not bf16.asks_for_fp8 and bf16.arguments() == tiny.arguments()
    ours = tiny.with_overrides(sets=["xact.mlp=fp8", "fp8.smooth=true"])
    assert ours.asks_for_fp8 and ours.mlp == "fp8"
    bf16 = ours.with_overrides(sets=off)
    validate(bf16)
    assert not bf16.asks_for_fp8 and bf16.mlp == "unfused"
    assert tiny.with_overrides(sets=[*off, "xact.mlp=triton"]).mlp == "triton"
