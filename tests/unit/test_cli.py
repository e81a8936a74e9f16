"""The `xact` command: what it parses, how it fails, and that it starts without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_xact import cli

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "megatron", "transformers", "tokenizers", "triton", "matplotlib", "scipy")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "megatron_xact", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
    )


def heavy_modules_of(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter has imported after running `code`."""
    ending = f"import sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{ending}"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1].split()


MISTAKES = {
    "dokter": "invalid choice: 'dokter'",
    "doctor --jsn": "unrecognized arguments: --jsn",
    "plan a.toml --nodes 0": "--nodes: 0 must be a positive whole number",
    "plot none": "no such folder: none",
    "export none out": "no such folder: none",
    "export . out --dtype fp8": "--dtype: invalid choice: 'fp8'",
    "export . out --max-shard-size 0": "max-shard-size = '0': expected a size such as",
    "export . .": "exists already; choose another name, or --overwrite",
    "import . .": "exists already; choose another name, or --overwrite",
    "import . out --tp 0": "--tp: 0 must be a positive whole number",
    "verify . none": "no such folder: none",
    "verify . . --text none": "no such file: none",
    "generate . --tokens 0": "--tokens: 0 must be a positive whole number",
    "generate . --temperature -1": "--temperature: -1 must be 0 or a positive number",
    "eval .": "nothing to evaluate: give --data PREFIX",
    "eval . --step -1": "--step: -1 must be a whole number, 0 or more",
    "eval . --tasks x --include-path none": "no such folder: none",
    "study fit": "the following arguments are required: TABLE",
    "study fit runs.csv --bootstraps 0": "--bootstraps: 0 must be a positive whole number",
    "bench mlp --tp 0": "--tp: 0 must be a positive whole number",
    "bench kernels --dtypes int8": "--dtypes: invalid choice: 'int8'",
}


def test_help_and_mistakes_are_light(tmp_path):
    """Of every command and every subcommand, in one process."""
    code = f"""
import argparse, contextlib, io, os
from megatron_xact import cli

def said(words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try: code = cli.main(words)
        except SystemExit as ending: code = ending.code
    return code, out.getvalue()

def subcommands(name):
    actions = cli._parser(name)._subparsers._group_actions[0].choices[name]._actions
    return [sub for a in actions if isinstance(a, argparse._SubParsersAction) for sub in a.choices]

os.chdir({str(tmp_path)!r})
helps = [[]] + [[name, *sub] for name in cli.COMMANDS for sub in [[], *([s] for s in subcommands(name))]]
for words in helps:
    code, text = said([*words, "--help"])
    assert code == 0 and text.startswith(" ".join(["usage: xact", *words])), (words, text)
assert ["study", "fit"] in helps and ["data", "prepare"] in helps and ["bench", "mlp"] in helps and len(helps) > 20
for words, told in {MISTAKES!r}.items():
    code, text = said(words.split())
    assert code == 2 and told in text, (words, text)
"""
    assert heavy_modules_of(code) == []


def test_the_check_for_light_help_can_fail():
    assert "torch" in heavy_modules_of("import megatron_xact.activations")


def test_every_command_is_listed():
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_pretrain_keeps_megatrons_flags_in_order_and_takes_its_own():
    words = "pretrain a.toml --bf16 --nproc-per-node 2 --train-iters 100 --set model.x=1 --data-path 0.3 a 0.7 b"
    args = cli.parse([*words.split(), "--set", "model.y=2", "--print-args", "--lr", "-1"])
    assert (args.config, args.nproc_per_node, args.set, args.print_args) == (
        "a.toml",
        2,
        ["model.x=1", "model.y=2"],
        True,
    )
    assert args.overrides == "--bf16 --train-iters 100 --data-path 0.3 a 0.7 b --lr -1".split()


def test_abbreviations_of_ours_are_left_to_megatron():
    args = cli.parse(["pretrain", "a.toml", "--print"])
    assert not args.print_args and args.overrides == ["--print"]


def test_a_user_error_is_one_line_and_a_traceback_only_on_request():
    done = run("pretrain", "none.toml", "--print-args")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("xact: error: ") and "Traceback" not in done.stderr
    assert "Traceback" in run("pretrain", "none.toml", "--print-args", XACT_TRACEBACK="1").stderr


@pytest.mark.parametrize("words", [[], ["dokter"], ["doctor", "--jsn"]])
def test_wrong_usage_exits_with_2(words):
    done = run(*words)
    assert done.returncode == 2 and "usage: xact" in done.stderr


@pytest.mark.parametrize(
    "error, code, said",
    [
        (KeyboardInterrupt(), 130, "xact: interrupted"),
        (ValueError("two\nlines"), 2, "xact: error: two lines"),
        (FileNotFoundError("gone"), 2, "xact: error: gone"),
        (ImportError("no quack"), 2, "xact: error: no quack"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, said):
    def fail(args):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.Command("fails", lambda parser: None, fail))
    monkeypatch.delenv("XACT_TRACEBACK", raising=False)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == said + "\n"


@pytest.mark.parametrize(
    "refused, said",
    [
        (lambda folder: open(folder / "none"), "there is no {0}/none: is the path right?"),
        (lambda folder: (folder / "file/below").mkdir(), "{0}/file/below cannot be there, since a part of"),
        (lambda folder: folder.write_text(""), "{0} is a folder, where a file is needed"),
        (lambda folder: folder.mkdir(), "{0} is there already: choose another name, or"),
        (lambda folder: folder.rmdir(), "{0} is a folder that is not empty: choose another name"),
        (lambda folder: Path("/dev/full").write_text("x"), "there is no room for a file: make some, or"),
        (lambda folder: os.readlink(folder), "{0}: Invalid argument"),
    ],
)
def test_what_the_system_refuses_is_told_in_words(tmp_path, monkeypatch, capsys, refused, said):
    (tmp_path / "file").touch()
    command = cli.Command("is refused", lambda parser: None, lambda args: refused(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "doctor", command)
    assert cli.main(["doctor"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"xact: error: {said.format(tmp_path)}") and "Errno" not in told and told.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise AssertionError("ours")

    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.Command("fails", lambda parser: None, fail))
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["doctor"])
