"""The finished cells of a study's folder as rows of the table of runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tomllib
from pathlib import Path

import numpy as np

from megatron_xact.studies import planning, state
from megatron_xact.studies.ladder import PARAMS_COUNT, Cell, cells
from megatron_xact.studies.progress import listed
from megatron_xact.studies.table import Run, Table


def table_of(folders: list[Path], table_folder: Path) -> tuple[Table, list[str]]:
    """The checked table of studies that belong together, and what is to be told of it."""
    rows, told = [], []
    for folder in folders:
        found, lines = collect(folder, table_folder)
        rows += found
        told += lines
    return Table(rows, " and ".join(map(str, folders))), told


def collect(folder: Path, table_folder: Path) -> tuple[list[Run], list[str]]:
    """Rows, and what is to be told of them. table_folder: where the table will lie; run folders are named from there.

    ValueError: no cell is finished, or one has no loss.
    """
    plan = planning.load(folder)
    every = cells(plan.trunks)
    done = [c for c in every if state.is_finished(c, folder)]
    if not done:
        raise ValueError(f"no cell of {folder} is finished: xact study run {folder}")
    told = [f"{folder}: {len(done)} of {len(every)} cells are finished"]
    if missing := [c.name for c in every if c not in done]:
        told.append(f"missing: {listed(missing)}")
    # One run at a time has its own speed; runs beside each other (--jobs) have each other's.
    speeds = state.measured_speeds(folder)
    rows = {(c.trunk.name, c.budget.steps): _row(c, folder, table_folder, speeds) for c in done}
    kept, chosen = _best_rates(done, rows)
    source = "as xact study plan --measure found them" if speeds else "of the runs themselves"
    return [rows[c.trunk.name, c.budget.steps] for c in kept], [*told, *chosen, f"step times: {source}"]


def _row(cell: Cell, folder: Path, table_folder: Path, speeds: dict[tuple[str, str], float]) -> Run:
    trunk, run = cell.trunk, folder / cell.folder
    found = state.report_of(run)
    loss = found.get("validation_loss")
    # The trunk's where there is one: it is measured over more steps than a cooldown has.
    trained = Cell(trunk, trunk.budgets[-1])
    timed = state.report_of(folder / trained.folder) if state.is_finished(trained, folder) else found
    speed = speeds.get((trunk.size, trunk.activation)) or timed.get("tokens_per_second")
    if not isinstance(loss, (int, float)) or not math.isfinite(loss):
        raise ValueError(f"{cell.name} has no validation loss ({run / state.REPORT}): does the config name validation "
                         "data?")  # fmt: skip
    tokenizer, data = _tokenizer_and_data(run / "config.toml")
    return Run(
        activation=trunk.activation, size=trunk.size, params=float(trunk.params), tokens=float(cell.tokens),
        seed=trunk.seed, loss=loss, params_count=PARAMS_COUNT, flops=float(cell.flops),
        step_time_s=trunk.batch / speed if speed else None, tokenizer=tokenizer, data=data, batch=float(trunk.batch),
        lr=trunk.lr, schedule="wsd", trunk=trunk.name, alphas=_alphas(found.get("alphas", {})),
        run=Path(os.path.relpath(run, table_folder)).as_posix(),
    )  # fmt: skip


def _alphas(by_layer: dict[str, dict[str, float]]) -> str:
    """{"1": {"alpha_p": ..}, ..} -> {"alpha_p": [layer 1, ..]} as JSON; empty: the activation learns nothing."""
    layers = [by_layer[layer] for layer in sorted(by_layer, key=int)]
    names = dict.fromkeys(name for values in layers for name in values)
    return json.dumps({name: [values.get(name) for values in layers] for name in names}) if names else ""


def _tokenizer_and_data(config: Path) -> tuple[str, str]:
    """Of a run: by their contents where they can be had, else by name."""
    table = tomllib.loads(config.read_text(encoding="utf-8")).get("data", {})
    prefixes = [str(p) for p in table.get("train-data-path") or table.get("data-path") or []]
    manifests = [m for p in prefixes if (m := Path(p).parent / "data.json").is_file()]
    if len(manifests) == 1 and len(prefixes) == 1:  # made by `xact data prepare`
        made = json.loads(manifests[0].read_text(encoding="utf-8"))
        parts = json.dumps([made["settings"], made["train"], made["validation"]], sort_keys=True)
        return made["tokenizer_sha256"][:12], f"{made['source']} {_digest(parts.encode())}"
    tokenizer = str(table.get("tokenizer-model") or table.get("tokenizer-type", ""))
    file = Path(tokenizer) / "tokenizer.json"
    if file.is_file():
        tokenizer = _digest(file.read_bytes())
    validation = [str(p) for p in table.get("valid-data-path", [])]
    return tokenizer, " ".join(prefixes + validation) or ("mock-data" if table.get("mock-data") else "")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


# -- swept rates ------------------------------------------------------------------------------------------------------


def _best_rates(done: list[Cell], rows: dict[tuple[str, int], Run]) -> tuple[list[Cell], list[str]]:
    """The cells at the best swept rate of their activation and size, and what was chosen."""
    if len(factors := sorted({c.trunk.factor for c in done})) < 2:
        return done, []
    kept, told = [], []
    for key in dict.fromkeys((c.trunk.activation, c.trunk.size) for c in done):
        those = [c for c in done if (c.trunk.activation, c.trunk.size) == key]
        last = [c for c in those if not c.is_branch]
        tried = sorted({c.trunk.factor for c in last})
        if not tried:
            raise ValueError(f"{key[0]} {key[1]}: no trunk of the sweep is finished, so no rate can be chosen")
        means = [np.mean([rows[c.trunk.name, c.budget.steps].loss for c in last if c.trunk.factor == f]) for f in tried]
        best = best_factor(tried, [float(m) for m in means])
        kept += [c for c in those if c.trunk.factor == best]
        edge = "; at the edge of the sweep: widen it" if best in (factors[0], factors[-1]) else ""
        told.append(f"rate         {key[0]} {key[1]}: {best:g}x of {', '.join(f'{f:g}x' for f in tried)}{edge}")
    return kept, told


def best_factor(factors: list[float], losses: list[float]) -> float:
    """The one nearest to the minimum of a parabola in ln rate: the least of noisy losses is biased by luck."""
    if len(factors) >= 3:
        x = np.log(factors)
        bend, slope, _ = np.polyfit(x, losses, 2)
        if bend > 0:
            return factors[int(np.argmin(np.abs(x + slope / (2 * bend))))]
    return factors[int(np.argmin(losses))]
