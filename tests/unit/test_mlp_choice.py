"""Which way an MLP runs: what is remembered, when it is measured anew, what is refused; and what is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_xact import activations, installed
from megatron_xact.bench import mlp as bench
from megatron_xact.kernels import backends, linear, mlp_choice, mlp_timing, source
from megatron_xact.kernels.mlp_choice import choose
from megatron_xact.kernels.mlp_timing import Shape
from megatron_xact.layers import fused_mlp
from megatron_xact.pretraining import checks
from megatron_xact.pretraining.config import load

CPU = torch.device("cpu")
SHAPE = Shape(tokens=64, hidden=32, ffn=96, dtype=torch.bfloat16)
XIELU = activations.get("xielu")


class Gauge:
    """Stands for the GPU: timings that are given, and how often somebody asked. Of tiles, the last is the fastest."""

    def __init__(self, **seconds: float):
        self.seconds, self.failed, self.asked = seconds, {}, 0

    def __call__(self, activation, shape, device, candidates):
        self.asked += 1
        assert set(candidates) <= {*self.seconds, *self.failed}
        seconds = {name: value for name, value in self.seconds.items() if name in ("unfused", *candidates)}
        tiles = {
            backend: {
                direction: {name: 0.5 - i / 100 for i, name in enumerate(tiles_of(backend, direction))}
                for direction in ("forward", "backward")
            }
            for backend in seconds
            if backend != "unfused"
        }
        for what in self.failed.keys() - {*candidates}:
            backend, direction, tile = what.split(" ", 2)
            assert tile in tiles[backend][direction]
            tiles[backend][direction][tile] = None
        return mlp_timing.Measured(seconds, tiles, self.failed)


def tiles_of(backend: str, direction: str, shape=SHAPE) -> list[str]:
    return mlp_timing.tiles_of(backend, direction, XIELU, shape, CPU)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, and a process that has chosen nothing yet."""
    monkeypatch.setenv("XACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mlp_choice, "_made", {})
    monkeypatch.setattr(mlp_choice, "_selected", "auto")
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def new_process() -> None:
    mlp_choice._made.clear()


def asked_again(gauge: Gauge, candidates=("triton", "quack"), shape=SHAPE, activation=XIELU, **options) -> bool:
    """Is it measured, in a process that has not chosen yet?"""
    new_process()
    before = gauge.asked
    choose(activation, shape, CPU, candidates, measure=gauge, **options)
    return gauge.asked > before


def test_the_fastest_is_chosen_and_told():
    choice = choose(XIELU, SHAPE, CPU, ["triton", "quack"], measure=Gauge(unfused=6.8e-3, triton=6.9e-3, quack=6.4e-3))
    assert choice.way.backend == "quack"
    assert "quack 6.400 ms, unfused 6.800 ms, triton 6.900 ms" in choice.reason
    new_process()
    choice = choose(XIELU, SHAPE, CPU, ["triton"], measure=Gauge(unfused=6.8e-3, triton=6.9e-3))
    assert choice.way == ("unfused", None, None)


def test_the_fastest_tiles_are_chosen_and_told():
    gauge = Gauge(unfused=2.0, triton=3.0, quack=1.0)
    forward, backward = tiles_of("quack", "forward"), tiles_of("quack", "backward")
    assert len(forward) > 2 and len(backward) > 2
    for _ in range(2):  # measured, and read in another process
        choice = choose(XIELU, SHAPE, CPU, ["triton", "quack"], measure=gauge)
        assert choice.way == ("quack", forward[-1], backward[-1])
        assert f"tiles {forward[-1]} forward, {backward[-1]} backward" in choice.reason
        assert list(choice.tiles["triton"]["forward"]) == tiles_of("triton", "forward")
        new_process()
    assert gauge.asked == 1


def test_ranks_that_measure_at_the_same_time_take_what_the_first_has_written():
    first = Gauge(unfused=2.0, triton=1.0)

    def second(*shape):
        new_process()
        choose(XIELU, SHAPE, CPU, ["triton"], measure=first)
        return Gauge(unfused=1.0, triton=2.0)(*shape)

    choice = choose(XIELU, SHAPE, CPU, ["triton"], measure=second)
    assert choice.way.backend == "triton" and "by others meanwhile" in choice.reason
    assert choose(XIELU, SHAPE, CPU, ["triton"], measure=second, refresh=True).way.backend == "unfused"


def test_a_tile_that_does_not_work_is_left_out_and_named(cache):
    gauge = Gauge(unfused=2.0, quack=1.0)
    *_, second, last = tiles_of("quack", "backward")
    gauge.failed = {f"quack backward {last}": "failed: too much shared memory"}
    choice = choose(XIELU, SHAPE, CPU, ["quack"], measure=gauge)
    assert choice.way.backward == second and choice.tiles["quack"]["backward"][last] is None
    assert f"quack backward {last}: failed: too much shared memory" in choice.reason
    new_process()
    assert choose(XIELU, SHAPE, CPU, ["quack"], measure=gauge).way == choice.way and gauge.asked == 1  # remembered


def test_it_is_measured_once(cache):
    gauge = Gauge(unfused=2.0, triton=1.0, quack=3.0)
    assert asked_again(gauge)
    [file] = files(cache)
    stored = json.loads(file.read_text())
    assert stored["seconds"] == gauge.seconds
    assert list(stored["tiles"]["quack"]["forward"]) == tiles_of("quack", "forward")
    assert stored["key"]["tokens"] == 64 and stored["key"]["dtype"] == "bfloat16" and stored["key"]["gated"] is False
    assert not asked_again(gauge)  # another process
    choose(XIELU, SHAPE, CPU, ["triton", "quack"], measure=gauge)
    assert gauge.asked == 1  # the same process
    assert asked_again(gauge, refresh=True)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": Shape(65, 32, 96, torch.bfloat16)},
        {"shape": Shape(64, 16, 96, torch.bfloat16)},
        {"shape": Shape(64, 32, 48, torch.bfloat16)},
        {"shape": Shape(64, 32, 96, torch.float16)},
        {"shape": Shape(64, 32, 96, torch.bfloat16, bias=True)},
        {"activation": activations.get("xiprelu")},
        {"activation": activations.get("xielu", trainable=[])},
        {"candidates": ["triton"]},
    ],
    ids=["tokens", "hidden", "ffn", "dtype", "bias", "activation", "trainable", "candidates"],
)
def test_anything_else_is_measured_for_itself(change):
    gauge = Gauge(unfused=2.0, triton=1.0, quack=3.0)
    assert asked_again(gauge) and not asked_again(gauge)
    assert asked_again(gauge, **change)


