"""`xact plan`: its arithmetic against Megatron's own and numbers worked out by hand, its refusals, its report."""

import json
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_xact import cli
from megatron_xact.pretraining import checks
from megatron_xact.pretraining.config import RunConfig, load
from megatron_xact.pretraining.planning import costs, job, legality, memory, report, search
from megatron_xact.pretraining.planning.counts import (
    Shape,
    flops_per_token,
    layer_weights,
    parameters,
    stage_parameters,
)
from megatron_xact.pretraining.planning.hardware import GPUS

ROOT = Path(__file__).parents[2]
BIG, SMALL = ROOT / "configs/paper/3b-xielu.toml", ROOT / "configs/small/125m.toml"
LLAMA = Shape(2, 8, 24, 2, 32, 16, activation_parameters=2)


def planned(path: Path, words: str = "", gpus: int = 8, sets: tuple = ()) -> job.Job:
    return job.read(load(path).with_overrides(shlex.split(words), sets), gpus, 8)


def without_vocabulary() -> RunConfig:
    config = load(BIG)
    return replace(config, megatron={key: v for key, v in config.megatron.items() if key != "padded-vocab-size"})


def plan(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


# Counting


def test_parameters_by_hand():
    # per layer: qkv 8 x 24, output 8 x 8; fc1 8 x 24, fc2 24 x 8; two norms of 8; two alphas; in all one more norm
    assert parameters(LLAMA) == {
        "embedding": 32 * 8, "head": 0, "attention": 2 * 256, "mlp": 2 * 384, "norms": 2 * 16 + 8, "activation": 4
    }  # fmt: skip
    untied = replace(LLAMA, tied=False, gated=True, ffn=16, groups=1, qk_norm=True, norm_bias=True)
    # qkv 8 x (8 + 2 x 4); gated fc1 8 x 32, fc2 16 x 8; norms with bias 2 x (2 x 8 + 2 x 4), final 2 x 8
    assert parameters(untied) == {
        "embedding": 256, "head": 256, "attention": 2 * 192, "mlp": 2 * 384, "norms": 2 * 48 + 16, "activation": 4
    }  # fmt: skip
    biased = layer_weights(replace(LLAMA, linear_bias=True))
    assert (biased["attention"].split, biased["attention"].whole) == (256 + 24, 8)
    assert (biased["mlp"].split, biased["mlp"].whole) == (384 + 24, 8)


def test_a_stage_holds_its_part():
    assert stage_parameters(LLAMA, 2, 1, first=True, last=False) == {
        "embedding": 128, "head": 0, "attention": 128, "mlp": 192, "norms": 16, "activation": 2
    }  # fmt: skip
    last = stage_parameters(LLAMA, 2, 1, first=False, last=True)
    assert (last["embedding"], last["head"], last["norms"]) == (0, 128, 24)  # the copy of the tied embedding


def test_flops_by_hand():
    # forward: 2 per weight of the layers (2 x 640), of the head (256), and 2 q s per layer for scores (2 x 2 x 8 x 16)
    assert flops_per_token(LLAMA) == 3 * (2 * 2 * 640 + 2 * 256 + 512)
    assert flops_per_token(LLAMA, head=False, scores=False) == 3 * 2 * 2 * 640


@pytest.mark.parametrize(
    "path, words",
    [
        ("paper/1.1b-xielu.toml", ""),
        ("paper/3b-swiglu.toml", ""),
        ("apertus-8b.toml", ""),
        ("small/35m.toml", "--kv-channels 48 --group-query-attention --num-query-groups 3"),
    ],
)
def test_flops_are_megatrons(path, words):
    from megatron.training.training import num_floating_point_operations

    run = planned(ROOT / "configs" / path, words)
    s = run.shape
    filled = Namespace(**vars(run.args) | {
        "kv_channels": s.head_size, "ffn_hidden_size": s.ffn, "padded_vocab_size": s.vocab,
        "num_query_groups": s.groups, "swiglu": s.gated,
    })  # fmt: skip
    megatrons = num_floating_point_operations(filled, run.layout.batch)
    assert flops_per_token(s) * run.tokens_per_step == pytest.approx(megatrons, rel=1e-12)


def test_counting_needs_no_torch():
    script = "import sys, megatron_xact.pretraining.planning.counts; print({'torch', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Memory


@pytest.mark.parametrize(
    "flags, each",
    [
        ("", 2 + 4 + 12 / 8),  # bf16 weight, fp32 gradient; fp32 master and two moments over 8 ranks
        ("--grad-reduce-in-bf16", 2 + 2 + 16 / 8),
        ("--context-parallel-size 2", 2 + 4 + 12 / 8),  # the optimizer is sharded over context-parallel ranks too
        ("--tensor-model-parallel-size 2", 2 + 4 + 12 / 4),
        ("--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype fp8", 2 + 4 + (4 + 2 + 1) / 8),
    ],
)
def test_bytes_per_parameter(flags, each):
    run = planned(BIG, flags)
    found = memory.of_stage(run, 0)
    count = sum(stage_parameters(run.shape, run.layout.tensor, 36, first=True, last=True).values())
    assert found.weights + found.gradients + found.optimizer == pytest.approx(each * count)


def test_without_the_distributed_optimizer_every_gpu_holds_all_states():
    sets = ("parallel.use-distributed-optimizer=false", "parallel.overlap-param-gather=false", "checkpoint.save='x'",
            "activation.name=relu2")  # fmt: skip
    run = planned(BIG, sets=sets)
    assert memory.of_stage(run, 0).optimizer == 12 * sum(parameters(run.shape).values())
    with_sgd = planned(BIG, "--optimizer sgd", sets=sets)
    assert memory.of_stage(with_sgd, 0).optimizer == 8 * sum(parameters(run.shape).values())
    fp32 = planned(ROOT / "configs/small/10m.toml")
    found, count = memory.of_stage(fp32, 0), sum(parameters(fp32.shape).values())
    assert (found.weights, found.gradients, found.optimizer) == (4 * count, 4 * count, 8 * count)
    # torch's AdamW, without TransformerEngine: square roots of all second moments, when activations are gone.
    words = "--transformer-impl local --micro-batch-size 1 --seq-length 8"
    short = memory.of_stage(planned(ROOT / "configs/small/10m.toml", words), 0)
    assert short.activations + short.ends + short.passing == pytest.approx(4 * count)


def test_micro_batches_in_flight():
    run = planned(BIG, "--pipeline-model-parallel-size 4 --micro-batch-size 1", gpus=64).layout
    assert [run.in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]
    few = replace(run, batch=32)  # two micro-batches in all
    assert [few.in_flight(stage) for stage in range(4)] == [2, 2, 2, 1]
    # interleaved, 4 stages of 3 chunks: 2 x (4 - 1 - stage) + (3 - 1) x 4 warm-up chunks, and one
    assert [replace(run, virtual=3).in_flight(stage) * 3 for stage in range(4)] == [15, 13, 11, 9]
    assert run.bubble == pytest.approx(3 / 40) and replace(run, virtual=3).bubble == pytest.approx(3 / 120)


def test_less_is_kept_where_more_is_split_or_recomputed():
    def kept(words: str) -> float:
        return memory.of_pass(planned(BIG, f"--micro-batch-size 1 {words}"), 0)[0]

    whole = kept("")
    assert kept("--tensor-model-parallel-size 2") == pytest.approx(whole / 2, rel=0.01)
    assert kept("--context-parallel-size 2") == pytest.approx(whole / 2)
    two = "--micro-batch-size 1 --tensor-model-parallel-size 2"
    assert whole / 2 < memory.of_pass(planned(BIG, two, sets=("parallel.sequence-parallel=false",)), 0)[0] < whole
    mlp = kept("--recompute-granularity selective --recompute-modules mlp")
    assert mlp == pytest.approx(whole - 36 * 4096 * 2 * 12288 * 2)
    full = kept("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    assert full == 36 * 4096 * 2048 * 2


# Costs


def test_time_traffic_and_disk_by_hand():
    gpu = GPUS["h100"]
    run = planned(BIG, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 2", gpus=64)
    cost = costs.time(run, gpu, 0.4)
    busy = flops_per_token(run.shape) * 640 * 4096 / (64 * 989e12 * 0.4)
    assert cost.step == pytest.approx(busy * (1 + 1 / 20)) and cost.mfu == pytest.approx(0.4 / (1 + 1 / 20))
    assert cost.gpu_hours == pytest.approx(cost.step * 50_000 * 64 / 3600)
    sent = {part.name: part for part in costs.traffic(run, gpu)}
    half = 18 * (604_000_000 + 1_811_900_000) / 36 / 2 + 302_000_000 / 2  # of 36 layers, and one end, over two ranks
    assert sent["data"].bytes == pytest.approx(half * (4 + 2) * 15 / 16, rel=0.01)
    assert sent["tensor"].bytes == 10 * 18 * 20 * 2 * 4096 * 2048 * 2 / 2
    assert sent["pipeline"].bytes == 2 * 20 * 2 * 4096 * 2048 * 2 / 2
    assert {name: part.link for name, part in sent.items()} == {
        "data": "network", "tensor": "NVLink", "pipeline": "network"
    }  # fmt: skip
    for gpus, link in ((8, "NVLink"), (16, "network")):  # 4 and 8 data-parallel ranks, every second GPU
        two = costs.traffic(planned(BIG, "--tensor-model-parallel-size 2", gpus=gpus), gpu)
        assert [part.link for part in two if part.name == "data"] == [link]
    disk = costs.checkpoints(run)
    assert disk.bytes == pytest.approx(14 * sum(parameters(run.shape).values()), rel=1e-6)
    assert disk.kept == 6 and disk.disk == 7 * disk.bytes  # 10, 20, 30, 40 and 50 thousand, the last but one; a next
    assert costs.checkpoints(planned(BIG, sets=("xact.keep-checkpoints=0",))).kept == 100


def test_recomputation_is_paid_for():
    gpu, once = GPUS["h100"], costs.time(planned(BIG), GPUS["h100"], 0.4)
    again = costs.time(planned(BIG, "--recompute-granularity full --recompute-method uniform"), gpu, 0.4)
    layers = flops_per_token(planned(BIG).shape, head=False) / flops_per_token(planned(BIG).shape)
    assert again.step / once.step == pytest.approx(1 + layers / 3)
    assert again.mfu < once.mfu == pytest.approx(0.4)


# Refusals


@pytest.mark.parametrize(
    "words, said",
    [
        ("--nodes 3", "global-batch-size = 640 must be a multiple of micro-batch-size x data-parallel size = 2 x 24"),
        ("--tensor-model-parallel-size 3", "tensor-model-parallel-size = 3 must divide num-attention-heads = 16"),
        ("--pipeline-model-parallel-size 8", "pipeline-model-parallel-size = 8 must divide num-layers = 36"),
        ("--context-parallel-size 3 --nodes 3", "2 x context-parallel-size = 6 must divide seq-length = 4096"),
        ("--tensor-model-parallel-size 16", "8 process(es) cannot be split into tensor 16 x pipeline 1 x context 1"),
        ("--tensor-model-parallel-size 8 --padded-vocab-size 147460",
         "tensor-model-parallel-size = 8 must divide padded-vocab-size = 147460"),
        ("--micro-batch-size 8", "pipeline stage 0 needs "),
        ("--gpus-per-node 1 --gpu h200 --micro-batch-size 16", "pipeline stage 0 needs "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_nearest_that_can(capsys, words, said):
    code, out, err = plan(capsys, BIG, *words.split())
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"xact: error: {said}"), err
    gpus, flags = re.search(r"nearest that fits (\d+) GPUs?: ([^;\n]+)", err).groups()
    # what it proposes is accepted, on the same GPUs and with the same batch
    code, out, err = plan(capsys, BIG, *words.split(), *flags.split(), "--json")
    assert code == 0, err
    assert json.loads(out)["layout"]["batch"] == 640 and json.loads(out)["layout"]["gpus"] == int(gpus)


def test_the_nearest_changes_least(capsys):
    near = search.nearest
    run = planned(BIG)
    assert near(run.config, run.args, 8, 8, GPUS["h100"]) == {}
    crowded = Namespace(**vars(run.args) | {"micro_batch_size": 4})
    assert near(run.config, crowded, 8, 8, GPUS["h100"]) == {"micro_batch_size": 2}
    assert "or the config as it is on --nodes 4" in plan(capsys, BIG, "--nodes", "3")[2]


def test_the_nearest_keeps_a_batch_that_follows_from_the_layout():
    config = load(BIG)
    config = replace(config, megatron={key: v for key, v in config.megatron.items() if key != "global-batch-size"})
    asked = job.describe(config)
    near = search.nearest(config, asked, 8, 8, GPUS["a100-40gb"])
    assert near == {"tensor_model_parallel_size": 2, "global_batch_size": 2 * 8}  # 2 sequences on each of 8 GPUs


def test_a_batch_that_no_layout_of_these_gpus_divides_is_answered_with_one_that_it_does(capsys):
    words = ["--nodes", "3", "--gpus-per-node", "7"]
    said = plan(capsys, BIG, *words)[2]
    assert "nothing fits 21 GPUs but another batch: --global-batch-size 630" in said  # 15 x 2 x 21, where 640 was asked
    assert plan(capsys, BIG, *words, "--global-batch-size", "630")[0] == 0


def test_where_nothing_helps_it_says_so(capsys):
    huge = "--hidden-size 32768 --ffn-hidden-size 196608 --num-attention-heads 256"
    said = plan(capsys, BIG, *huge.split())[2]
    assert "nothing fits 8 GPUs" in said and "another batch" not in said


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--num-experts 8", "mixture of experts (num-experts) is not planned here"),
        ("--fp8-format hybrid", "FP8 (fp8) is not planned here"),
        ("--rampup-batch-size 64 64 1000", "a batch that grows during the run (rampup-batch-size) is not planned here"),
        ("--step-batch-size-schedule 0:64", "a batch that grows during the run (step-batch-size-schedule) is not"),
        ("--optimizer muon", "optimizer = 'muon' is not planned here"),
        ("--max-position-embeddings 128", "max-position-embeddings = 128 must be at least seq-length = 4096"),
        ("--lr-warmup-iters 60000", "lr-warmup-iters = 60000 must be less than lr-decay-iters = 50000"),
    ],
)
def test_what_it_does_not_know_it_refuses(capsys, flags, said):
    code, _, err = plan(capsys, BIG, *flags.split())
    assert code == 2 and err.startswith(f"xact: error: {said}") and len(err.splitlines()) == 1, err


def test_the_vocabulary_is_padded_as_megatron_pads_it():
    for tensor_parallel, rows in ((1, 1152), (2, 1280)):
        words = f"--vocab-size 1100 --tensor-model-parallel-size {tensor_parallel}"
        run = job.describe(without_vocabulary().with_overrides(words.split()))
        assert job.with_layout(without_vocabulary(), run, 8, 8).shape.vocab == rows


def test_micro_batches_of_virtual_stages():
    """Which numbers of them Megatron's interleaved schedule takes, of four pipeline stages."""
    config = load(BIG).with_overrides(
        shlex.split("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 3")
    )

    def legal(asked: RunConfig) -> bool:
        try:
            return job.read(asked, 64, 8).layout.virtual == 3
        except ValueError as error:
            assert str(error).startswith("virtual pipeline stages run a step's micro-batches, here ")
            return False

    def taken(*words: str) -> list[int]:
        batches = {number: ["--global-batch-size", str(number * 2 * 16)] for number in range(1, 18)}
        return [number for number, batch in batches.items() if legal(config.with_overrides([*words, *batch]))]

    group = "--microbatch-group-size-per-virtual-pipeline-stage"
    assert taken() == taken(group, "4") == [4, 8, 12, 16]
    assert taken(group, "6") == [6, 10, 11, 12, 16, 17]
    assert taken(group, "3") == []
    default = {key: value for key, value in config.megatron.items() if key != "global-batch-size"}  # one micro-batch
    assert not legal(replace(config, megatron=default))


def test_a_vocabulary_that_nobody_states_is_asked_for(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = plan(capsys, ROOT / "configs/quickstart.toml", "--gpus-per-node", "2")
    assert code == 2 and "set padded-vocab-size in [model], or make the data first" in err


def test_a_dry_run_of_a_rank_that_does_not_exist_is_refused(capsys):
    code, _, err = plan(capsys, SMALL, "--dry-run", "--rank", "8")
    assert (code, err) == (2, "xact: error: --rank 8 does not exist among 8 GPUs: they are counted from 0\n")


# The GPU suite's comparison with measured peaks


def test_the_cases_that_a_gpu_will_measure_can_run_and_are_planned(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from tools.gpu import memory as suite

    for name, (sizes, flags) in suite.CASES.items():
        for layer in ("local", "transformer_engine"):
            run = suite.planned(tmp_path, layer, sizes, flags)
            checks.validate(run.config, 1)
            assert run.layout.micro_batches == 2
            # fits any of the GPUs, and dwarfs what is not planned
            assert 5e9 < memory.of_stage(run, 0).allocated < 60e9, name


# The report


def test_the_report_says_the_numbers_of_the_json(capsys):
    layout = ("--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4")
    words = (BIG, "--nodes", "8", *layout, "--mfu", "0.35")
    code, text, _ = plan(capsys, *words)
    said = json.loads(plan(capsys, *words, "--json")[1])
    assert code == 0
    assert f"{said['parameters']['total'] / 1e9:.2f}B parameters" in text
    need = said["memory"]
    parts = ("weights", "gradients", "optimizer", "activations", "ends", "passing", "reserve")
    assert need["total"] == pytest.approx(sum(need[part] for part in parts))
    assert f"{need['total'] / 1e9:.1f} of {GPUS['h100'].memory / 1e9:.1f} GB per GPU" in text
    for line in said["legal"]:
        assert line in text
    assert "tensor 4 divides 16 heads (4 each), 16 key-value heads (4 each), ffn 12,288 (3,072)" in text
    assert "4 x 4 x 1 = 16 rank(s) of a model copy divide 64 GPUs: 4 data-parallel" in text
    assert "micro-batch 2 x data 4 = 8 divides batch 640: 80 micro-batches per step" in text
    assert "640 sequences = 2 (micro) x 4 (data) x 80 in a pipeline; 2.62M tokens" in text
    assert "50,000 steps, 131.1B tokens" in text and "38,000 constant, 10,000 cooldown (minus_sqrt)" in text
    assert "35% of 989 TFLOP/s" in text and f"{said['time']['gpu_hours']:,.0f} GPU-hours" in text
    assert {part["name"] for part in said["traffic"]} == {"data", "tensor", "pipeline"}
    assert max(map(len, text.splitlines())) <= 160


def test_a_warm_up_can_be_a_share_of_the_decay():
    run = planned(BIG, "--lr-warmup-fraction 0.1 --lr-decay-iters 40000")
    assert report.phases(run)[0] == ("warm-up", 4000)


def test_likely_mistakes_are_pointed_out():
    few = planned(BIG, "--tensor-model-parallel-size 16 --pipeline-model-parallel-size 4 --micro-batch-size 64",
                  gpus=64, sets=("parallel.sequence-parallel=false",))  # fmt: skip
    found = " / ".join(legality.warnings(few))
    assert "tensor 16 reaches over servers of 8 GPUs" in found
    assert "without sequence-parallel" in found and "10 micro-batches are few for 4 stages" in found
    assert legality.warnings(planned(BIG)) == []


def test_plans_do_not_depend_on_the_order_of_stages():
    """The heaviest stage is the first where micro-batches pile up, the last where the logits are."""
    deep = planned(BIG, "--pipeline-model-parallel-size 4 --micro-batch-size 1", gpus=32)
    assert memory.heaviest(deep).stage == 0
    wide = planned(BIG, "--pipeline-model-parallel-size 2 --micro-batch-size 1 --padded-vocab-size 2359296", gpus=32)
    assert memory.heaviest(wide).stage == 1


def test_short_numbers():
    assert list(map(report.short, (999, 1234, 1_132_537_392, 131_072_000_000))) == ["999", "1.23k", "1.13B", "131.1B"]
    assert list(map(report.duration, (0.88, 150, 10_000, 300_000))) == [
        "0.88 s", "2.5 minutes", "2.8 hours", "3.5 days"
    ]  # fmt: skip
