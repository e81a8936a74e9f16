"""`xact verify`, and models loaded for it: parity with transformers per family; planted faults, each named rightly."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import xact
from safetensors.torch import load_file, save_file
from saved import hf_configs, in_process, save_hf

# Parity of families


def parity(models: dict[str, Path], out: Path) -> dict[str, dict]:
    """Each transformers model, imported into Megatron: how far Megatron's own logits are from transformers' own."""
    from megatron_xact.checkpoints.export import export
    from megatron_xact.checkpoints.importing import import_checkpoint
    from megatron_xact.checkpoints.model import load
    from megatron_xact.checkpoints.verify import manual_pages, verify

    found = {}
    for name, folder in models.items():
        imported = out / folder.name
        import_checkpoint(folder, imported, verify=False)
        ours, theirs = load(imported), load(folder)
        ids = theirs.tokenizer()(manual_pages())["input_ids"][:128]
        tokens = torch.tensor(ids).view(2, 64)
        logits = ours.logits(tokens)
        report = verify(folder, imported)
        found[name] = {
            "kinds": (ours.source.kind, type(theirs.module).__name__),
            "difference": float((logits - theirs.logits(tokens)).abs().max()),
            "spread": float(logits.std()),
            "shape": tuple(logits.shape),
            "same": report.same,
            "summary": report.summary(),
            "text": report.text(),
        }
        if name in ("qwen2", "llama head_dim"):
            back = out / f"{folder.name}-back"
            export(imported, back, verify=False)
            report = verify(imported if name == "qwen2" else folder, back)
            found[f"{name} exported"] = {"same": report.same, "problems": report.problems}
    return found


@pytest.fixture(scope="module")
def parities(hf_models, tmp_path_factory) -> dict[str, dict]:
    return in_process(parity, hf_models, tmp_path_factory.mktemp("imported"))


@pytest.mark.parametrize("name", hf_configs())
def test_megatron_computes_what_transformers_computes(parities, name):
    found = parities[name]
    assert found["kinds"] == ("megatron", hf_configs()[name].__class__.__name__.replace("Config", "ForCausalLM"))
    assert found["shape"] == (2, 64, hf_configs()[name].vocab_size)  # without the rows of padding
    assert found["spread"] > 0.05  # the models say something
    assert found["difference"] < 1e-5
    assert found["same"], found["text"]


def test_a_tokenizer_that_transformers_reads_in_its_own_way_is_told(parities, hf_models):
    """transformers 5 gives every qwen2 folder a Qwen2Tokenizer, whatever its tokenizer files say; 5.1 does not yet."""
    from transformers import AutoTokenizer

    if type(AutoTokenizer.from_pretrained(hf_models["qwen2"])).__name__ != "Qwen2Tokenizer":
        assert parities["qwen2"]["same"] and parities["qwen2 exported"]["same"]
        return
    assert "note          transformers reads A's tokenizer.json as a Qwen2Tokenizer" in parities["qwen2"]["text"]
    exported = parities["qwen2 exported"]
    assert not exported["same"]
    assert exported["problems"] == [
        "transformers reads B's tokenizer.json as a Qwen2Tokenizer, which makes other tokens of a text; "
        "PreTrainedTokenizerFast reads the file as it is"
    ]


def test_rows_beyond_the_tokenizers_ids_come_back(parities):
    assert parities["llama head_dim exported"] == {"same": True, "problems": []}


# Faults


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, content: dict[str, torch.Tensor]) -> None:
    save_file({name: t.contiguous() for name, t in content.items()}, folder / "model.safetensors", {"format": "pt"})


def change(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def exchange(content: dict[str, torch.Tensor], one: str, other: str) -> dict[str, torch.Tensor]:
    """With two parts of names exchanged, everywhere."""
    swap = {one: other, other: one}

    def renamed(name: str) -> str:
        for old, new in swap.items():
            if old in name:
                return name.replace(old, new)
        return name

    return {renamed(name): t for name, t in content.items()}


def k_and_v_swapped(folder: Path) -> None:
    store(folder, exchange(tensors(folder), "k_proj", "v_proj"))


def qk_norms_exchanged(folder: Path) -> None:
    store(folder, exchange(tensors(folder), "q_norm", "k_norm"))


def layers_exchanged(folder: Path) -> None:
    store(folder, exchange(tensors(folder), ".layers.1.", ".layers.2."))


def alpha_p_constrained(folder: Path) -> None:
    constrain(folder, "alpha_p", 0.0)


def alpha_n_constrained(folder: Path) -> None:
    constrain(folder, "alpha_n", 0.5)


def constrain(folder: Path, name: str, lower: float) -> None:
    content = tensors(folder)
    for key in content:
        if key.endswith(name):
            content[key] = lower + torch.nn.functional.softplus(content[key])
    store(folder, content)


def wrong_theta(folder: Path) -> None:
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    change(folder, rope_theta=10000.0, rope_parameters=rope | {"rope_theta": 10000.0})


def wrong_rope_factor(folder: Path) -> None:
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"] | {"factor": 32.0}
    change(folder, rope_scaling={k: v for k, v in rope.items() if k != "rope_theta"}, rope_parameters=rope)


def wrong_norm_eps(folder: Path) -> None:
    change(folder, rms_norm_eps=1e-3)


def beta_missing(folder: Path) -> None:
    content = tensors(folder)
    del content["model.layers.1.mlp.act_fn.beta"]
    store(folder, content)


def wrong_beta(folder: Path) -> None:
    content = tensors(folder)
    content["model.layers.2.mlp.act_fn.beta"] = torch.tensor(0.4)
    store(folder, content)


def unexpected(folder: Path) -> None:
    store(folder, tensors(folder) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})


def o_proj_scaled(folder: Path) -> None:
    content = tensors(folder)
    content["model.layers.3.self_attn.o_proj.weight"] *= 1.5
    store(folder, content)


def one_element(folder: Path) -> None:
    content = tensors(folder)
    content["model.layers.3.mlp.down_proj.weight"][5, 7] += 1e-7
    store(folder, content)


def not_a_number(folder: Path) -> None:
    content = tensors(folder)
    content["model.norm.weight"][3] = float("nan")
    store(folder, content)


def head_shifted(folder: Path) -> None:
    content = tensors(folder)
    content["lm_head.weight"] = content["lm_head.weight"].roll(1, 0)
    store(folder, content)


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:50]
    path.write_text(json.dumps(content))


def nothing(folder: Path) -> None:
    pass


# fault: (tensors equal?, first module that differs, a part of what is said about it)
FAULTS: dict[Callable, tuple[bool, tuple[int | None, str] | None, str]] = {
    k_and_v_swapped: (False, (0, "self_attn.k_proj"), "B has there what A has in layers.0.self_attn.v_proj.weight"),
    qk_norms_exchanged: (False, (0, "self_attn.q_norm"), "B has there what A has in layers.0.self_attn.k_norm.weight"),
    layers_exchanged: (False, (1, "input_norm"), "B has there what A has in layers.2.input_norm.weight"),
    alpha_p_constrained: (False, (0, "mlp.act_fn"), "looks like its effective value"),
    alpha_n_constrained: (False, (0, "mlp.act_fn"), "looks like its effective value"),
    wrong_theta: (True, (0, "self_attn.attention"), "logits differ"),
    wrong_rope_factor: (True, (0, "self_attn.attention"), "rotary frequencies differ"),
    wrong_norm_eps: (True, (0, "input_norm"), "logits differ"),
    beta_missing: (False, None, "B lacks model.layers.1.mlp.act_fn.beta"),
    wrong_beta: (False, (2, "mlp.act_fn"), "layers.2.mlp.act_fn.beta: largest difference 0.1"),
    unexpected: (False, None, "B has unexpected model.layers.0.self_attn.q_proj.bias"),
    o_proj_scaled: (False, (3, "self_attn.o_proj"), "in 1,024 of 1,024 elements"),
    one_element: (False, None, "layers.3.mlp.down.weight: largest difference"),
    not_a_number: (False, (None, "norm"), "norm.weight"),
    head_shifted: (False, (None, "lm_head"), "lm_head.weight"),
    other_tokenizer: (True, None, "the tokenizers of A and B make different tokens"),
}


def judge(run: Path, out: Path, tokenizer: Path) -> dict[str, dict]:
    """Export a run, plant each fault in a copy, and verify it against the run."""
    from megatron_xact.checkpoints.export import export
    from megatron_xact.checkpoints.verify import verify

    export(run, out / "good", verify=False)
    export(run, out / "bf16", dtype="bf16", verify=False)
    words = out / "words.txt"
    words.write_text("A sentence that the model has not seen; it is short.")
    cases = {fault.__name__: (run, out / fault.__name__, {}) for fault in (*FAULTS, nothing)}
    for fault in (*FAULTS, nothing):
        shutil.copytree(out / "good", out / fault.__name__)
        fault(out / fault.__name__)
    cases |= {
        "bf16": (run, out / "bf16", {}),
        "two exports": (out / "good", out / "bf16", {}),
        "two exports, one wrong": (out / "good", out / "k_and_v_swapped", {}),
        "the run with itself": (run, run, {}),
        "on a given text": (run, out / "good", {"text": words.read_text()}),
        "tensors only": (run, out / "wrong_theta", {"logits": False}),
        "tolerance zero": (run, out / "good", {"tolerance": 0.0}),
    }
    found = {}
    for name, (a, b, options) in cases.items():
        report = verify(a, b, **options)
        found[name] = json.loads(report.json()) | {"text": report.text(), "summary": report.summary()}
    return found


def models_alive(pairs: list[tuple[Path, Path]]) -> list[int]:
    """While these are compared: how many models still live when one is loaded, and in the end; without Python's gc."""
    import gc
    import weakref

    from megatron_xact.checkpoints.side import Side
    from megatron_xact.checkpoints.verify import verify

    made, alive = weakref.WeakSet(), []
    load = Side.load

    def watched(side, dtypes):
        alive.append(len(made))
        model = load(side, dtypes)
        made.add(model.module)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Side, "load", watched)
        gc.disable()
        for one, other in pairs:
            verify(one, other)
    return [*alive, len(made)]