def test_another_version_or_gpu_is_measured_anew(monkeypatch):
    gauge = Gauge(unfused=2.0, triton=1.0, quack=3.0)
    assert asked_again(gauge)
    monkeypatch.setattr(source, "digest", lambda: "of edited ones")
    assert asked_again(gauge)
    monkeypatch.setattr(torch, "__version__", "0.0.0+other")
    assert asked_again(gauge)
    version = installed.version
    for other in ("triton", "quack-kernels"):
        monkeypatch.setattr(installed, "version", lambda name, other=other: "0" if name == other else version(name))
        assert asked_again(gauge)
    files = set()
    for gpu in ("NVIDIA A100-SXM4-80GB", "NVIDIA H200"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, gpu=gpu: gpu)
        files.add(mlp_choice.path_of(mlp_choice._key(XIELU, SHAPE, torch.device("cuda"))))
    assert len(files) == 2


def test_an_edited_kernel_is_another_key(tmp_path, monkeypatch):
    copy = shutil.copytree(Path(source.__file__).parent, tmp_path / "kernels")
    monkeypatch.setattr(source, "__file__", str(copy / "source.py"))
    before = source.digest.__wrapped__()
    with open(copy / "triton_gemm_hopper.py", "a") as kernel:
        kernel.write("# edited\n")
    assert source.digest() == before != source.digest.__wrapped__()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"triton": 1.0', '"triton": NaN'),
        lambda text: text.replace('"triton": 1.0', '"triton": -1.0'),
        lambda text: text.replace('"triton": 1.0', '"triton": "fast"'),
        lambda text: text.replace('"seconds"', '"second"'),
        lambda text: text.replace('"tokens": 64', '"tokens": 32'),  # another key's, copied or renamed
        lambda text: text.replace('"tiles"', '"tile"'),  # as before they were measured
        lambda text: text.replace("128x160", "128x168"),  # no longer one
        lambda text: text.replace(": 0.49", ": -0.49"),
        lambda text: text.replace(": 0.5", ": null").replace(": 0.49", ": null"),  # all of triton's
        lambda text: text.replace('"quack": {', '"quick": {'),
    ],
    ids=[
        "empty",
        "cut",
        "list",
        "nan",
        "negative",
        "word",
        "no seconds",
        "other key",
        "no tiles",
        "other tile",
        "negative tile",
        "no tile works",
        "tiles of another",
    ],
)
def test_a_spoilt_file_is_measured_anew_and_written_whole(cache, spoil):
    gauge = Gauge(unfused=2.0, triton=1.0, quack=3.0)
    assert asked_again(gauge)
    [file] = files(cache)
    whole = file.read_text()
    assert spoil(whole) != whole
    file.write_text(spoil(whole))
    assert asked_again(gauge)
    assert file.read_text() == whole and files(cache) == [file]


