"""`xact study plan`: the folder of a study, from its recipe. What is written is only what decides the runs:

DIR/study.json         the recipe's outcome: every trunk, its budgets, and the config file that trains it
DIR/configs/NAME.toml  a run's config, e.g. 1M-xielu-s1.toml; `xact pretrain` takes it
DIR/runs/, DIR/logs/   what `xact study run` makes
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_xact.pretraining.planning.counts import Shape, flops_per_token
from megatron_xact.studies.ladder import PARAMS_COUNT, Budget, Trunk, build, cells, params
from megatron_xact.studies.outside import Model, Outside
from megatron_xact.studies.recipe import Size, Study
from megatron_xact.studies.table import format_count
from megatron_xact.whole import write_text

FILE = "study.json"
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    name: str
    trunks: tuple[Trunk, ...]

    def dump(self) -> str:
        told = {"format": FORMAT, "name": self.name, "params_count": PARAMS_COUNT}
        return json.dumps(told | {"trunks": [asdict(t) for t in self.trunks]}, indent=1) + "\n"


def make(study: Study, outside: Outside) -> Plan:
    """ValueError, one line: what of the recipe or of the config it inherits cannot be trained."""

    def model_of(activation: str, size: Size) -> Model:
        # Of the schedule nothing is known yet, but the config must be whole for the trainer to read it.
        micro = _find(study, "micro-batch-size")
        provisional = {"train-iters": 4, "lr-warmup-iters": 1, "lr-wsd-decay-iters": 1, "lr-decay-style": "WSD"}
        batch = {} if micro is None else {"global-batch-size": micro}
        tables = {"schedule": provisional | batch, "optimizer": {"lr": 1e-3}, "model": _sizes(size, size.ffn)}
        # The activation first, since it decides the other keys of its table.
        named = (f"{study.source} [study]: activations", {"activation": {"name": activation}})
        return outside.model(study.base, [named, (study.source, study.tables), ("the plan", tables)])

    trunks = tuple(build(study.recipe, model_of))
    plan = Plan(study.source.stem, trunks)
    # The largest config once for good: whatever the trainer refuses is told before anything is written.
    outside.model(study.base, [(study.source, config_of(study, trunks[-1], Path("runs")))])
    return plan


def _find(study: Study, key: str) -> object:
    return next((entries[key] for entries in study.tables.values() if key in entries), None)


def _sizes(size: Size | Shape, ffn: int) -> dict[str, object]:
    return {
        "num-layers": size.layers, "hidden-size": size.hidden, "ffn-hidden-size": ffn,
        "num-attention-heads": size.heads,
    }  # fmt: skip


def config_of(study: Study, trunk: Trunk, folder: Path) -> dict[str, dict]:
    """The tables of a trunk's config; folder: the study's."""
    last = trunk.budgets[-1]
    save = (folder / "runs" / trunk.name).as_posix()
    decided = {
        "model": _sizes(trunk.shape, trunk.shape.ffn),
        "optimizer": {"lr": trunk.lr},
        "schedule": {
            "global-batch-size": trunk.sequences,
            "train-iters": last.steps,
            "lr-decay-style": "WSD",
            "lr-warmup-iters": trunk.warmup,
            "lr-wsd-decay-iters": last.cooldown,
            # Once, at the end, on the first batches: the same text for every budget.
            "eval-interval": last.steps + 1,
            "eval-iters": trunk.evaluations,
        },
        "checkpoint": {"save": save, "load": save, "save-interval": trunk.interval},
        "activation": {"name": trunk.activation},
        "runtime": {"seed": trunk.seed},
        "xact": {"keep-checkpoints": 1, "keep-every": trunk.interval if len(trunk.budgets) > 1 else 0},
    }
    return {name: study.tables.get(name, {}) | decided.get(name, {}) for name in study.tables | decided}


def files(study: Study, plan: Plan, folder: Path) -> dict[Path, str]:
    """Everything that the plan is, as text."""
    configs = folder / "configs"
    base = Path(os.path.relpath(study.base, configs)).as_posix()
    made = {}
    for trunk in plan.trunks:
        parts = [f"# {trunk.name} of the study {plan.name}, by `xact study plan`.\nbase = {_toml(base)}\n"]
        for table, entries in config_of(study, trunk, folder).items():
            parts.append("\n".join([f"[{table}]", *(f"{k} = {_toml(v)}" for k, v in entries.items())]) + "\n")
        made[configs / f"{trunk.name}.toml"] = "\n".join(parts)
    return made | {folder / FILE: plan.dump()}  # last: a folder that has it is whole


def write(texts: dict[Path, str], folder: Path) -> bool:
    """Whether anything was written: the same plan stays as it is. ValueError: another one is there."""
    if (folder / FILE).exists():
        different = [p for p, text in texts.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
        extra = [p for p in sorted((folder / "configs").glob("*.toml")) if p not in texts]
        if not different and not extra:
            return False
        raise ValueError(
            f"{folder} holds another plan: {(different + extra)[0].relative_to(folder)} differs. Choose another --out, "
            "or delete that folder with all its runs"
        )
    if (folder / "runs").exists() or (folder / "configs").exists():
        raise ValueError(f"{folder} holds no study but has runs or configs in it; choose another --out")
    for path, text in texts.items():
        write_text(path, text)
    return True


def load(folder: Path) -> Plan:
    """The plan of a study's folder. ValueError, OSError: there is none, or it is damaged."""
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of a study: no {FILE}. Make it: xact study plan STUDY.toml --out "
                         f"{folder}")  # fmt: skip
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"{path} was written by another version: plan the study again, in another folder")
        trunks = []
        for t in content["trunks"]:
            parts = {"shape": Shape(**t["shape"]), "budgets": tuple(Budget(**b) for b in t["budgets"])}
            trunks.append(Trunk(**t | parts))
        return Plan(content["name"], tuple(trunks))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)


