"""tools/gpu_suite.py: its own logic, not the kernels: tiny sizes on the CPU, and sections that hang, die or err."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

from megatron_xact.kernels import benchmark, fp8, fp8_product, reference

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tools import gpu_suite  # noqa: E402
from tools.gpu import child, correctness, fp8_mlp, jobs, mlp_speed, processes, speed, step, timing  # noqa: E402
from tools.gpu.context import Context, Entries, over_bound  # noqa: E402
from tools.gpu.jobs import Job  # noqa: E402
from tools.gpu.results import Results  # noqa: E402
from tools.gpu.sections import SECTIONS, Section, named  # noqa: E402

CPU = torch.device("cpu")
MACHINE = {"gpu": None, "commit": "abc", "quick": True, "versions": {"torch": "2"}}
PYTHON = sys.executable


def suite(*words):
    return subprocess.run(
        [sys.executable, ROOT / "tools/gpu_suite.py", *words], capture_output=True, text=True, env=os.environ
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_suite"])
    assert gpu_suite.main() == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("gpu_suite: torch sees no GPU here")


def test_sections_as_processes_on_the_cpu(tmp_path):
    out = tmp_path / "result.json"
    done = suite("--device", "cpu", "--commit", "abc", "--out", out, "--only", "accuracy", "memory", "bandwidth")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    status = {name: section["status"] for name, section in result["sections"].items()}
    assert status == {"accuracy": "ok", "memory": "skipped", "bandwidth": "ok"}
    assert result["machine"]["versions"]["torch"] and result["machine"]["commit"] == "abc"
    assert re.search(r"^ +met +error over its bound: .* \(at most 1\)$", done.stdout, re.MULTILINE)
    measured = result["sections"]["bandwidth"]["data"]["measurements"]
    assert {(m["contender"], m["direction"]) for m in measured} == {
        *((contender, direction) for contender in ("operator", "kernel") for direction in ("forward", "backward")),
        ("copy", "forward"),
    }
    one = next(m for m in measured if (m["activation"], m["direction"], m["columns"]) == ("xielu", "backward", 768))
    assert one["ideal_bytes"] == 64 * 768 * 6 and len(one["seconds"]) == 30


@pytest.mark.parametrize("name", ["sums", "huge", "determinism", "fp8-mlp", "tiles", "fp8-speed"])
def test_sections_on_the_cpu(name, tmp_path):
    data, status, _ = of(SECTIONS[name].run, tmp_path)
    assert status == "ok" and (data.targets or data["seconds"])


def test_every_cast_to_fp8_is_checked_of_gated_activations_too(tmp_path):
    data, status, _ = of(SECTIONS["fp8"].run, tmp_path, Context(CPU, quick=True, part=0, parts=22))
    casts = {(way, str(dtype)) for way in ("blockwise", "any blockwise", "tensor") for dtype in fp8.DTYPES}
    assert status == "ok" and data["steps"].keys() == {
        f"{name} {way} {dtype}" for name in ("xielu", "swiglu") for way, dtype in casts
    }


def test_every_way_of_an_mlp_is_checked_and_timed(tmp_path):
    data, status, _ = of(SECTIONS["mlp"].run, tmp_path)
    results = {label.split(") ")[1] for label in data["worst_over_bound"] if label.startswith("relu2")}
    assert status == "ok" and set(data["absent"]) == {"triton", "quack"} and results >= {
        "forward unfused pre", "forward unfused y", "forward unfused twice", "backward unfused dpre",
        "bias backward unfused bias", "MLP unfused dw2",
    }  # fmt: skip
    data, status, _ = of(SECTIONS["mlp-speed"].run, tmp_path)
    assert status == "ok" and set(data["mlp"][0]["seconds"]) == {"GEMMs alone", "unfused"}
    assert set(data["kernels"][0]["seconds"]) == {"GEMM alone", "activation alone", "unfused"}


def test_the_fastest_of_what_is_fused_is_judged(tmp_path):
    data = Entries(tmp_path / "entries.json")
    seconds = {"GEMM alone": [1.0, 2.0, 1.0], "unfused": [0.5], "triton a": [1.2], "quack b": [1.1]}
    mlp_speed._judge(data, "forward", seconds, "GEMM alone", 1.06)
    assert data.targets == {"forward, quack b": {"value": 1.1, "met": False, "at most": 1.06}}
    mlp_speed._judge(data, "backward", {"GEMM alone": [1.0], "unfused": [0.5]}, "GEMM alone", 1.06)
    assert not data.targets["backward, nothing fused ran"]["met"]


# --- sections as processes --------------------------------------------------------------------------------------------

PROGRAM = """
import json, os, signal, subprocess, sys, time

