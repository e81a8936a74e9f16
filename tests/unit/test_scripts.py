"""What the launch scripts do by themselves: quickstart.sh with stand-ins for what it calls, functions of the others."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_xact.pretraining.exits import TAKEN
from megatron_xact.pretraining.taking import taking

ROOT = Path(__file__).parents[2]

# What `xact` leaves behind, of what quickstart.sh asks it for.
XACT = r"""#!/usr/bin/env bash
words="$*"; echo "${words//$'\n'/ }" >> "$0.log"
while [ $# -gt 0 ]; do
    case $1 in
        data) kind=data ;;
        --out) out=$2 ;;
        --save) mkdir -p "$2"; echo "$kind" > "$2/config.toml"; mkdir -p "$2/iter_0000001" ;;
        export) mkdir -p "$3"; exit ;;
        --print-args) exit ;;
    esac
    shift
done
if [ "$kind" = data ]; then mkdir -p "$out"; touch "$out/data.json"; fi
"""


@pytest.fixture
def quickstart(tmp_path):
    """The script in a repository of its own: (run it with these words, what it has called `xact` for)."""
    for folder in ("launch", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "quickstart.sh", tmp_path / "launch")
    (tmp_path / "launch" / "env.sh").touch()
    xact = tmp_path / ".venv" / "bin" / "xact"
    xact.write_text(XACT)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} "$@"\n')
    for program in (xact, python):
        program.chmod(0o755)

    def run(*words: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log = Path(f"{xact}.log")
        log.unlink(missing_ok=True)
        script = str(tmp_path / "launch" / "quickstart.sh")
        done = subprocess.run(["bash", script, *words], cwd="/", capture_output=True, text=True)
        return done, log.read_text().splitlines() if log.exists() else []

    return run


def test_fresh_starts_over_and_deletes_nothing_else(quickstart, tmp_path):
    run, other, linked = (tmp_path / "runs" / name for name in ("quickstart", "other", "linked"))
    for folder in (other, linked):
        folder.mkdir(parents=True)
        (folder / "keep").touch()
    done, asked = quickstart()
    assert done.returncode == 0 and [line.split()[0] for line in asked] == ["data", "pretrain", "export", "generate"]
    assert f"--save {Path('runs/quickstart')} --load runs/quickstart" in asked[1]
    (run / "iter_0000009").mkdir()
    (run / "link").symlink_to(linked)
    assert quickstart()[0].returncode == 0 and (run / "iter_0000009").exists()  # resumed
    done, asked = quickstart("--fresh")
    assert done.returncode == 0 and asked[0].endswith("--fresh")
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "data", "hugging-face", "iter_0000001"]
    assert (other / "keep").exists() and (linked / "keep").exists()


def test_fresh_deletes_no_folder_that_is_not_its_own(quickstart, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    done, asked = quickstart("--fresh", "--out", str(tmp_path / "mine"))
    assert (done.returncode, asked) == (2, []) and (tmp_path / "mine" / "thesis.tex").exists()
    assert done.stderr.count("\n") == 1 and "holds no run of this script; --fresh would delete it" in done.stderr


def test_fresh_deletes_no_folder_in_which_a_run_is_at_work(quickstart, tmp_path):
    run = tmp_path / "runs" / "quickstart"
    assert quickstart()[0].returncode == 0
    with taking(run):
        done, asked = quickstart("--fresh")
    assert (done.returncode, asked) == (TAKEN, []) and (run / "iter_0000001").exists()
    assert done.stderr.count("\n") == 1 and f"process {os.getpid()}" in done.stderr
    assert quickstart("--fresh")[0].returncode == 0


def test_to_print_its_arguments_quickstart_neither_exports_nor_deletes(quickstart, tmp_path):
    assert quickstart()[0].returncode == 0
    (tmp_path / "runs/quickstart/hugging-face/model.safetensors").touch()
    done, asked = quickstart("--print-args")
    assert done.returncode == 0 and [line.split()[0] for line in asked] == ["data", "pretrain"]
    assert (tmp_path / "runs/quickstart/hugging-face/model.safetensors").exists()


# A Python 3.12 whose environments hold itself.
PYTHON = """#!/bin/bash
case "$*" in
    *'print(".".join'*) echo 3.12.9 ;;
    -V) echo Python 3.12.9 ;;
    "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "made as $PWD/.venv" >.venv/pyvenv.cfg ;;
    "-m pip"*) echo "$*" >>.venv/installed ;;