@pytest.fixture(scope="module")
def judged(runs, tmp_path_factory) -> dict[str, dict]:
    return in_process(judge, runs["apertus tp2"], tmp_path_factory.mktemp("faults"), runs.tokenizer)


def test_a_good_export_is_the_same(judged):
    report = judged["nothing"]
    assert report["same"], report["text"]
    assert report["problems"] == report["skipped"] == report["notes"] == []
    assert report["tensors"] == 3 + 4 * (10 + 4) and report["tensors_differing"] == []
    assert 0.0 <= report["logits_difference"] < 1e-5
    assert report["text_tokens"] == 512 and "16 of 16 greedy tokens alike" in report["continuation"]
    assert report["text"].splitlines()[-1].startswith("SAME")


def test_there_is_never_more_than_one_model_in_memory(runs, hf_models):
    trained = [(runs["apertus tp2"], runs["apertus tp2"]), (runs["arcee"], runs["arcee"])]
    pairs = [*trained, *((hf_models[name], hf_models[name]) for name in ("apertus", "llama", "starcoder2"))]
    assert in_process(models_alive, pairs) == [0] * (2 * len(pairs) + 1)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught_and_named(judged, fault):
    tensors_equal, module, said = FAULTS[fault]
    report = judged[fault.__name__]
    assert not report["same"]
    assert any(said in problem for problem in report["problems"]), report["text"]
    if report["tensors"]:
        assert (report["tensors_differing"] == []) == tensors_equal
    found = report["first_module"] and (report["first_module"]["layer"], report["first_module"]["module"])
    assert found == module, report["text"]
    if module:
        assert not report["logits_difference"] <= 1e-4
        assert report["first_token"] and "first differing module" in report["text"]


