"""`xact study plan`: the ladder's arithmetic, the files, what is refused, and what the trainer makes of the configs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from small_plans import SIZES, model_of, plan, recipe

from megatron_xact import cli
from megatron_xact.studies import expectation, planning
from megatron_xact.studies.ladder import build, cells, fit_budgets, params
from megatron_xact.studies.recipe import Size, read

ROOT = Path(__file__).parents[2]


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_gated_and_ungated_have_the_same_parameters():
    by_name = {t.name: t for t in build(recipe(), model_of)}
    assert by_name["a-swiglu-s1"].shape.ffn == 64 and by_name["a-xielu-s1"].shape.ffn == 96
    # Written out: embedding (the head is the same matrix), then per layer four square matrices, the MLP, two norms.
    for activation, mlp, alphas in (("swiglu", 3 * 32 * 64, 0), ("xielu", 2 * 32 * 96, 2)):
        N = 512 * 32 + 2 * (4 * 32**2 + mlp + 2 * 32 + alphas) + 32
        assert by_name[f"a-{activation}-s1"].params == N
        assert params(replace(by_name[f"a-{activation}-s1"].shape, tied=False)) == N  # an untied input does not count


def test_parameters_with_and_without_embeddings_are_told():
    """a: 2 layers of 4 x 32^2 (attention) + 2 x 32 x 96 (ungated), 5 norms of 32, 4 alphas; 512 x 32 per embedding."""
    layers = 2 * (4 * 32**2 + 2 * 32 * 96) + 5 * 32 + 4
    for tied, counts in ((True, (layers + 512 * 32, layers + 512 * 32, layers)),
                         (False, (layers + 512 * 32, layers + 2 * 512 * 32, layers))):  # fmt: skip

        def model(activation, size, tied=tied):
            found = model_of(activation, size)
            return replace(found, shape=replace(found.shape, tied=tied))

        made = planning.Plan("test", tuple(build(recipe(activations=("xielu",)), model)))
        row = next(line.split() for line in planning.text(made).splitlines() if line.startswith("a "))
        assert tuple(int(cell.replace(",", "")) for cell in row[5:8]) == counts


def test_ffn_that_cannot_be_matched_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"swiglu a: with ffn = 64 instead of 100 .* multiple of 12, or ffn-multiple"):
        build(recipe(sizes={"a": Size(2, 32, 2, 100)}), model_of)
    (trunk, *_) = build(recipe(sizes={"a": Size(2, 32, 2, 100)}, ffn_multiple=1), model_of)
    assert trunk.shape.ffn == 67


def test_every_activation_of_a_size_sees_the_same_tokens_batch_and_rate():
    trunks = build(recipe(learning_rate="deepseek", batch="deepseek"), model_of)
    for size in "ab":
        those = [t for t in trunks if t.size == size]
        assert len(those) == 4
        assert len({(t.budgets, t.batch, t.lr, t.warmup, t.interval, t.evaluations) for t in those}) == 1


def test_batch_and_rate_follow_the_stated_law():
    trunk = build(recipe(learning_rate="deepseek", batch="deepseek"), model_of)[-1]
    h, F, N = 64, 192, 512 * 64 + 3 * (4 * 64**2 + 2 * 64 * 192 + 2 * 64) + 64
    # 6 per weight of the layers, and half of the scores of 64 tokens, forward and backward.
    C = 20 * N * 3 * (6 * (4 * h**2 + 2 * h * F) + 6 * h * 64)
    assert trunk.lr == pytest.approx(0.3118 * C**-0.1250, rel=0.01)
    assert trunk.batch == pytest.approx(0.2920 * C**0.3271, abs=2 * 64)  # to four sequences
    assert trunk.sequences % 4 == 0


def test_budgets_are_met_and_cooldowns_leave_at_checkpoints():
    for trunk in build(recipe(tokens_per_parameter=(5, 7, 20)), model_of):
        N = trunk.params
        for ratio, budget in zip((5, 7, 20), trunk.budgets, strict=True):
            assert budget.steps * trunk.batch == pytest.approx(ratio * N, rel=0.015)
            assert budget.cooldown / budget.steps == pytest.approx(0.2, abs=0.01)
        assert all(b.leaves % trunk.interval == 0 for b in trunk.budgets[:-1])
        assert trunk.warmup * trunk.batch == pytest.approx(N, rel=0.02)  # one token per parameter
        assert trunk.evaluations * trunk.batch >= 1e4


@pytest.mark.parametrize("steps, interval", [((100, 200, 400), 80), ((1000, 1500, 3000), 400), ((100,), 20)])
def test_interval_is_as_long_as_the_budgets_allow(steps, interval):
    assert fit_budgets(steps, 0.2, "a")[0] == pytest.approx(interval, rel=0.01)


def test_flops_and_steps_of_cells():
    trunks = plan(seeds=(1,)).trunks
    every = cells(trunks)
    assert [c.is_branch for c in every] == [False] * 4 + [True] * 8
    branch = next(c for c in every if c.is_branch)
    assert branch.folder == f"runs/a-swiglu-s1/branches/step-{branch.budget.leaves}+{branch.budget.cooldown}"
    # Written out for gated size a: layers, logits, causal half of the scores; times three for backward.
    per_token = 3 * (2 * 2 * (4 * 32**2 + 3 * 32 * 64) + 2 * 32 * 512 + 2 * 2 * 32 * 64)
    assert branch.flops == per_token * branch.tokens
    assert sum(c.steps for c in every if c.trunk is trunks[0]) == trunks[0].steps


def test_a_sweep_trains_every_run_at_every_rate():
    trunks = build(recipe(sweep=(0.5, 1, 2), seeds=(1,)), model_of)
    assert [t.name for t in trunks[:3]] == ["a-swiglu-s1-lr0.5x", "a-swiglu-s1-lr1x", "a-swiglu-s1-lr2x"]
    assert [t.lr for t in trunks[:3]] == [1.5e-3, 3e-3, 6e-3]


def test_an_activation_can_have_a_rate_of_its_own():
    rates = {(t.activation, t.size): t.lr for t in build(recipe(rates={"xielu": 2.0}), model_of)}
    assert rates == {("swiglu", s): 3e-3 for s in "ab"} | {("xielu", s): 6e-3 for s in "ab"}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"activations": ("xielu", "xielu")}, "two of them are the same"),
        ({"tokens": (2000, 1e6), "tokens_per_parameter": ()}, "least budget is 3.91 steps|half of the"),
        ({"tokens_per_parameter": (10, 10.05)}, "too close to each other"),
        ({"warmup": 3}, "a warm-up of .* steps is more than half"),
        ({"batch_multiple": 6}, "must be a multiple of micro-batch-size = 4"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        build(recipe(**changes), model_of)


# -- the file ---------------------------------------------------------------------------------------------------------

TOML = """
base = "base.toml"
[study]
activations = ["swiglu", "xielu"]
tokens = [1e6, 2e6]
seeds = [1]
[study.sizes]
a = {layers = 2, hidden = 32, heads = 2, ffn = 96}
[model]
seq-length = 64
"""


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('base = "base.toml"', "", 'base = "FILE" must name'),
        ('base = "base.toml"', 'base = "no.toml"', "no such file as"),
        ("[study]", "[study]\nlearningrate = 3e-4", "unknown key 'learningrate'; did you mean learning-rate"),
        ("tokens = [1e6, 2e6]", "", "either as tokens or as tokens-per-parameter"),
        ("tokens = [1e6, 2e6]", "tokens = [1e6]\ntokens-per-parameter = [1]", "either as tokens or as"),
        ("tokens = [1e6, 2e6]", "tokens = [1e6, -1]", "positive numbers of tokens"),
        ("tokens = [1e6, 2e6]", "tokens-per-parameter = [inf]", "must be a list of positive numbers"),
        ("seeds = [1]", "batch = inf", "batch = inf must be"),
        ("seeds = [1]", "seeds = [4294967296]", "positive whole numbers of 32 bits"),
        ("seeds = [1]", "seeds = [1, 1]", "has an entry twice"),
        ("seeds = [1]", "seeds = [0]", "positive whole numbers"),
        ("seeds = [1]", "rates = {relu2 = 2.0}", "rates.relu2 is of none of the activations"),
        ("seeds = [1]", "rates = {xielu = -2.0}", "must be a table of positive factors"),
        ("seeds = [1]", "cooldown = 1.5", "a share between 0 and 1"),
        ("seeds = [1]", 'batch = "chinchilla"', 'must be "deepseek" or a positive number'),
        ("ffn = 96", "fnn = 96", "must have layers, hidden, heads, ffn"),
        ("heads = 2", "heads = 3", "multiple of heads"),
        ("a = {", '"a/b" = {', "letters, digits"),
        ("seq-length = 64", "num-layers = 3", r"\[model\]: num-layers is not yours to set"),
        ("seq-length = 64", '[activation]\nname = "xielu"', r"\[activation\]: name is not yours to set"),
        ("[study]", "[study", "not valid TOML"),
        ("[model]", "[study.more]", "unknown key 'more'"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_in_one_line(tmp_path, old, new, said):
    (tmp_path / "base.toml").touch()
    (tmp_path / "s.toml").write_text(TOML)
    assert read(tmp_path / "s.toml").recipe.tokens == (1e6, 2e6)
    (tmp_path / "s.toml").write_text(TOML.replace(old, new))
    with pytest.raises(ValueError, match=said) as error:
        read(tmp_path / "s.toml")
    assert "\n" not in str(error.value)


# -- the expected answer ----------------------------------------------------------------------------------------------


def test_the_expected_interval_holds_what_was_planted_and_grows_with_noise():
    made = plan(sizes=SIZES | {"c": Size(4, 128, 4, 384)})
    widths = []
    for noise in (0.001, 0.01):
        found = expectation.precision(made, noise, 1.1, studies=6)
        assert sum((found.low < 1.1) & (found.high > 1.1)) >= 5
        widths.append((found.high - found.low).mean())
    assert 4 < widths[1] / widths[0] < 25  # ten times the noise


def test_an_answer_is_expected_of_few_tokens_too():
    small = {"tokens_per_parameter": (0.5, 1, 2), "batch": 4 * 64, "warmup": 0.1}
    made = plan(sizes=SIZES | {"c": Size(4, 128, 4, 384)}, **small)
    assert min(c.tokens for c in cells(made.trunks)) < 2e4
    assert expectation.precision(made, 0.002, 1.05, studies=1).why_not == ""


def test_too_small_a_study_is_told_that_it_has_no_answer():
    small = plan(sizes={"a": Size(2, 32, 2, 96)}, seeds=(1,))
    found = expectation.precision(small, 0.002, 1.05)
    assert "size" in found.why_not
    assert "no interval can be expected" in expectation.precision_text(small, 0.002, 1.05)


def test_hours_from_a_speed():
    made = plan(seeds=(1,), activations=("xielu",), sizes={"a": Size(2, 32, 2, 96)})
    (trunk,) = made.trunks
    speed = expectation.by_flops(made, 1000.0)
    tokens = (trunk.steps + 3 * trunk.evaluations / 3) * trunk.batch  # three evaluations, forward only
    assert speed.hours(trunk) == pytest.approx(tokens / 1000 / 3600)


# -- with the real trainer's configs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of configs/studies/tiny.toml, and its file."""
    folder = tmp_path_factory.mktemp("study") / "tiny"
    assert cli.main(["study", "plan", str(ROOT / "configs/studies/tiny.toml"), "--out", str(folder)]) == 0
    return folder