esac
"""


@pytest.fixture
def environment(tmp_path):
    """env.sh in a repository of its own, with stand-ins first on PATH: run it, with these variables."""
    root = tmp_path / "a clone"
    for folder in ("launch", "bin"):
        (root / folder).mkdir(parents=True)
    for file in ("launch/env.sh", "pyproject.toml"):
        shutil.copy(ROOT / file, root / file)

    def run(programs: dict[str, str], **more: str) -> subprocess.CompletedProcess:
        for name, script in programs.items():
            (root / "bin" / name).write_text(script)
            (root / "bin" / name).chmod(0o755)
        variables = {"PATH": f"{root}/bin:{os.environ['PATH']}"} | more
        return subprocess.run(["bash", "launch/env.sh"], cwd=root, env=variables, capture_output=True, text=True)

    return run


def test_an_environment_is_made_once_and_without_a_home(environment):
    done = environment({"python3.12": PYTHON, "pyenv": "#!/bin/sh\nexit 127\n"})
    assert (done.returncode, done.stderr) == (0, "") and "ready in" in done.stdout
    done = environment({})
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_an_environment_is_made_where_nothing_can_be_locked(environment):
    """As on Lustre mounted without flock, where util-linux' program ends with 71: there is nobody to wait for."""
    done = environment({"python3.12": PYTHON, "flock": "#!/bin/sh\necho No locks available >&2\nexit 71\n"})
    assert (done.returncode, done.stderr) == (0, "") and "waiting" not in done.stdout


@pytest.mark.parametrize(
    "ranks, cores, given, threads",
    [(8, 96, "", 8), (8, 32, "", 4), (2, 2, "", 1), (4, 2, "", 1), (2, 7, "", 3), (8, 96, "3", 3)],
)
def test_the_ranks_of_a_node_share_its_cores(ranks, cores, given, threads):
    script = f"source {shlex.quote(str(ROOT))}/launch/ranks.sh; threads_for {ranks} {cores}; printenv OMP_NUM_THREADS"
    environment = {"PATH": os.environ["PATH"]} | ({"OMP_NUM_THREADS": given} if given else {})
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_words_for_containers_reach_the_supervisor_as_they_are(locale):
    """slurm.sbatch hands them over as one word, which the supervisor splits by shlex. Bash's %q would not do for ü."""
    function = re.search(r"^quoted\(\) .*$", (ROOT / "launch" / "slurm.sbatch").read_text(), re.MULTILINE)[0]
    words = ["apptainer", "exec", "--bind", "/home/jürgen müller:/data", "it's $HOME \\", "a\nb", "", "*"]
    command = ["bash", "-c", f'{function}\nquoted "$@"', "bash", *words]
    done = subprocess.run(command, env=os.environ | {"LC_ALL": locale}, capture_output=True, check=True)
    assert shlex.split(done.stdout.decode()) == words
    none = subprocess.run([*command[:3], "bash"], capture_output=True, check=True)
    assert shlex.split(none.stdout.decode()) == []


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_line_of_an_arrays_file_counts_in_any_encoding(tmp_path, locale):
    """grep leaves lines out that are no text in its locale, and task 2 would train what is task 3's."""
    runs = tmp_path / "runs.txt"
    runs.write_bytes("# ü\n\na.toml --save ü\n".encode("latin-1") + b"b.toml\n")
    (command,) = re.findall(r"line=\$\((.*)\)", (ROOT / "launch" / "slurm.sbatch").read_text())
    for task, line in ((1, b"a.toml --save \xfc\n"), (2, b"b.toml\n"), (3, b"")):
        environment = os.environ | {"LC_ALL": locale, "SLURM_ARRAY_TASK_ID": str(task), "runs": str(runs)}
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True)
        assert (done.stdout, done.stderr) == (line, b"")


@pytest.mark.parametrize("words", [("--nnodes", "two"), ("--nnodes", "2", "--node-rank", "b"), ("--master-port", "")])
def test_what_is_no_number_is_no_single_machine(words):
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), *words, "c.toml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"are numbers, not '{words[-1]}'" in done.stderr and done.stderr.count("\n") == 1
