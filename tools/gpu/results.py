"""The suite's JSON file: written whole or not at all, gone on with by a later command, and told as a table."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron_xact.whole import write_text

COMPLETE = ("ok", "missed")  # not measured again; what was skipped may run where more is installed
GOOD = ("ok", "skipped")
SAME = ("gpu", "commit", "quick")  # what sections of one file have in common


def write(path: Path, content: dict) -> None:
    write_text(path, json.dumps(_in_json(content), indent=1, allow_nan=False) + "\n")


def _in_json(value: object) -> object:
    """JSON has no infinity and no NaN: they are the strings "inf", "-inf" and "nan", which `float` reads."""
    if isinstance(value, dict):
        return {key: _in_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Results:
    """path: None keeps them in memory only. ValueError: the file is of another commit, GPU or size."""

    def __init__(self, path: Path | None, machine: dict):
        self.path = path
        self.content = {"machine": machine, "sections": {}}
        self.versions = machine["versions"]
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            for key in SAME:
                if self.content["machine"][key] != machine[key]:
                    raise ValueError(
                        f"{path} is of {key} {self.content['machine'][key]}, this would be of {machine[key]}: choose "
                        "another --out, or delete it"
                    )

    @property
    def sections(self) -> dict[str, dict]:
        return self.content["sections"]

    def has(self, name: str) -> bool:
        return self.sections.get(name, {}).get("status") in COMPLETE

    def put(self, name: str, section: dict) -> None:
        if self.versions != self.content["machine"]["versions"]:  # those of the command that made the file
            section = section | {"versions": self.versions}
        self.sections[name] = section
        if self.path:
            write(self.path, self.content)

    def are_good(self, names: list[str]) -> bool:
        return all(self.sections.get(name, {}).get("status") in GOOD for name in names)

    def table(self, names: list[str]) -> str:
        lines = []
        for name in names:
            if name not in self.sections:
                lines.append(f"{name:20}not run")
                continue
            section = self.sections[name]
            lines.append(f"{name:20}{section['status']:12}{section['seconds']:7.1f} s  {section['said']}")
            lines += [f"{'':20}  {_told(what, target)}" for what, target in section.get("targets", {}).items()]
        return "\n".join(lines)


def _told(what: str, target: dict) -> str:
    bounds = ", ".join(f"{rule} {target[rule]:.4g}" for rule in ("at most", "at least") if rule in target)
    return f"{'met' if target['met'] else 'MISSED':8}{what}: {float(target['value']):.4g} ({bounds})"
