"""`xact import`: from transformers' own models, from our exports, and from the checkpoints of older forks."""

from __future__ import annotations

import json
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from saved import RUNS, VOCABULARY, hf_configs, in_process, save_hf

from megatron_xact.checkpoints import megatron_io
from megatron_xact.checkpoints.architecture import from_megatron, identity
from megatron_xact.checkpoints.export import export
from megatron_xact.checkpoints.importing import import_checkpoint
from megatron_xact.checkpoints.mapping import MegatronTensor, table
from megatron_xact.checkpoints.megatron_io import open_checkpoint
from megatron_xact.pretraining import config as config_file
from megatron_xact.pretraining.checks import validate

pytestmark = pytest.mark.distributed


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Megatron checkpoint."""
    source = open_checkpoint(checkpoint)
    return {name: source.read(MegatronTensor(name, shape)) for name, shape in source.shapes().items()}


def import_verified(models: dict[str, Path], folder: Path) -> dict[str, str]:
    """Imports with the comparison of logits; name -> what it said."""
    return {
        name: import_checkpoint(path, folder / path.name, tensor_parallel=2).verified for name, path in models.items()
    }


@pytest.fixture(scope="module")
def imports(runs, hf_models, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("imports")
    return folder, in_process(import_verified, hf_models, folder)


@pytest.mark.parametrize("name", hf_configs())
def test_megatron_computes_what_transformers_does(imports, name):
    said = imports[1][name]
    assert "tensors equal" in said and "16 of 16 greedy tokens alike" in said
    assert float(said.partition("logits within ")[2].split()[0]) <= 1e-4


@pytest.mark.parametrize("name", hf_configs())
def test_to_megatron_and_back_is_bit_equal(imports, hf_models, tmp_path, name):
    export(imports[0] / hf_models[name].name, tmp_path / "back", verify=False)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", hf_models[name]))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if key.endswith("act_fn.eps"):  # transformers' init rounds -1e-6 through bf16
            assert float(ours[key]) == pytest.approx(float(tensor), rel=0.01)
        else:
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", RUNS)
def test_a_run_to_hugging_face_and_back_is_bit_equal(runs, tmp_path, name):
    runs.start(*RUNS)
    export(runs[name], tmp_path / "hf", verify=False)
    import_checkpoint(tmp_path / "hf", tmp_path / "back", verify=False)
    before, after = tensors(runs[name]), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        vocabulary = key in ("embedding.word_embeddings.weight", "output_layer.weight")
        assert after[key].dtype == tensor.dtype and after[key].shape == tensor.shape
        rows = VOCABULARY if vocabulary else None
        assert torch.equal(after[key][:rows], tensor[:rows]), key
    old, new = (open_checkpoint(folder).args for folder in (runs[name], tmp_path / "back"))
    assert from_megatron(old, VOCABULARY) == from_megatron(new, VOCABULARY)


@pytest.mark.parametrize("name, ranks, flag", [("apertus", 2, "tensor"), ("llama head_dim", 2, "pipeline")])
def test_training_goes_on_from_an_import(runs, imports, hf_models, tmp_path, name, ranks, flag):
    """By the printed command, with a learning rate of nothing: Megatron loaded every weight, or saves others."""
    folder = imports[0] / hf_models[name].name
    data = runs.folder / "data"
    words = f"--train-data-path {data}/train_text_document --valid-data-path {data}/validation_text_document "
    words += "--lr 1e-30 --train-iters 1 --micro-batch-size 2 --global-batch-size 2 --eval-iters 1 --num-workers 0 "
    words += f"--tensor-model-parallel-size 1 --{flag}-model-parallel-size {ranks}"
    run = runs.train(f"on from {name}", ranks, words.split(), folder / "config.toml")
    before, after = tensors(folder), tensors(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


def test_the_config_is_complete_and_valid(imports, hf_models, monkeypatch):
    folder = imports[0] / hf_models["apertus"].name
    config = config_file.load(folder / "config.toml")
    assert config.megatron["tensor-model-parallel-size"] == 2 and config.megatron["qk-layernorm"]
    words = "--train-iters 1 --lr 1e-3 --micro-batch-size 1 --global-batch-size 1 --mock-data"
    validate(config.with_overrides(words.split(), []), 2)
    loaded = ["--load", str(folder), "--use-distributed-optimizer"]  # it holds no optimizer: none is the wrong one
    validate(config.with_overrides([*words.split(), *loaded], []), 2)
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "release"


def test_a_bf16_import_is_trained_on_and_resumed(runs, tmp_path):
    """By the printed command; its schedule goes on, and alphas are told before their next record is due."""
    source = save_hf(hf_configs()["apertus"], tmp_path / "hf", runs.tokenizer, torch.bfloat16)
    import_checkpoint(source, tmp_path / "in", verify=False)
    data, run = runs.folder / "data", tmp_path / "run"
    words = f"--train-data-path {data}/train_text_document --valid-data-path {data}/validation_text_document "
    words += "--lr 1e-3 --train-iters 4 --micro-batch-size 2 --global-batch-size 2 --num-workers 0 --log-interval 1 "
    words += f"--eval-iters 0 --save {run} --load {run}"
    runs.server.run(str(tmp_path / "in" / "config.toml"), *words.split(), "--exit-interval", "2")
    shutil.rmtree(tmp_path / "in" / "release")  # not needed any more
    (tmp_path / "in" / "latest_checkpointed_iteration.txt").unlink()
    said = runs.server.run(str(run / "config.toml"), *words.split())
    records = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert [r["learning_rate"] for r in records] == pytest.approx([1e-3 * (1 - done / 4) for done in range(4)])
    assert [r["tokens_per_second"] is None for r in records] == [True, False, True, False]
    (line,) = [line for line in said.splitlines() if line.startswith("step 3/4")]
    assert "alpha_p" in line and "tokens/s" not in line


def test_what_a_model_says_of_generating_comes_back(hf_models, tmp_path):
    source = shutil.copytree(hf_models["llama"], tmp_path / "hf")
    config = json.loads((source / "config.json").read_text()) | {"bos_token_id": 3, "eos_token_id": [0, 2]}
    (source / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [0, 2, 7], "pad_token_id": 5, "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(generation))
    import_checkpoint(source, tmp_path / "in", verify=False)
    export(tmp_path / "in", tmp_path / "out", verify=False)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert {name: written[name] for name in names} == {name: config[name] for name in names}


def test_16_bit_weights_stay_and_alphas_become_fp32(runs, tmp_path):
    source = save_hf(hf_configs()["apertus"], tmp_path / "hf", runs.tokenizer, torch.bfloat16)
    done = import_checkpoint(source, tmp_path / "out", verify=False)
    assert done.dtype == "bfloat16" and "bf16 = true" in (tmp_path / "out" / "config.toml").read_text()
    theirs = load_file(source / "model.safetensors")
    for name, tensor in tensors(tmp_path / "out").items():
        is_alpha = "activation_func" in name
        assert tensor.dtype == (torch.float32 if is_alpha else torch.bfloat16), name
        if is_alpha:
            layer, _, alpha = name.removeprefix("decoder.layers.").replace(".mlp.activation_func.", " ").partition(" ")
            assert torch.equal(tensor, theirs[f"model.layers.{layer}.mlp.act_fn.{alpha}"].float())


# Which of xIELU's parameters were trained


def retrained(source: Path, folder: Path, **changed: float) -> Path:
    """A copy of a Hugging Face folder, its second layer's act_fn tensors changed."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    for name, value in changed.items():
        key = f"model.layers.1.mlp.act_fn.{name}"
        weights[key] = torch.full_like(weights[key], value)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_beta_that_differs_between_layers_was_trained(hf_models, tmp_path):
    same = import_checkpoint(hf_models["apertus"], tmp_path / "a", verify=False)
    assert identity(same.architecture.activation)["fixed"] == {"beta": 0.5} and same.notes == ()
    source = retrained(hf_models["apertus"], tmp_path / "hf", beta=0.75)
    done = import_checkpoint(source, tmp_path / "b", verify=False)
    assert identity(done.architecture.activation)["trainable"] == ["alpha_p", "alpha_n", "beta"]
    assert "beta differs" in done.notes[0]
    found = tensors(tmp_path / "b")
    assert [float(found[f"decoder.layers.{i}.mlp.activation_func.beta"]) for i in (0, 1)] == [0.5, 0.75]


