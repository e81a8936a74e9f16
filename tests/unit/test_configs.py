"""configs/: the published recipes number by number, matched pairs, and a ladder that keeps its own rules."""

from pathlib import Path

import pytest

from megatron_xact.pretraining import arguments, checks
from megatron_xact.pretraining.config import RunConfig, load
from megatron_xact.pretraining.planning import job, report, search
from megatron_xact.pretraining.planning.counts import flops_per_token, parameters
from megatron_xact.pretraining.planning.hardware import GPUS

CONFIGS = Path(__file__).parents[2] / "configs"
# Recipes of studies are not configs of runs: tests/studies/test_study_plan.py plans them.
FILES = sorted(
    path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.toml") if path.parent.name != "studies"
)
BASES = ("llama.toml", "paper/base.toml", "small/base.toml")
RUNS = [name for name in FILES if name not in (*BASES, "quickstart.toml")]
ACTIVATIONS = ("xielu", "xiprelu", "relu2", "swiglu")
LADDER = ("10m", "35m", "70m", "125m", "350m")

# Huang and Schlag 2024, appendix A.1 and A.2: the tables row by row. Intermediate size: gated, ungated.
A1_1B = {
    "Sequence Length": 4096, "Batch Size": 440, "Vocab Size": 147456, "Hidden Size": 1536,
    "Intermediate Size": (6144, 9216), "Num Hidden Layers": 24, "Num Attention Heads": 16, "Weight Decay": 0.1,
    "Grad Clip": 1.0, "Adam Beta1, Beta2": (0.9, 0.95), "Adam Epsilon": 1e-8, "Rope Theta": 500000,
    "Max Learning Rate": 8e-4, "Min Learning Rate": 0.0, "LR Warmup Steps": 2000, "LR Constant Steps": 53500,
    "LR Cooldown Steps": 14500, "LR Cooldown Style": "1-sqrt", "Tie Word Embeddings": True,
}  # fmt: skip
A1_3B = {
    "Sequence Length": 4096, "Batch Size": 640, "Vocab Size": 147456, "Hidden Size": 2048,
    "Intermediate Size": (8192, 12288), "Num Hidden Layers": 36, "Num Attention Heads": 16, "Weight Decay": 0.1,
    "Grad Clip": 1.0, "Adam Beta1, Beta2": (0.9, 0.95), "Adam Epsilon": 1e-8, "Rope Theta": 500000,
    "Max Learning Rate": 7e-4, "Min Learning Rate": 0.0, "LR Warmup Steps": 2000, "LR Constant Steps": 38000,
    "LR Cooldown Steps": 10000, "LR Cooldown Style": "1-sqrt", "Tie Word Embeddings": False,
}  # fmt: skip
A2 = {
    "Sequence Length": 1024, "Batch Size": 80, "Vocab Size": 128256, "Hidden Size": 1536,
    "Intermediate Size": (6144, 9216), "Num Hidden Layers": 24, "Num Attention Heads": 16, "Weight Decay": 0.01,
    "Grad Clip": 1.0, "Adam Beta1, Beta2": (0.9, 0.95), "Adam Epsilon": 1e-8, "Rope Theta": 500000,
    "Max Learning Rate": 6e-4, "Min Learning Rate": 6e-5, "LR Warmup Steps": 200, "LR Constant Steps": 0,
    "LR Cooldown Steps": 49800, "LR Cooldown Style": "Cosine", "Tie Word Embeddings": True,
}  # fmt: skip
TABLES = {"1.1b": A1_1B, "3b": A1_3B, "ablation": A2}
STYLES = {"minus_sqrt": "1-sqrt", "cosine": "Cosine"}


def planned(name: str, gpus: int = 8) -> job.Job:
    return job.read(load(CONFIGS / name), gpus, 8)