def write(status, **data):
    target = {{"t": {{"value": 1.0, "met": status != "missed", "at most": 2.0}}}}
    open(sys.argv[1], "w").write(json.dumps({{"status": status, "said": "said", "targets": target, "data": data}}))

start = time.time()
write("running", start=start)
{body}
write("{status}", start=start, end=time.time())
"""


def job(name, body="", status="ok", **options):
    program = PROGRAM.format(body=body, status=status)
    return Job(name, [sys.executable, "-c", program], **({"limit": 60.0} | options))


@pytest.fixture
def sigterm():
    known = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, known)


def test_sections_that_hang_or_die_keep_what_they_had_found_and_the_others_go_on(tmp_path, capsys, sigterm):
    at = "write('running', start=start, at='a kernel'); "
    hang = at + "subprocess.Popen(['sleep', '98.7'], start_new_session=True); time.sleep(99)"
    asked = [job("hangs", hang, limit=2.0), job("dies", "os.kill(os.getpid(), signal.SIGKILL)"), job("works")]
    assert gpu_suite.run(asked, Results(tmp_path / "out.json", MACHINE), again=False, gib=1.0) == 1
    written = json.loads((tmp_path / "out.json").read_text())["sections"]
    status = {name: section["status"] for name, section in written.items()}
    assert status == {"hangs": "timed out", "dies": "died", "works": "ok"}
    assert all(section["data"]["start"] > 0 and section["targets"]["t"]["met"] for section in written.values())
    assert not any(p.info["cmdline"] == ["sleep", "98.7"] for p in psutil.process_iter(["cmdline"]))
    table = capsys.readouterr().out.splitlines()[-6:]
    assert table[0].startswith("hangs ") and table[0].endswith(
        "took longer than 2 s; --limit gives it more; it was at a kernel"
    )
    assert table[2].endswith("its process ended with -9 (a signal)")
    assert table[5].split() == ["met", "t:", "1", "(at", "most", "2)"]


def test_what_is_timed_runs_alone_after_the_others_which_share_cores_and_memory(capsys):
    rest = "time.sleep(0.7)"
    asked = [job("timed", rest, alone=True), job("large", rest, gib=6.0), job("next", rest, gib=5.0),
             job("long", rest, gib=3.0, expected=9.0)]  # fmt: skip
    found = {}
    jobs.run(asked, cores=4, gib=10.0, tell=lambda name, section: found.update({name: section["data"]}))
    long, large, later, timed = (found[name] for name in ("long", "large", "next", "timed"))
    assert capsys.readouterr().out.startswith("--- long\n--- large\n")  # the longest first; 9 of 10 GiB
    assert long["start"] < large["end"] and large["start"] < long["end"]
    assert later["start"] > min(long["end"], large["end"])
    assert timed["start"] > max(long["end"], large["end"], later["end"])


def test_what_a_command_that_was_ended_has_found_is_kept_and_the_next_goes_on(tmp_path, capsys, sigterm):
    out = tmp_path / "out.json"
    terminate = "time.sleep(1.5); os.kill(os.getppid(), signal.SIGTERM); time.sleep(99)"  # as `timeout` does
    asked = [job("missed", status="missed"), job("stops", terminate), job("waits", alone=True)]
    assert gpu_suite.run(asked, Results(out, MACHINE), again=False, gib=1.0) == 130
    table = capsys.readouterr().out.splitlines()[-5:]
    assert table[0].startswith("missed ") and table[1].split()[:2] == ["MISSED", "t:"]
    assert table[2].startswith("stops               interrupted") and table[4].split() == ["waits", "not", "run"]
    known = json.loads(out.read_text())["sections"]
    asked = [job("missed", "1 / 0"), job("stops"), job("waits")]
    assert gpu_suite.run(asked, Results(out, MACHINE), again=False, gib=1.0) == 1  # the target that was missed
    now = json.loads(out.read_text())["sections"]
    assert now["missed"] == known["missed"] and now["stops"]["status"] == now["waits"]["status"] == "ok"
    assert gpu_suite.run(asked[:1], Results(out, MACHINE), again=True, gib=1.0) == 1
    assert json.loads(out.read_text())["sections"]["missed"]["status"] == "died"


def test_a_file_of_another_commit_is_not_gone_on_with(tmp_path):
    Results(tmp_path / "out.json", MACHINE).put("a", {"status": "ok"})
    assert Results(tmp_path / "out.json", MACHINE).has("a")
    with pytest.raises(ValueError, match="is of commit abc, this would be of def: choose another --out"):
        Results(tmp_path / "out.json", MACHINE | {"commit": "def"})


def test_what_was_skipped_runs_where_more_is_installed_which_is_recorded(tmp_path):
    first = Results(tmp_path / "out.json", MACHINE)
    first.put("a", {"status": "ok"})
    first.put("b", {"status": "skipped"})
    more = {"torch": "2", "megatron-core": "0.19.2"}
    second = Results(tmp_path / "out.json", MACHINE | {"versions": more})
    assert second.has("a") and not second.has("b")
    second.put("b", {"status": "ok"})
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"] == MACHINE and written["sections"] == {
        "a": {"status": "ok"}, "b": {"status": "ok", "versions": more}
    }  # fmt: skip


def test_numbers_that_json_has_not_are_told_all_the_same(tmp_path):
    def finds(context, data):
        data["errors"] = {"a": [math.inf, -math.inf, 1.0]}
        data.target("a", math.nan, at_most=1.0)
        return "found"

    path = tmp_path / "entries.json"
    child.run(Section("correctness", finds, 1.0), Context(CPU, quick=True), path)
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found["data"]["errors"] == {"a": ["inf", "-inf", 1.0]} and found["targets"]["a"]["value"] == "nan"
    results = Results(None, MACHINE)
    results.put("finds", found | {"seconds": 1.0})
    assert results.table(["finds"]).splitlines()[1].split() == ["MISSED", "a:", "nan", "(at", "most", "1)"]


def test_without_git_nobody_knows_what_was_committed(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    for given in (None, "abc"):
        found = gpu_suite.machine("cpu", given)
        assert (found["commit"], found["uncommitted"]) == (given, None)


def test_groups_and_sections_are_named_and_every_part_of_a_section_is_a_process():
    assert named(["training", "sums"]) == ["sums", "quickstart", "fp8-gate", "plan", "step"]
    assert named([]) == list(SECTIONS)
    made = gpu_suite.jobs_of(["fp8", "step"], "cuda", False, None)
    assert [j.name for j in made] == [f"fp8 {i}/8" for i in range(1, 9)] + ["step"]
    assert [j.alone for j in made] == [False] * 8 + [True]
    parts = [Context(CPU, False, part, 3).mine(range(10)) for part in range(3)]
    assert sorted(x for part in parts for x in part) == list(range(10))


def test_packages_on_the_pythonpath_stay_on_it(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    path = processes.environment()["PYTHONPATH"].split(os.pathsep)
    assert path[0] == str(ROOT) and path[-1] == "/somewhere"


# --- what a section says ----------------------------------------------------------------------------------------------


def of(run, tmp_path, context=None):
    """(entries, status, said) of a section in this process."""
    path = tmp_path / "entries.json"
    data = child.run(Section("correctness", run, 1.0), context or Context(CPU, quick=True), path)
    written = json.loads(path.read_text())
    return data, written["status"], written["said"]


def test_a_missed_target_and_a_broken_section_are_told(tmp_path):
    def misses(context, data):
        data.target("a", 3.0, at_most=2.0)
        data.target("b", 3.0, at_least=2.0)
        return "measured all"

    data, status, said = of(misses, tmp_path)
    assert (status, said) == ("missed", "measured all")
    assert [target["met"] for target in data.targets.values()] == [False, True]
    assert of(lambda context, data: "fine", tmp_path)[1:] == ("ok", "fine")
    assert of(lambda context, data: 1 / 0, tmp_path)[1:] == ("FAILED", "ZeroDivisionError: division by zero")


def test_nan_and_nothing_miss_every_target(tmp_path):
    data = Entries(tmp_path / "entries.json")
    data.target("above", math.nan, at_least=0.0)
    data.target("below", math.nan, at_most=1.0)
    data.all_at_most("one of them", 1.0, {"small": 0.5, "nan": math.nan, "large": 0.9})
    data.all_at_most("none", 1.0, {})
    data.all_at_most("good", 1.0, {"small": 0.5, "large": 0.9})
    assert {what: target["met"] for what, target in data.targets.items()} == {
        "above": False, "below": False, "one of them: 1 of 3 too large, nan": False,
        "none: 1 of 1 too large, nothing was compared": False, "good: large": True,
    }  # fmt: skip
    assert over_bound(torch.tensor([1.0, math.nan]), torch.ones(2, dtype=torch.float64)) == math.inf


def test_targets_missed_before_a_section_cannot_go_on_are_not_forgotten(tmp_path):
    def skips(context, data):
        data.target("a", 3.0, at_most=2.0)
        context.needs("no_such_module")

    assert of(skips, tmp_path)[1:] == ("missed", "no_such_module is not installed")


LOG = "[rank0]:[W1124 03:00:00.0 ProcessGroupNCCL.cpp:1] Warning: destroy_process_group() was not called"


@pytest.mark.parametrize(
    "body, limit, how",
    [
        (f"print('loading'); print('xact: error: no', file=sys.stderr); print('{LOG}'); sys.exit(3)", 60.0,
         "xact pretrain ended with 3: xact: error: no"),
        ("print('stuck here', flush=True); subprocess.Popen(['sleep', '98.6']); time.sleep(99)", 2.0,
         "xact pretrain took longer than 2 s"),
    ],
    ids=["fails", "hangs"],
)  # fmt: skip
def test_what_a_command_printed_is_kept_when_it_does_not_end_well(body, limit, how, tmp_path, monkeypatch):
    program = f"import subprocess, sys, time\n{body}"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {PYTHON} -c "$PROGRAM"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PROGRAM", program)
    data, status, said = of(lambda context, data: processes.xact("pretrain", limit=limit), tmp_path)
    assert (status, said) == ("FAILED", how)
    assert data["output"].startswith(body[len("print('") :].partition("'")[0])
    assert not any(p.info["cmdline"] == ["sleep", "98.6"] for p in psutil.process_iter(["cmdline"]))


class PlantsNaN(Context):
    """Its kernels are right but for one NaN, in dx or in a parameter's gradient."""

    @property
    def backend(self):
        return self

    def forward(self, *args):
        return reference.forward(*args)

    def backward(self, *args, **options):
        back = reference.backward(*args, **options)
        for gradient in (back.dx, *back.parameters.values()):
            gradient.view(-1)[:1] = math.nan
        return back


