"""`xact bench`: runs here, writes what it says, and its ratios are those of its own raw timings."""

import json
import statistics

import pytest

from megatron_xact import cli


@pytest.mark.compiler
def test_bench_kernels(tmp_path, capsys):
    words = "bench kernels --activations relu2 --rows 8 --columns 256 --dtypes float32 --repeats 3 --out"
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert {(m["contender"], m["direction"]) for m in result["measurements"]} == {
        (contender, direction)
        for contender in ("eager", "torch.compile", "xact")
        for direction in ("forward", "backward")
    }
    seconds = {}
    for m in result["measurements"]:
        assert m["ideal_bytes"] == 8 * 256 * 4 * (2 if m["direction"] == "forward" else 3)
        seconds[m["contender"]] = seconds.get(m["contender"], 0.0) + statistics.median(m["seconds"])
    ratios = {s["peer"]: s["ratio"] for s in result["speedups"]}
    assert ratios["eager"] == pytest.approx(seconds["eager"] / seconds["xact"])
    assert "relu2 float32:" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["kernels", "mlp"])
def test_without_a_compiler_there_is_nothing_to_compare_with(part, tmp_path, capsys, monkeypatch):
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, "no-such-compiler")
    assert cli.main(["bench", part, "--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "compiler (no-such-compiler)" in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("part", ["kernels", "mlp"])
def test_help_tells_defaults_as_words(part, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", part, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "default: xielu relu2" in told and "(default: runs/bench)" in told and "['" not in told and "([" not in told


@pytest.mark.compiler
def test_wrong_names_are_refused_before_anything_is_measured(tmp_path, capsys):
    assert cli.main(["bench", "kernels", "--activations", "xielo", "--out", str(tmp_path / "none")]) == 2
    assert "did you mean xielu" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.compiler
def test_bench_mlp(tmp_path, capsys, monkeypatch):
    """Without a GPU: unfused and the peers, one line of the table each; and why nothing else can be chosen."""
    monkeypatch.setenv("XACT_CACHE", str(tmp_path / "cache"))
    words = "bench mlp --activations xielu swiglu --tokens 8 --hidden 16 --tp 2 --bias --repeats 1 --refresh --out"
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "mlp.png").read_bytes().startswith(b"\x89PNG")
    shapes = json.loads((tmp_path / "mlp.json").read_text())["shapes"]
    assert [(s["activation"], s["ffn"], s["tp"]) for s in shapes] == [("xielu", 48, 2), ("swiglu", 32, 2)]
    for s in shapes:
        assert s["seconds"].keys() == {"GEMMs alone", "eager", "torch.compile", "unfused"}
        assert s["chosen"] == "unfused" and "it needs a GPU" in s["reason"] and s["bias"] and s["dtype"] == "float32"
        rows = s["ffn"] * (2 if s["activation"] == "swiglu" else 1)
        assert s["flops"] == 3 * 2 * 8 * 16 * (rows + s["ffn"])  # forward, and twice that backward
        for contender, seconds in s["seconds"].items():
            assert f"{contender:16}{seconds * 1e3:10.3f}" in said
    assert said.count(" *unfused") == 2
    assert not (tmp_path / "cache").exists()  # there was nothing to choose


@pytest.mark.compiler
def test_impossible_sizes_of_an_mlp_are_refused(tmp_path, capsys):
    for words, told in {
        "--tp 5 --hidden 16": "--tp 5 must divide the ffn width, 96",
        "--activations swigloo": "did you mean swiglu",
    }.items():
        assert cli.main(["bench", "mlp", *words.split(), "--out", str(tmp_path / "none")]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
