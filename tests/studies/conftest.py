"""A stand-in for SLURM's commands, where what is tested is what they are asked and what is made of their answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SBATCH = """#!/bin/bash
printf '%s\\n' "$*" >>"{0}/submitted"
echo "$((40 + $(wc -l <"{0}/submitted")));cluster"
"""
SQUEUE = """#!/bin/bash
case " $* " in *" --clusters=cluster "*) ;; *) exit 3 ;; esac
touch "{0}/there"
wanted=$(sed -n 's/.*--jobs=\\([0-9,]*\\).*/\\1/p' <<<"$*")
awk -v wanted=",$wanted," 'index(wanted, "," $1 ",")' "{0}/there"
"""


class Jobs:
    """sbatch notes its words and gives job numbers 41, 42, ...; squeue tells of jobs what `there` says."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "squeue"):
            self.work(name)

    def submitted(self) -> list[str]:
        return (self.folder / "submitted").read_text().splitlines()

    def there(self, *lines: str) -> None:
        """lines: JOB TASK STATE REASON"""
        (self.folder / "there").write_text("".join(f"{line}\n" for line in lines))

    def work(self, name: str) -> None:
        self._write(name, {"sbatch": SBATCH, "squeue": SQUEUE}[name].format(self.folder))

    def fail(self, name: str, said: str) -> None:
        self._write(name, f"#!/bin/bash\necho '{said}' >&2\nexit 1\n")

    def _write(self, name: str, script: str) -> None:
        (self.folder / name).write_text(script)
        (self.folder / name).chmod(0o755)


@pytest.fixture
def jobs(tmp_path, monkeypatch) -> Jobs:
    found = Jobs(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{found.folder}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    return found