def test_the_configs_are_what_the_plan_says(tiny):
    from megatron_xact.pretraining import config
    from megatron_xact.pretraining.planning import counts, job

    made = planning.load(tiny)
    assert len(made.trunks) == 24 and len(cells(made.trunks)) == 72
    for trunk in made.trunks[::5]:
        read_back = job.read(config.load(tiny / "configs" / f"{trunk.name}.toml"), 1, 1)
        assert sum(counts.parameters(read_back.shape).values()) == trunk.params
        assert read_back.shape == trunk.shape
        assert (read_back.steps, read_back.tokens_per_step) == (trunk.budgets[-1].steps, trunk.batch)
        args = read_back.args
        assert (args.lr, args.seed, args.lr_wsd_decay_iters) == (trunk.lr, trunk.seed, trunk.budgets[-1].cooldown)
        assert args.save == args.load == str(tiny / "runs" / trunk.name)
    for trunk in made.trunks:
        assert abs(trunk.params / next(t.params for t in made.trunks if t.size == trunk.size) - 1) < 0.005


def test_the_example_is_what_its_comment_promises(tiny):
    trunks = planning.load(tiny).trunks
    assert {t.activation for t in trunks} == {"swiglu", "relu2", "xielu", "xiprelu"}
    assert all(2.5e5 < t.params < 3e6 and len(t.budgets) == 3 for t in trunks)
    work = sum(c.steps * c.trunk.batch * 6 * c.trunk.params for c in cells(trunks))
    assert work < 3600 * 90e9  # what two cores do in an hour