@pytest.mark.parametrize("section", [correctness.accuracy, correctness.sums])
def test_a_planted_nan_is_not_correct(section, tmp_path):
    data, status, _ = of(section, tmp_path, PlantsNaN(CPU, True, part=0, parts=25))
    assert status == "missed" and not any(target["met"] for target in data.targets.values())


class WrongWithoutBias(PlantsNaN):
    """Its kernels are right with a bias; without one, which are kernels of their own, `wrong` is 1 % too large."""

    wrong = ""

    def forward(self, record, x, p, *fused):
        y = reference.forward(record, x, p, *fused)
        return 1.01 * y if self.wrong == "y" and not fused else y

    def backward(self, record, x, p, dy, *fused, **options):
        back = reference.backward(record, x, p, dy, *fused, **options)
        if self.wrong == "dx" and not fused:
            return back._replace(dx=1.01 * back.dx)
        if self.wrong == "alpha" and not fused:
            return back._replace(parameters={symbol: 1.01 * value for symbol, value in back.parameters.items()})
        return back


@pytest.mark.parametrize("wrong, missed", [("y", 2), ("dx", 2), ("alpha", 1), ("", 0)])
def test_kernels_without_bias_are_compared_too(wrong, missed, tmp_path, monkeypatch):
    monkeypatch.setattr(WrongWithoutBias, "wrong", wrong)
    data, status, _ = of(correctness.accuracy, tmp_path, WrongWithoutBias(CPU, True, part=0, parts=25))
    assert status == ("missed" if missed else "ok")
    assert sum(not target["met"] for target in data.targets.values()) == missed