def test_what_was_fixed_and_trained_since_is_trained(runs, tmp_path):
    export(runs["apertus tp2"], tmp_path / "hf", verify=False)
    kept = import_checkpoint(tmp_path / "hf", tmp_path / "a", verify=False)
    assert kept.architecture.activation == from_megatron(open_checkpoint(runs["apertus tp2"]).args, 500).activation
    source = retrained(tmp_path / "hf", tmp_path / "hf2", beta=0.625)
    done = import_checkpoint(source, tmp_path / "b", verify=False)
    assert [q.name for q in done.architecture.activation.trainable] == ["alpha_p", "alpha_n", "beta"]
    assert "layers.1.mlp.act_fn.beta = 0.625" in done.notes[0]


def verified(source: Path, out: Path) -> str:
    return import_checkpoint(source, out).verified


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_what_was_once_in_16_bits_is_itself(hf_models, tmp_path, dtype):
    """transformers' own fp32 copy of a 16-bit model, whose clamp is -9.98e-7 or -1.01e-6."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_models["apertus"], dtype=dtype)
    source = shutil.copytree(hf_models["apertus"], tmp_path / "hf")
    model.float().save_pretrained(source)
    assert float(load_file(source / "model.safetensors")["model.layers.0.mlp.act_fn.eps"]) not in (0.0, -1e-6)
    assert "tensors equal; fp32 logits within" in in_process(verified, source, tmp_path / "out")


def test_a_tied_head_may_be_stored_too(hf_models, tmp_path):
    source = shutil.copytree(hf_models["llama"], tmp_path / "hf")
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true .* but lm_head\.weight is not the embedding"):
        import_checkpoint(source, tmp_path / "out")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert "tensors equal; fp32 logits within" in in_process(verified, source, tmp_path / "out")


def test_what_is_rounded_is_said(hf_models, tmp_path):
    source = shutil.copytree(hf_models["llama"], tmp_path / "hf")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    done = import_checkpoint(source, tmp_path / "out", verify=False)
    assert done.dtype == "bfloat16" and done.notes == ("1 tensor(s) of F32 are rounded to the embedding's BF16",)


def test_another_clamp_is_refused(hf_models, tmp_path):
    source = retrained(hf_models["apertus"], tmp_path / "hf", eps=-0.5)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act_fn\.eps = -0\.5"):
        import_checkpoint(source, tmp_path / "out", verify=False)


# Refusals


@pytest.mark.parametrize(
    "change, options, said",
    [
        (lambda w, c: w.pop("model.layers.0.mlp.act_fn.beta"), {}, "lacks model.layers.0.mlp.act_fn.beta"),
        (lambda w, c: w.update(extra=torch.ones(1)), {}, "has unexpected extra"),
        (lambda w, c: c.update(num_key_value_heads=4), {}, "self_attn.k_proj.weight has shape [16, 32]"),
        (lambda w, c: c.pop("hidden_size"), {}, "lacks the key 'hidden_size'"),
        (lambda w, c: c.update(model_type="mamba"), {}, "model_type = 'mamba'"),
        (lambda w, c: c.update(rope_theta=1.0), {}, "contradicts itself"),
        (lambda w, c: w["model.norm.weight"].fill_(float("nan")), {}, "decoder.final_layernorm.weight is not finite"),
        (
            lambda w, c: c.update(num_attention_heads=None),
            {},
            "num_attention_heads = None must be a whole",
        ),
        (lambda w, c: c.update(rms_norm_eps="1e-5"), {}, "rms_norm_eps = '1e-5' must be a number"),
        (lambda w, c: c.update(xact_activation="xielu"), {}, "xact_activation = 'xielu' must be an object"),
        (lambda w, c: c["rope_parameters"].update(partial_rotary_factor=0.5), {}, "partial_rotary_factor = 0.5 has no"),
        (lambda w, c: c.update(quantization_config={"bits": 4}), {}, "quantization_config = {'bits': 4} has no"),
        (lambda w, c: w.update({"model.norm.weight": torch.ones(32).char()}), {}, "model.norm.weight is I8: quantized"),
        (lambda w, c: None, {"tensor_parallel": 3}, "4 (attention heads) cannot be split over 3 ranks"),
        (lambda w, c: None, {"pipeline_parallel": 4}, "2 (layers) cannot be split over 4 ranks"),
    ],
    ids="missing unexpected shape config family rope nan null text object partial quantized int8 tp pp".split(),
)
def test_refused_with_one_line_and_nothing_left(hf_models, tmp_path, change, options, said):
    source = tmp_path / "hf"
    shutil.copytree(hf_models["apertus"], source)
    weights, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    change(weights, config)
    save_file({k: v.contiguous() for k, v in weights.items()}, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        import_checkpoint(source, tmp_path / "out", verify=False, **options)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left")], ids=["Ctrl-C", "full disk"])
def test_interrupted_while_writing(hf_models, tmp_path, monkeypatch, error):
    from megatron_xact.pretraining.data.progress import Progress

    def interrupted(self, size):
        self.done += size
        if self.done > 20_000:
            assert [p.name for p in tmp_path.iterdir()][0].startswith(".out.partial")
            raise error

    monkeypatch.setattr(Progress, "update", interrupted)
    with pytest.raises(type(error)):
        import_checkpoint(hf_models["llama"], tmp_path / "out", verify=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("config.json", b"[]", "config.json holds [], no JSON object"),
        ("config.json", b"\xff", "config.json is not JSON: 'utf-8' codec"),
        ("tokenizer.json", b"{}", "tokenizer.json has no vocabulary"),
        ("tokenizer_config.json", b"", "tokenizer_config.json is not JSON"),
        ("model.safetensors.index.json", b"{}", "index.json has no weight_map of tensors and files"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "b"}}',
            "holds two models: model.safetensors, and",
        ),
    ],
)
def test_a_damaged_file_is_named(hf_models, tmp_path, file, content, said):
    source = shutil.copytree(hf_models["llama"], tmp_path / "hf")
    (source / file).write_bytes(content)
    with pytest.raises(ValueError) as error:
        import_checkpoint(source, tmp_path / "out", verify=False)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_other_folders_are_refused(hf_models, tmp_path):
    with pytest.raises(OSError, match="no such checkpoint"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "hf").mkdir()
    shutil.copyfile(hf_models["apertus"] / "config.json", tmp_path / "hf" / "config.json")
    with pytest.raises(ValueError, match="no safetensors"):
        import_checkpoint(tmp_path / "hf", tmp_path / "out")


# Checkpoints of older forks


@pytest.fixture(scope="module")
def reference(runs) -> tuple[Namespace, dict[str, torch.Tensor]]:
    """Arguments as a fork saved them, and the tensors of a real run: what every layout below is made of."""
    args = open_checkpoint(runs["apertus tp2"]).args
    args = Namespace(**{k: v for k, v in vars(args).items() if k != "xact_activation"}, xielu=True)
    return args, tensors(runs["apertus tp2"])


def bf16(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16() if "activation_func" in name else tensor


@pytest.mark.parametrize("layout", ["[L]", "[L, 1]"])
def test_both_layouts_of_stacked_alphas(reference, runs, tmp_path, layout):
    """Written with torch's own distributed checkpointing, as stacked tensors; alphas in bf16, as forks have them."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    args, weights = reference
    state = {key: t for key, t in weights.items() if not key.startswith("decoder.layers.")}
    for key in {key.split(".", 3)[3] for key in weights.keys() - state.keys()}:
        stack = torch.stack([bf16(key, weights[f"decoder.layers.{i}.{key}"]) for i in range(4)])
        state[f"decoder.layers.{key}"] = stack.flatten() if layout == "[L]" and "alpha" in key else stack
    folder = tmp_path / "iter_0000005"
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save({"args": args, "iteration": 5, "checkpoint_version": 3.0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    done = import_checkpoint(tmp_path, tmp_path / "out")
    assert done.architecture.activation.name == "xielu"
    found = tensors(tmp_path / "out")
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(found[key], bf16(key, tensor).to(tensor.dtype)), key


def legacy(args: Namespace, weights: dict[str, torch.Tensor], folder: Path, drift: float = 0.0) -> Path:
    """Megatron's old format, 2 tensor x 2 pipeline ranks, split by hand: rows, columns, or copies (alphas drifting)."""
    rows = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_fc1.weight")
    columns = ("linear_proj.weight", "linear_fc2.weight")
    for tp in range(2):
        for pp in range(2):
            model = {}
            for name, tensor in weights.items():
                if name.startswith("decoder.layers."):
                    layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
                    if int(layer) // 2 != pp:
                        continue
                    rest = rest.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
                    name = f"decoder.layers.{int(layer) % 2}.{rest}"
                elif (pp == 0) != name.startswith("embedding."):
                    continue
                if name.endswith(rows):
                    tensor = tensor.chunk(2, dim=0)[tp]
                elif name.endswith(columns):
                    tensor = tensor.chunk(2, dim=1)[tp]
                elif "activation_func" in name:
                    tensor = tensor.bfloat16() + tp * drift
                model[name] = tensor.clone()
            path = folder / "iter_0000005" / f"mp_rank_{tp:02d}_{pp:03d}"
            path.mkdir(parents=True)
            torch.save({"args": args, "iteration": 5, "model": model}, path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    return folder


def test_the_old_format(reference, tmp_path):
    args, weights = reference
    old = legacy(args, weights, tmp_path / "old")
    with pytest.raises(ValueError, match="old format .* xact import"):
        export(old, tmp_path / "hf")
    import_checkpoint(old, tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(found[key], bf16(key, tensor).float()), key


def test_virtual_stages_and_gated_weights_of_the_old_format(tmp_path):
    """2 tensor x 2 pipeline ranks of 11 chunks, dealt out in turn; each rank has its rows of the gate and of the up."""
    pieces = torch.randn(22, 2, 2, 3, 5)  # layer, gate or up, tensor-parallel rank, rows of each, columns
    for tp in range(2):
        for pp in range(2):
            path = tmp_path / f"mp_rank_{tp:02d}_{pp:03d}"
            path.mkdir()
            name = "decoder.layers.0.mlp.linear_fc1.weight"
            parts = {f"model{i}": {name: pieces[2 * i + pp, :, tp].reshape(6, 5)} for i in range(11)}
            torch.save({"args": Namespace(num_layers=22), **parts}, path / "model_optim_rng.pt")
    source = open_checkpoint(tmp_path)
    for layer in range(22):
        tensor = MegatronTensor(f"decoder.layers.{layer}.mlp.linear_fc1.weight", (12, 5), "gated")
        assert torch.equal(source.read(tensor), pieces[layer].reshape(12, 5)), layer


@pytest.mark.parametrize("policy, share", [("average", 0.5), ("rank0", 0.0), ("refuse", None)])
def test_ranks_whose_alphas_disagree(reference, tmp_path, policy, share):
    args, weights = reference
    old = legacy(args, weights, tmp_path / "old", drift=0.25)
    if share is None:
        with pytest.raises(ValueError) as error:
            import_checkpoint(old, tmp_path / "out")
        assert "8 activation parameters differ between the 2 tensor-parallel ranks" in str(error.value)
        assert "mlp.activation_func.alpha_" in str(error.value) and "--alpha-disagreement" in str(error.value)
        assert not (tmp_path / "out").exists()
        return
    done = import_checkpoint(old, tmp_path / "out", alpha_disagreement=policy)
    assert "8 activation parameters differ" in done.notes[0]
    found = tensors(tmp_path / "out")
    for key, tensor in weights.items():
        if "activation_func" in key:
            first = tensor.bfloat16()
            copies = torch.stack([first, first + 0.25]).float()
            assert torch.equal(found[key], copies.mean(dim=0) if share else copies[0]), key


FC2, ALPHA = "decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.1.mlp.activation_func.alpha_p"
LAST = "mp_rank_01_001"


def _rank_with(change, rank: str = LAST):
    """What changes the state that a rank has saved: in place, or for what `change` gives."""

    def damage(old: Path) -> None:
        path = old / "iter_0000005" / rank / "model_optim_rng.pt"
        state = torch.load(path, weights_only=False)
        torch.save(change(state) or state, path)

    return damage


def _cut(size: int):
    return lambda old: os.truncate(old / "iter_0000005" / LAST / "model_optim_rng.pt", size)


@pytest.mark.parametrize(
    "damage, said",
    [
        (_rank_with(lambda s: s["model"].update({ALPHA: torch.tensor([math.nan])})), "is not finite on all"),
        (_rank_with(lambda s: s["model"].__delitem__(FC2)), "differ in whether they have, or in"),
        (_rank_with(lambda s: s["model"].update({FC2: torch.ones(3, 3)})), "shape of, decoder.layers.3.mlp.linear_fc2"),
        (_rank_with(lambda s: [1, 2]), f"{LAST}/model_optim_rng.pt holds no model"),
        (_rank_with(lambda s: s.__delitem__("model")), "holds no model"),
        (_rank_with(lambda s: s.update(args=Namespace()), "mp_rank_00_000"), "holds no arguments of Megatron's"),
        (_cut(5000), "pt cannot be read: "),
        (_cut(0), "pt cannot be read: "),
        (lambda old: (old / "iter_0000005" / LAST).rename(old / "iter_0000005/mp_rank_xx"), "is not named as a rank's"),
    ],
    ids="alpha missing shape list nothing arguments truncated empty name".split(),
)
def test_a_damaged_rank_of_the_old_format(reference, tmp_path, damage, said):
    old = legacy(*reference, tmp_path / "old")
    damage(old)
    with pytest.raises(ValueError) as error:
        import_checkpoint(old, tmp_path / "out", verify=False)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_weights_that_disagree_are_refused(reference, tmp_path):
    args, weights = reference
    old = legacy(args, weights, tmp_path / "old")
    path = old / "iter_0000005" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["decoder.final_layernorm.weight"] += 1
    torch.save(state, path)
    with pytest.raises(ValueError, match="different copies of decoder.final_layernorm.weight"):
        import_checkpoint(old, tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match="files of 3 ranks, not of 2 x 2"):
        import_checkpoint(old, tmp_path / "out")


class Unknown:
    """Something that a safe unpickler does not make."""


def test_what_is_not_plain_is_not_unpickled(reference, tmp_path):
    args, weights = reference
    old = legacy(Namespace(**vars(args), mine=Unknown()), weights, tmp_path / "old")
    with pytest.raises(ValueError, match="--trust-pickle"):
        import_checkpoint(old, tmp_path / "out")
    import_checkpoint(old, tmp_path / "out", trust_pickle=True)
    assert (tmp_path / "out" / "config.toml").is_file()


def test_an_activation_can_be_named(reference, tmp_path):
    args, weights = reference
    nameless = Namespace(**{k: v for k, v in vars(args).items() if k != "xielu"})
    old = legacy(nameless, weights, tmp_path / "old")
    with pytest.raises(ValueError, match="--activation"):
        import_checkpoint(old, tmp_path / "out")
    done = import_checkpoint(old, tmp_path / "out", activation="xielu")
    assert done.architecture.activation.name == "xielu"


def test_the_writer_makes_what_a_run_makes(runs, tmp_path):
    """Index against index: the same names, shapes and dtypes; and whole, by the check that precedes every training."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from megatron_xact.pretraining.checkpointing.folder import check_checkpoint

    source = open_checkpoint(runs["arcee"])
    wanted = [t for rule in table(from_megatron(source.args, VOCABULARY)) for t in rule.megatron]
    megatron_io.write(tmp_path / "release", wanted, {t.name: torch.bfloat16 for t in wanted}, source.read, source.args)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert check_checkpoint(tmp_path) == tmp_path / "release"

    def index(folder: Path) -> tuple[dict, set[str]]:
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
        model = {name: entry for name, entry in entries.items() if not name.startswith("optimizer")}
        kept = {n: e for n, e in model.items() if isinstance(e, TensorStorageMetadata)}
        return {n: (tuple(e.size), e.properties.dtype) for n, e in kept.items()}, model.keys() - kept.keys()

    (ours, objects), (theirs, their_objects) = index(tmp_path / "release"), index(source.folder)
    assert ours == theirs
    assert {n for n in their_objects if "_state/" in n and "rerun" not in n and "rng" not in n} <= objects