def test_planning_again_changes_nothing_and_another_plan_is_refused(tiny, tmp_path, capsys):
    before = {p: (p.read_text(), p.stat().st_mtime_ns) for p in [*tiny.rglob("*.toml"), tiny / "study.json"]}
    words = ["study", "plan", str(ROOT / "configs/studies/tiny.toml"), "--out", str(tiny), "--tokens-per-second", "1e4"]
    assert cli.main(words) == 0
    assert "unchanged" in (told := capsys.readouterr().out)
    assert {p: (p.read_text(), p.stat().st_mtime_ns) for p in before} == before
    hours = float(re.search(r"expected +([\d.]+) h", told)[1])
    assert 0.5 < hours < 2
    assert json.loads((tiny / "expected.json").read_text())["expected"][0].startswith("expected")

    other = (ROOT / "configs/studies/tiny.toml").read_text().replace("seeds = [1, 2]", "seeds = [1, 2, 3]")
    path = tmp_path / "tiny.toml"
    path.write_text(other.replace("../llama.toml", str(ROOT / "configs/llama.toml")))
    assert cli.main(["study", "plan", str(path), "--out", str(tiny)]) == 2
    assert "holds another plan" in capsys.readouterr().err
    assert {p: (p.read_text(), p.stat().st_mtime_ns) for p in before} == before


