"""`xact bench kernels`: runs here, writes what it says, and its ratios are those of its own raw timings."""

import json
import statistics

import pytest

from megatron_xact import cli


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


def test_wrong_names_are_refused_before_anything_is_measured(tmp_path, capsys):
    assert cli.main(["bench", "kernels", "--activations", "xielo", "--out", str(tmp_path / "none")]) == 2
    assert "did you mean xielu" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
