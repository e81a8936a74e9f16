"""Small plans without Megatron, and a stand-in for `xact pretrain` that only keeps its promises about files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_xact.pretraining.planning.counts import Shape
from megatron_xact.studies.ladder import build
from megatron_xact.studies.outside import Model
from megatron_xact.studies.planning import Plan
from megatron_xact.studies.recipe import Recipe, Size
from megatron_xact.whole import write_text

SIZES = {"a": Size(2, 32, 2, 96), "b": Size(3, 64, 4, 192)}
GATED = ("swiglu",)


def model_of(activation: str, size: Size, micro_batch: int = 4) -> Model:
    shape = Shape(
        layers=size.layers, hidden=size.hidden, ffn=size.ffn, heads=size.heads, vocab=512, sequence=64,
        gated=activation in GATED, activation_parameters=2 if activation == "xielu" else 0,
    )  # fmt: skip
    return Model(activation, shape, micro_batch, 1)


def recipe(**changes) -> Recipe:
    values = {"activations": ("swiglu", "xielu"), "sizes": SIZES, "tokens_per_parameter": (5, 10, 20), "seeds": (1, 2)}
    return Recipe(**values | {"learning_rate": 3e-3, "batch": 8 * 64, "validation_tokens": 1e4} | changes)


def plan(folder: Path | None = None, **changes) -> Plan:
    """folder: where it is written, as far as `run` reads it."""
    made = Plan("test", tuple(build(recipe(**changes), model_of)))
    if folder is not None:
        write_text(folder / "study.json", made.dump())
        for trunk in made.trunks:
            write_text(folder / "configs" / f"{trunk.name}.toml", f"steps = {trunk.budgets[-1].steps}\n")
    return made


def finish(folder: Path, step: int, loss: float | None = 3.0, **more) -> None:
    write_text(folder / "report.json", json.dumps({"step": step, "validation_loss": loss} | more))


# Trains nothing: reads the words of `xact pretrain`, notes the start, and does what `behaviour` says of the run.
STAND_IN = """
import json, signal, sys, time, tomllib
from pathlib import Path

words = sys.argv[1:]
value = lambda flag: words[words.index(flag) + 1]
save, trunk, study = Path(value("--save")), Path(value("--load")), Path(sys.argv[0]).parent
save.mkdir(parents=True, exist_ok=True)
with open(study / "started", "a") as log:
    log.write(str(save.relative_to(study)) + "\\n")
steps = tomllib.loads(Path(words[0]).read_text())["steps"]
if "--branch-from" in words:
    assert (trunk / "report.json").exists(), "its trunk is not finished"
    steps = int(value("--branch-from")) + int(value("--cooldown-steps"))
behaviour = study / "behaviour"
todo = json.loads(behaviour.read_text()).get(save.name, []) if behaviour.exists() else []
count = (study / "started").read_text().split().count(str(save.relative_to(study)))
todo = todo[count - 1] if count <= len(todo) else 0
if todo == "wait":
    def stop(*_):
        (save / "saved").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (save / "waiting").touch()
    time.sleep(60)
if todo:
    if todo == 76:
        failure = {"kind": "nan", "reason": "a planned NaN", "decision": "stopped"}
        (save / "failures.jsonl").write_text(json.dumps(failure) + "\\n")
    print("xact: error: that was planned", file=sys.stderr)
    sys.exit(todo)
(save / "progress.jsonl").write_text(json.dumps({"step": steps, "loss": 3.0}) + "\\n")
(save / "report.json").write_text(json.dumps({"step": steps, "validation_loss": 3.0}))
"""


def stand_in(study: Path, behaviour: dict[str, list]) -> list[str]:
    """The command; behaviour: folder's name -> of each start an exit code, or "wait" (for a signal). Then it works."""
    (study / "stand_in.py").write_text(STAND_IN)
    (study / "behaviour").write_text(json.dumps(behaviour))
    return [sys.executable, str(study / "stand_in.py")]


def started(study: Path) -> list[str]:
    return (study / "started").read_text().split() if (study / "started").exists() else []