def test_a_planted_nan_in_an_fp8_product_is_not_correct(tmp_path, monkeypatch):
    def product(*args):
        return torch.full_like(right(*args), math.nan)

    right = fp8_product.product
    monkeypatch.setattr(fp8_product, "product", product)
    data, status, _ = of(fp8_mlp.correctness, tmp_path)
    met = {what.partition(":")[0]: target["met"] for what, target in data.targets.items()}
    assert status == "missed" and not met["error of a product"] and met["casts whose bits are not torch's"]


def test_a_peer_that_breaks_leaves_the_others_their_numbers(tmp_path, monkeypatch):
    def contenders(activation):
        return {"xact": benchmark.ours(activation), "eager": benchmark.published_formula(activation), "broken": broken}

    def broken(x, raw):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(benchmark, "contenders", contenders)
    data, status, _ = of(speed.peers, tmp_path)
    assert status == "ok"
    assert {(m["activation"], m["contender"]) for m in data["measurements"]} == {
        (name, contender) for name in ("xielu", "relu2", "swiglu") for contender in ("xact", "eager")
    }
    assert data["absent"]["broken xielu"] == "RuntimeError: no kernel image"
    assert "xielu bfloat16 eager" in data["speedups"]


def test_contenders_take_turns_and_one_that_cannot_run_is_left_out(tmp_path):
    calls, data = [], Entries(tmp_path / "entries.json")
    contenders = {"a": lambda: calls.append("a"), "broken": lambda: 1 / 0, "b": lambda: calls.append("b")}
    found = timing.in_turns(Context(CPU, quick=True), contenders, 5, data)
    assert {label: len(times) for label, times in found.items()} == {"a": 5, "b": 5}
    assert calls[-4:] == ["a", "b", "a", "b"] and data == {"absent": {"broken": "ZeroDivisionError: division by zero"}}