def test_greedy_continuations_that_part_are_told(judged):
    report = judged["head_shifted"]
    assert any(problem.startswith("greedy continuations part at token 0") for problem in report["problems"])
    assert "0 of 16 greedy tokens alike" in report["continuation"]


def test_what_cannot_be_loaded_is_not_loaded(judged):
    assert judged["beta_missing"]["logits_difference"] is None
    assert "cannot be loaded" in judged["beta_missing"]["skipped"][0]


def test_a_coarser_export_is_compared_at_its_own_precision(judged):
    report = judged["bf16"]
    assert report["same"], report["text"]
    assert report["logits_difference"] < 1e-5  # rounding to bf16 alone moves these logits by more than 1e-3
    assert report["notes"] == ["dtypes differ: compared after rounding to bfloat16"]


def test_any_two_kinds_can_be_compared(judged):
    assert judged["two exports"]["same"], judged["two exports"]["text"]
    assert judged["the run with itself"]["same"], judged["the run with itself"]["text"]
    wrong = judged["two exports, one wrong"]
    assert not wrong["same"] and wrong["first_module"]["module"] == "self_attn.k_proj"


def test_text_and_tolerance_can_be_chosen(judged):
    assert judged["on a given text"]["same"] and judged["on a given text"]["text_tokens"] < 64
    assert not judged["tolerance zero"]["same"]