def table(config: RunConfig) -> dict:
    """The appendix's rows of a config, as Megatron's parser has them."""
    a = arguments.parse(config.arguments())
    if a.lr_decay_style == "WSD":
        cooldown, style = a.lr_wsd_decay_iters, a.lr_wsd_decay_style
    else:
        cooldown, style = a.train_iters - a.lr_warmup_iters, a.lr_decay_style
    return {
        "Sequence Length": a.seq_length, "Batch Size": a.global_batch_size, "Vocab Size": a.padded_vocab_size,
        "Hidden Size": a.hidden_size, "Intermediate Size": a.ffn_hidden_size, "Num Hidden Layers": a.num_layers,
        "Num Attention Heads": a.num_attention_heads, "Weight Decay": a.weight_decay, "Grad Clip": a.clip_grad,
        "Adam Beta1, Beta2": (a.adam_beta1, a.adam_beta2), "Adam Epsilon": a.adam_eps, "Rope Theta": a.rotary_base,
        "Max Learning Rate": a.lr, "Min Learning Rate": a.min_lr, "LR Warmup Steps": a.lr_warmup_iters,
        "LR Constant Steps": a.train_iters - a.lr_warmup_iters - cooldown, "LR Cooldown Steps": cooldown,
        "LR Cooldown Style": STYLES[style], "Tie Word Embeddings": not a.untie_embeddings_and_output_weights,
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_says_only_what_differs(name):
    config = load(CONFIGS / name)
    assert config.activation.record().name == config.activation.name
    assert len((CONFIGS / name).read_text().splitlines()) <= 65


@pytest.mark.parametrize("name", RUNS)
def test_it_fits_an_8_gpu_server_as_it_is(name):
    config = load(CONFIGS / name)
    fitting = search.fitting(config, job.describe(config), 8, 8, GPUS["h100"])
    assert fitting.layout.micro_batches * fitting.layout.micro_batch * fitting.layout.data == fitting.layout.batch


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", TABLES)
def test_it_is_the_papers_table(size, activation):
    config = load(CONFIGS / f"paper/{size}-{activation}.toml")
    gated, ungated = TABLES[size]["Intermediate Size"]
    wanted = TABLES[size] | {"Intermediate Size": gated if activation == "swiglu" else ungated}
    assert table(config) == wanted
    assert config.activation.name == activation
    a = arguments.parse(config.arguments())
    # standard multi-head attention, RMSNorm, RoPE, no biases, no dropout: Llama
    assert (a.normalization, a.position_embedding_type, a.use_rope_scaling) == ("RMSNorm", "rope", False)
    assert not (a.group_query_attention or a.qk_layernorm or a.add_bias_linear or a.add_qkv_bias)
    assert (a.hidden_dropout, a.attention_dropout, a.bf16, a.use_distributed_optimizer) == (0.0, 0.0, True, True)
    assert a.save == a.load == f"runs/{size}-{activation}"


def test_tokenizers_and_data_are_the_papers():
    for size, tokenizer in {
        "1.1b": "mistralai/Mistral-Nemo-Base-2407",
        "3b": "mistralai/Mistral-Nemo-Base-2407",
        "ablation": "meta-llama/Meta-Llama-3-8B",
    }.items():
        megatron = load(CONFIGS / f"paper/{size}.toml").megatron
        assert (megatron["tokenizer-type"], megatron["tokenizer-model"]) == ("HuggingFaceTokenizer", tokenizer)
        assert megatron["train-data-path"][0].startswith("data/fineweb-edu-")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size, said", {"1.1b": "1.1B", "3b": "3.0B", "ablation": "1.1B"}.items())
def test_the_models_have_the_size_the_paper_gives(size, said, activation):
    count = parameters(planned(f"paper/{size}-{activation}.toml").shape)
    assert f"{sum(count.values()) / 1e9:.1f}B" == said
    assert count["activation"] == {"xielu": 2, "xiprelu": 2}.get(activation, 0) * TABLES[size]["Num Hidden Layers"]


PAIRS = [
    *((f"paper/{size}-{activation}.toml", f"paper/{size}-swiglu.toml")
      for size in TABLES for activation in ACTIVATIONS if activation != "swiglu"),
    *((f"small/{size}.toml", f"small/{size}-swiglu.toml") for size in LADDER),
]  # fmt: skip


@pytest.mark.parametrize("ungated, gated", PAIRS)
def test_pairs_match_in_parameters_and_flops(ungated, gated):
    shapes = [planned(name).shape for name in (ungated, gated)]
    assert [shape.gated for shape in shapes] == [False, True]
    a, b = (sum(parameters(shape).values()) for shape in shapes)
    assert abs(a - b) / b < 0.005
    a, b = (flops_per_token(shape) for shape in shapes)
    assert abs(a - b) / b < 0.005
    others = [load(CONFIGS / name).megatron for name in (ungated, gated)]
    differ = {key for key in others[0] | others[1] if others[0].get(key) != others[1].get(key)}
    assert differ == {"ffn-hidden-size", "save", "load"}


def test_token_budgets_are_the_papers():
    # "a constant learning rate over 100B tokens, and a 20% cooldown phase over 25B"; "4B tokens"
    tokens = {size: planned(f"paper/{size}.toml").tokens_per_step for size in TABLES}
    assert tokens == {"1.1b": 440 * 4096, "3b": 640 * 4096, "ablation": 80 * 1024}  # 1.8M, 2.6M, 82K
    assert 55_500 * tokens["1.1b"] == pytest.approx(100e9, rel=0.01)
    assert 14_500 * tokens["1.1b"] == pytest.approx(25e9, rel=0.06)
    assert 40_000 * tokens["3b"] == pytest.approx(100e9, rel=0.06)
    assert planned("paper/ablation.toml").tokens == pytest.approx(4e9, rel=0.03)


@pytest.mark.parametrize("name", [n for n in RUNS if not n.startswith("paper/ablation")])
def test_the_end_of_the_constant_phase_is_kept_to_branch_from(name):
    config, run = load(CONFIGS / name), planned(name)
    lengths = dict(report.phases(run))
    end, interval, every = lengths["warm-up"] + lengths["constant"], run.args.save_interval, config.xact.keep_every
    assert sum(lengths.values()) == run.steps
    if run.args.save is not None:  # a base of runs has no folder
        assert every % interval == 0 and end % every == 0 and config.xact.keep_checkpoints > 0


def test_apertus_8b_is_the_published_shape():
    """swiss-ai/Apertus-8B-2509, config.json; pretraining's RoPE and lengths by swiss-ai/pretrain-code."""
    run = planned("apertus-8b.toml")
    s, a = run.shape, run.args
    assert (s.hidden, s.layers, s.heads, s.groups, s.head_size, s.ffn) == (4096, 32, 32, 8, 128, 21504)
    assert (s.vocab, s.tied, s.qk_norm, s.gated, s.activation_parameters) == (131072, False, True, False, 2)
    assert (a.rotary_base, a.use_rope_scaling, a.rope_scaling_factor, a.seq_length) == (500000, True, 8.0, 4096)
    assert sum(parameters(s).values()) == 8_053_338_176


@pytest.mark.parametrize("size", LADDER)
def test_the_ladder_keeps_its_rules(size):
    run = planned(f"small/{size}.toml", gpus=1)
    total = sum(parameters(run.shape).values())
    assert total == pytest.approx(int(size[:-1]) * 1e6, rel=0.05)
    assert run.tokens / total == pytest.approx(20, rel=0.01)
    compute = flops_per_token(run.shape, head=False) * run.tokens
    assert run.args.lr == pytest.approx(0.3118 * compute**-0.125, rel=0.05)  # DeepSeek LLM, arXiv:2401.02954
    assert run.tokens_per_step == pytest.approx(0.2920 * compute**0.3271, rel=0.12)
    assert run.args.lr_wsd_decay_iters == pytest.approx(run.steps / 5, rel=0.01)
    assert run.sixteen_bit == (size not in ("10m", "35m"))


def test_the_law_of_the_ladder_is_that_of_the_papers_sizes():
    for size in ("1.1b", "3b"):
        run = planned(f"paper/{size}.toml")
        compute = flops_per_token(run.shape, head=False) * run.tokens
        assert run.args.lr == pytest.approx(0.3118 * compute**-0.125, rel=0.06)
        assert run.tokens_per_step == pytest.approx(0.2920 * compute**0.3271, rel=0.12)


def test_a_run_is_refused_for_its_missing_data_and_for_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no data/ is
    for name in ("paper/1.1b-xielu.toml", "small/125m.toml", "apertus-8b.toml"):
        with pytest.raises(FileNotFoundError, match=r"no such file data/fineweb-edu-[\w]+/train_text_document.bin"):
            checks.validate(load(CONFIGS / name), 8)