def test_the_gpu_example_and_what_the_trainer_refuses(tmp_path, capsys):
    small = ROOT / "configs/studies/small.toml"
    assert cli.main(["study", "plan", str(small), "--out", str(tmp_path / "small"), "--gpu", "h100"]) == 0
    assert "1 x h100" in capsys.readouterr().out
    text = small.read_text().replace("../small", str(ROOT / "configs/small"))
    broken = f'base = "{ROOT}/configs/small/base.toml"\n[activation]\nname = "xielu"\nbeta = "half"\n'
    (tmp_path / "base.toml").write_text(broken)
    for old, new, said in (
        ("use-distributed-optimizer = true", "", "bf16 with a trainable activation needs"),
        ('"xiprelu"]', '"xiprelo"]', f"xiprelu or xielu or xelu? ({tmp_path}/s.toml [study]: activations)"),
        ("bf16 = true", "bf17 = true", f"unknown argument 'bf17'; nearest: 'bf16' ({tmp_path}/s.toml [runtime])"),
        ("[parallel]", "[activation]\nalpha_p = 0.7\n[parallel]", f"'alpha_p', only: none ({tmp_path}/s.toml [activa"),
        (
            f'base = "{ROOT}/configs/small/base.toml"',
            f'base = "{tmp_path}/base.toml"\n[activation]\nlr-mult = 2',
            f"beta = 'half' ({tmp_path}/base.toml [activation]): expected a number",
        ),
    ):
        (tmp_path / "s.toml").write_text(text.replace(old, new))
        assert cli.main(["study", "plan", str(tmp_path / "s.toml"), "--out", str(tmp_path / "no")]) == 2
        assert said in (told := capsys.readouterr().err) and told.count("\n") == 1
    for gpu, said in ((["a10"], "--gpu a10: it is known of a100-40gb, a100,"), (["h100", "--gpus", "7"], "x 7 = ")):
        assert cli.main(["study", "plan", str(small), "--out", str(tmp_path / "no"), "--gpu", *gpu]) == 2
        told = capsys.readouterr()
        assert said in told.err and not told.out
    assert not (tmp_path / "no").exists()
    assert cli.main(["study", "plan", str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().err == f"xact: error: no such study: {tmp_path}/none.toml\n"
