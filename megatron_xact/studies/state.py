"""How far a cell is, from what its run has written; and the command that trains it."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_xact.studies.ladder import Cell

REPORT = "report.json"
SPEEDS = "speeds.json"  # of `xact study plan --measure`: {size: {activation: tokens per second}}


def report_of(folder: Path) -> dict:
    """The run's result; {}: it has not ended."""
    try:
        content = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def measured_speeds(study: Path) -> dict[tuple[str, str], float]:
    """Tokens per second of (size, activation), as `xact study plan --measure` found them; {}: it has not.

    ValueError: the file is damaged.
    """
    path = study / SPEEDS
    if not path.is_file():
        return {}
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
        return {(size, name): float(speed) for size, speeds in sizes.items() for name, speed in speeds.items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: delete it, or measure again (xact study plan --measure)") from None


def is_finished(cell: Cell, study: Path) -> bool:
    """Written at a run's end, also of one that was asked to end early: so the step counts too."""
    return report_of(study / cell.folder).get("step") == cell.budget.steps


def step_of(cell: Cell, study: Path) -> int:
    """The last step that the run has told of; a branch counts from its trunk's beginning."""
    try:
        with open(study / cell.folder / "progress.jsonl", "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().splitlines()
    except OSError:
        lines = []
    for line in reversed(lines):
        try:
            return min(int(json.loads(line)["step"]), cell.budget.steps)
        except (ValueError, KeyError, TypeError):
            continue
    return cell.budget.leaves if cell.is_branch else 0


def done(cell: Cell, study: Path) -> int:
    """Of `cell.steps`, how many are trained."""
    return step_of(cell, study) - (cell.budget.leaves if cell.is_branch else 0)


def words(cell: Cell, study: Path) -> list[str]:
    """Behind `xact pretrain`."""
    save = str(study / "runs" / cell.trunk.name)
    given = [str(study / "configs" / f"{cell.trunk.name}.toml"), "--quiet", "--load", save]
    if cell.is_branch:
        folder = str(study / cell.folder)
        return [*given, "--save", folder, "--branch-from", str(cell.budget.leaves),
                "--cooldown-steps", str(cell.budget.cooldown)]  # fmt: skip
    return [*given, "--save", save]