def test_a_check_that_did_not_run_is_told(judged):
    report = judged["tensors only"]
    assert report["same"] and report["logits_difference"] is None  # this fault is in the config alone
    assert "tensors only" in report["skipped"][0] and report["skipped"][0] in report["text"]


def test_memory_that_is_not_there_is_told_in_numbers(hf_models):
    from megatron_xact.checkpoints.model import locate
    from megatron_xact.checkpoints.side import Side
    from megatron_xact.checkpoints.verify import _too_big

    side = Side(locate(hf_models["llama"]))
    assert _too_big(side, side) is None
    side.use(replace(side.architecture, hidden_size=10**9))
    assert "parameters in fp32 need about" in _too_big(side, side)


def test_rounding_is_to_the_coarser_dtype():
    from megatron_xact.checkpoints.verify import common_dtype

    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    assert common_dtype(fp32, bf16) == common_dtype(bf16, fp32) == bf16
    assert common_dtype(bf16, fp16) == fp16 and common_dtype(fp32, fp32) == fp32


# The command


def commands(models: dict[str, Path], other: Path, empty: Path, lacking: Path) -> dict[str, tuple[int, str, str]]:
    same = models["qwen3"]
    return {
        "same": xact("verify", same, same, "--json"),
        "different": xact("verify", same, other),
        "none": xact("verify", same, empty / "none"),
        "empty": xact("verify", same, empty),
        "lacking": xact("verify", same, lacking),
    }


@pytest.fixture(scope="module")
def commanded(hf_models, runs, tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    folder = tmp_path_factory.mktemp("commands")
    other = save_hf(hf_configs()["qwen3"], folder / "other", runs.tokenizer, seed=1)
    (folder / "empty").mkdir()
    lacking = Path(shutil.copytree(other, folder / "lacking"))
    config = json.loads((lacking / "config.json").read_text())
    del config["hidden_size"]
    (lacking / "config.json").write_text(json.dumps(config))
    return in_process(commands, hf_models, other, folder / "empty", lacking)


def test_the_command_tells_by_its_exit_code(commanded):
    code, out, error = commanded["same"]
    assert code == 0, error
    assert json.loads(out)["same"] is True
    code, out, error = commanded["different"]
    assert code == 1, error
    assert "first differing module: embed_tokens" in out
    assert out.splitlines()[-1].startswith("DIFFERENT")


@pytest.mark.parametrize(
    "place, said",
    [
        ("none", "no such folder"),
        ("empty", "holds no checkpoint"),
        ("lacking", "config.json lacks the key 'hidden_size'"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_one_line(commanded, place, said):
    code, out, error = commanded[place]
    assert (code, out) == (2, "") and said in error
    assert len(error.strip().splitlines()) == 1, error