def test_what_cannot_be_written_is_said_and_still_chosen(cache, monkeypatch):
    cache.write_text("a file where the folder should be")
    choice = choose(XIELU, SHAPE, CPU, ["triton"], measure=Gauge(unfused=2.0, triton=1.0))
    assert choice.way.backend == "triton" and "not remembered" in choice.reason
    new_process()
    monkeypatch.delenv("XACT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "xdg"))
    choose(XIELU, SHAPE, CPU, ["triton"], measure=Gauge(unfused=2.0, triton=1.0))
    assert [path.parent.relative_to(cache.parent).as_posix() for path in (cache.parent / "xdg").rglob("*.json")] == [
        "xdg/megatron-xact/mlp"
    ]


def test_trouble_while_measuring_leaves_the_mlp_unfused(cache):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    choice = choose(XIELU, SHAPE, CPU, ["triton"], measure=out_of_memory)
    assert choice.way.backend == "unfused" and "CUDA out of memory." in choice.reason
    new_process()
    gauge = Gauge(unfused=2.0, quack=1.0)
    gauge.failed = {"triton": "failed: no such instruction"}
    choice = choose(XIELU, SHAPE, CPU, ["triton", "quack"], measure=gauge)
    assert choice.way.backend == "quack" and "triton: failed: no such instruction" in choice.reason
    assert not files(cache)  # neither is remembered


def test_on_a_cpu_nothing_is_measured():
    gauge = Gauge(unfused=2.0, triton=1.0)
    reasons = mlp_choice.unavailable_reasons(XIELU, torch.bfloat16, CPU)
    assert reasons.keys() == set(linear.BACKENDS) and "needs a GPU" in reasons["triton"]
    assert choose(XIELU, SHAPE, CPU, [], measure=gauge).way.backend == "unfused" and gauge.asked == 0


def config(**changes) -> TransformerConfig:
    settings = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "transformer_impl": "local"}
    return TransformerConfig(**settings | changes)


def test_a_named_backend_that_cannot_run_is_refused_before_training():
    with pytest.raises(ValueError, match=r"mlp = 'quack' in \[xact\] cannot run here: it needs a GPU; use 'auto'"):
        fused_mlp.select("quack", XIELU, config())
    with pytest.raises(ValueError, match="cannot run here: cpu-offloading = True"):
        fused_mlp.select("triton", XIELU, config(cpu_offloading=True, cpu_offloading_num_layers=0))
    for key in ("fp8", "fp4", "tp_comm_overlap", "enable_autocast", "use_kitchen"):
        transformer = config()
        setattr(transformer, key, True)
        with pytest.raises(ValueError, match=f"{key.replace('_', '-')} = True needs Megatron's own way"):
            fused_mlp.select("triton", XIELU, transformer)
    with pytest.raises(ValueError, match="mlp = 'cutlass' is not one of auto, unfused, triton, quack"):
        fused_mlp.select("cutlass", XIELU, config())
    for name in ("unfused", "auto"):
        fused_mlp.select(name, XIELU, config(cpu_offloading=True, cpu_offloading_num_layers=0))
        assert mlp_choice.selected() == name


def test_a_named_backend_that_is_not_installed_is_refused_before_ranks_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"mlp = 'quack' in \[xact\] needs the package quack, which is not installed"):
        checks._mlp("quack")
    for name in ("auto", "unfused"):
        checks._mlp(name)


def test_it_is_a_key_of_the_config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[activation]\nname = "xielu"\n[xact]\nmlp = "unfused"\n')
    assert load(path).xact.mlp == "unfused" and 'mlp = "unfused"' in load(path).dump()
    assert load(path).with_overrides([], ["xact.mlp=triton"]).xact.mlp == "triton"
    with pytest.raises(ValueError, match="mlp = 'cutlass' .*expected 'auto' or 'unfused' or 'triton' or 'quack'"):
        load(path).with_overrides([], ["xact.mlp=cutlass"])


def test_reference_kernels_rule_fused_ones_out(monkeypatch):
    monkeypatch.setattr(backends, "_choice", "reference")
    reasons = mlp_choice.unavailable_reasons(XIELU, torch.bfloat16, torch.device("cuda"))
    assert all("kernels = 'reference'" in reason for reason in reasons.values()) and len(reasons) == 2