def test_operands_and_results_rotate():
    used = []
    rotation = timing.Rotation([lambda i=i: used.append(i) or torch.empty(1) for i in range(3)])
    addresses = set()
    for _ in range(6):
        rotation()
        addresses |= {result.data_ptr() for result in rotation.results if result is not None}
    assert used == [0, 1, 2, 0, 1, 2] and len(addresses) >= 3


# --- a training step --------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_a_step_of_the_papers_model_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "RUNS", {name: step.RUNS[name] for name in ("relu2", "xielu", "xielu, fused")})
    data, status, said = of(step.step, tmp_path)
    assert status == "missed" and list(data["failed"]) == ["xielu, fused"]  # Triton's kernels need a GPU
    assert "xact pretrain ended with 2: xact: error: " in data["failed"]["xielu, fused"]["how"]
    assert "triton" in data["failed"]["xielu, fused"]["output"]
    relu2, xielu = (data["runs"][name] for name in ("relu2", "xielu"))
    assert len(xielu["every_step"]) == step.STEPS - step.WARMUP and min(xielu["every_step"]) > 0
    assert any("xielu in every MLP" in line for line in xielu["ways"])
    ratio = relu2["tokens_per_second"] / xielu["tokens_per_second"]
    assert len(xielu["losses"]) == step.STEPS and 5 < xielu["losses"][0] < 8
    assert data["ratios"] == {"xielu / relu2": pytest.approx(ratio)} and said == f"time xielu / relu2 {ratio:.3f}"


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_the_steps_that_are_compared_differ_by_the_activation_alone(tmp_path):
    from megatron_xact.pretraining import config

    runs = {}
    for name, (file, mlp) in step.RUNS.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(step.config_of(Context(CPU, quick=False), file, mlp))
        runs[name] = config.load(path)
    relu2, swiglu, *others = (run.megatron for run in runs.values())
    assert all(one == relu2 for one in others) and swiglu | {"ffn-hidden-size": 9216} == relu2
    assert (relu2["ffn-hidden-size"], swiglu["ffn-hidden-size"]) == (9216, 6144)
    assert (relu2["micro-batch-size"], relu2["global-batch-size"], relu2["num-layers"]) == (5, 10, 24)
    assert relu2["bf16"] and "save" not in relu2
    assert [(r.activation.name, r.mlp) for r in runs.values()] == [
        ("relu2", "unfused"), ("swiglu", "unfused"), ("xielu", "unfused"), ("xielu", "triton"), ("xielu", "auto"),
        ("relu2", "unfused"),
    ]  # fmt: skip


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_beside_transformer_engine_the_mlps_that_are_fused_are_of_its_operations(tmp_path, monkeypatch):
    """Of its modules, `layers.fused_mlp` refuses them."""
    from megatron_xact.pretraining import config

    monkeypatch.setattr(step, "present", lambda module: True)
    fuser = {}
    for name, (file, mlp) in step.RUNS.items():
        (tmp_path / "run.toml").write_text(step.config_of(Context(CPU, quick=False), file, mlp))
        fuser[name] = config.load(tmp_path / "run.toml").megatron.get("use-transformer-engine-op-fuser", False)
    assert fuser == dict.fromkeys(step.RUNS, False) | {"xielu, fused": True, "xielu, auto": True}