# -- told -------------------------------------------------------------------------------------------------------------

KEY = (
    "N           parameters of layers and output head; all: with an untied input embedding; no embed.: layers alone",
    "no head     FLOPs without the logits; none counts looking up embeddings",
    "leaves at   step of the trunk at which this budget's cooldown begins; batch in tokens, lr at its peak",
)


def text(plan: Plan) -> str:
    """A line per activation and size, then one per budget of each size, then what they come to."""
    one = [t for t in plan.trunks if t.seed == plan.trunks[0].seed and t.factor == plan.trunks[0].factor]
    first = {t.size: t for t in reversed(one)}
    every = cells(plan.trunks)
    flops = sum(c.steps * c.trunk.batch * flops_per_token(c.trunk.shape) for c in every)
    seeds, factors = ({getattr(t, k) for t in plan.trunks} for k in ("seed", "factor"))
    swept = f" x {len(factors)} rates ({', '.join(f'{f:g}x' for f in sorted(factors))})" if len(factors) > 1 else ""
    return "\n".join([
        *_columns(_model_rows(one, first)),
        "",
        *_columns(_budget_rows(list(reversed(first.values())))),
        *(f"lr of {t.activation} {t.size}: {t.lr / t.factor:.3g}" for t in one if t.lr != first[t.size].lr),
        "",
        f"{len(every)} cells: {len(one)} of activation and size x {len(seeds)} seeds{swept} x budgets; "
        f"{len(plan.trunks)} trunks, {len(every) - len(plan.trunks)} cooldowns, {flops:.3g} FLOPs",
        "",
        *KEY,
    ])  # fmt: skip


def _model_rows(trunks: Sequence[Trunk], first: dict[str, Trunk]) -> list[list[str]]:
    """first: of each size, whose parameters the others are to match."""
    rows = [["size", "activation", "layers", "hidden", "ffn", "N", "all", "no embed.", "match", "GFLOP/token",
             "no head"]]  # fmt: skip
    for t in trunks:
        plain = params(first[t.size].shape)
        rows.append([
            t.size, t.activation, str(t.shape.layers), str(t.shape.hidden), str(t.shape.ffn), f"{t.params:,}",
            f"{_total(t.shape):,}", f"{t.params - _embedding(t.shape):,}", f"{t.params / plain - 1:+.2%}",
            f"{flops_per_token(t.shape) / 1e9:.4g}", f"{flops_per_token(t.shape, head=False) / 1e9:.4g}",
        ])  # fmt: skip
    return rows


def _budget_rows(trunks: Sequence[Trunk]) -> list[list[str]]:
    rows = [["size", "tokens", "per N", "steps", "leaves at", "warm-up", "batch", "lr", "FLOPs", "no head"]]
    for t in trunks:
        for b in t.budgets:
            tokens = b.steps * t.batch
            rows.append([
                t.size, format_count(tokens), f"{tokens / t.params:.3g}", f"{b.steps:,}",
                "trunk" if b is t.budgets[-1] else f"{b.leaves:,}", str(t.warmup), format_count(t.batch),
                f"{t.lr / t.factor:.3g}", f"{tokens * flops_per_token(t.shape):.3g}",
                f"{tokens * flops_per_token(t.shape, head=False):.3g}",
            ])  # fmt: skip
    return rows


def _total(shape: Shape) -> int:
    return params(shape) + (0 if shape.tied else _embedding(shape))


def _embedding(shape: Shape) -> int:
    return shape.vocab * shape.hidden


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in
                      enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]  # fmt: skip