def test_the_tiles_are_shown():
    tiles = {"triton": {"forward": {"a": 2e-3, "b": None, "c": 1e-3}, "backward": {"d": 3e-3}}}
    seconds = {"unfused": 2e-2, "triton": 1e-2}
    row = bench.Row("xielu", 64, 32, 96, 1, "bfloat16", False, 1, seconds, "triton", "", tiles)
    told = bench.table([row])
    assert "  triton forward: c 1.000 ms, a 2.000 ms, b left out\n  triton backward: d 3.000 ms\n" in told


# --- what is measured -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["xielu", "xsilu_glu2", "relu2"])
def test_every_way_computes_the_same(name, bias):
    """Against plain autograd through the record's formula, in fp64."""
    record = activations.get(name)
    o = mlp_timing.operands(record, Shape(16, 8, 12, torch.float64, bias), CPU)
    pre = o.x_MH @ o.w1_WH.T + (o.bias_W if bias else 0.0)
    gate, up = pre.chunk(2, -1) if record.gated else (pre, 1.0)
    out = (record.value(gate, o.p) * up) @ o.w2_HF.T
    inputs = [o.x_MH, o.w1_WH, o.w2_HF, *([o.bias_W] if bias else []), *o.learned]
    truth = [out, *torch.autograd.grad(out, inputs, o.dout_MH)]
    for found in (mlp_timing.unfused(o), mlp_timing.fused(linear.Way("unfused"), o)):
        assert [t.shape for t in found] == [t.shape for t in truth]
        assert mlp_timing.disagreement(found, truth) < 1e-6
    wrong = [*truth[:-1], truth[-1] * 1.01]
    assert mlp_timing.disagreement(wrong, truth) == pytest.approx(0.01, rel=1e-3)
    assert not mlp_timing.disagreement([*truth[:-1], truth[-1] * torch.nan], truth) <= 1.0


@pytest.fixture
def planted(monkeypatch):
    """Kernels that are torch's, and a list of (backend, direction, tile or None for each) that compute wrongly."""
    wrong, forward, backward = [], linear.forward, linear.backward

    def factor(backend, direction, tile):
        if (backend, direction, "crash") in wrong:
            raise RuntimeError("no such  instruction")
        if (backend, direction, "nan") in wrong:
            return torch.nan
        return 1.2 if {(backend, direction, tile), (backend, direction, None)} & {*wrong} else 1.0

    def ahead(backend, *args, tile=None):
        found = forward("unfused", *args)
        return found._replace(y_MF=found.y_MF * factor(backend, "forward", tile))

    def back(backend, *args, tile=None):
        found = backward("unfused", *args)
        return found._replace(dpre_MW=found.dpre_MW * factor(backend, "backward", tile))

    monkeypatch.setattr(linear, "forward", ahead)
    monkeypatch.setattr(linear, "backward", back)
    return wrong


def test_a_tile_that_computes_something_else_is_not_used(planted):
    """The last line of defence: a kernel is compared with the unfused results before it may be chosen."""
    first, *others = tiles_of("quack", "forward")
    planted += [("quack", "forward", tile) for tile in others] + [("triton", "backward", None)]
    measured = mlp_timing.measure(XIELU, SHAPE, CPU, ["triton", "quack"], repeats=1)
    assert measured.seconds.keys() == {"unfused", "quack"} and all(value > 0 for value in measured.seconds.values())
    times = measured.tiles["quack"]
    assert [tile for tile, value in times["forward"].items() if value] == [first] and set(times["forward"]) > {first}
    assert all(times["backward"].values()) and len(times["backward"]) == 3
    way = mlp_timing.fastest("quack", times)
    assert way.forward == first and times["backward"][way.backward] == min(times["backward"].values())
    assert measured.failed.keys() == {"triton", *(f"quack forward {tile}" for tile in others)}
    assert all("differ from the unfused ones by 2.0e-01" in why for why in measured.failed.values())


def test_a_backend_that_does_not_compile_or_gives_nan_is_not_used(planted):
    planted += [("quack", "backward", "crash"), ("triton", "forward", "nan")]
    measured = mlp_timing.measure(XIELU, SHAPE, CPU, ["quack", "triton"], repeats=1)
    assert measured.seconds.keys() == {"unfused"} and not measured.tiles
    tiles = [f"{backend} {direction} {tiles_of(backend, direction)[0]}"
             for backend, direction, _ in planted]  # fmt: skip
    assert measured.failed == {
        "quack": f"none of its tiles works, {tiles[0]}: failed: no such instruction",
        "triton": f"none of its tiles works, {tiles[1]}: its results differ from the unfused ones by nan",
    }
