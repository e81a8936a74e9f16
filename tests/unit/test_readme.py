"""The README against what it speaks of."""

import json
import re
from pathlib import Path

from megatron_xact import activations

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_activation_table_is_that_of_the_records():
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| `([^`]+)` \|", README, flags=re.MULTILINE))
    assert rows == {name: activations.get(name).formula for name in activations.names()}


def test_speed_and_perplexity_are_those_of_committed_results():
    bench = json.loads((ROOT / "tools/results/pretrain_cpu.json").read_text())
    quickstart = json.loads((ROOT / "tools/results/quickstart_cpu.json").read_text())
    for figure in (
        f"{bench['ratio']:.2f}",
        f"{bench['xact']['tokens_per_second']:,.0f}",
        f"{bench['transformers']['tokens_per_second']:,.0f}",
        f"{quickstart['validation_perplexity']:.1f}",
        f"{quickstart['unigram_perplexity']:.1f}",
    ):
        assert figure in README, f"README does not have {figure}"


def test_ratios_of_the_kernels_are_those_of_the_committed_result():
    kernels = json.loads((ROOT / "tools/results/kernels_cpu.json").read_text())
    ratios = {(s["activation"], s["dtype"], s["peer"]): f"{s['ratio']:.2f}" for s in kernels["speedups"]}
    columns = [(dtype, peer) for peer in ("eager", "torch.compile") for dtype in ("float32", "bfloat16")]
    for title, name in (("xIELU", "xielu"), ("xIPReLU", "xiprelu"), ("ReLU^2", "relu2"), ("SwiGLU", "swiglu")):
        row = " | ".join(ratios[name, *column] for column in columns)
        assert f"| {title} | {row} |" in README


def test_the_studys_table_is_that_of_the_committed_report():
    report = json.loads((ROOT / "tools/results/study_tiny/results.json").read_text())
    found = {c["other"]: c for c in report["comparisons"]}
    for title, name in (("ReLU^2", "relu2"), ("xIELU", "xielu"), ("xIPReLU", "xiprelu")):
        c, m = found[name], found[name]["multiplier"]
        cells = [f"{m['value']:.2f} [{m['low']:.2f}, {m['high']:.2f}]"]
        cells += [f"{c['by_size'][size]['value']:.2f}" for size in ("0.3M", "0.5M", "1.2M")]
        row = " | ".join([title, *cells, f"{c['step_time']['value']:.2f}"])
        assert f"| {row} |" in README
        assert c["trends"]["size"]["p"] < 0.03


def test_the_gates_table_is_that_of_the_committed_results():
    for title, folder in (("e4m3, the default", "fp8_gate_cpu"), ("e5m2", "fp8_gate_cpu_e5m2")):
        gate = json.loads((ROOT / "tools/results" / folder / "gate.json").read_text())
        value, low, high = (f"{gate['gap'][key]:+.4f}" for key in ("value", "low", "high"))
        verdict = ("PASS" if gate["passed"] else "FAIL") + ("" if gate["settled"] else ", not settled")
        assert f"| {title} | {value} [{low}, {high}] | {gate['validation_gap']:+.4f} | {verdict} |" in README


def test_its_files_and_commands_exist():
    for path in re.findall(r"`?((?:launch|tests|tools|configs)/[\w./-]+\.(?:sh|py|toml|json|png))", README):
        assert (ROOT / path).exists(), path
