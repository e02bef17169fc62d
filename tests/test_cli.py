"""The command line: commands, exit codes, and what bad input looks like."""

import json
import subprocess
import sys

import pytest

from orpo_dist import __version__, cli
from orpo_dist.errors import UserError


class FakeCommand:
    """A command module whose main does what a test wants."""

    def __init__(self, outcome):
        self.outcome = outcome
        self.argv = None

    def main(self, argv):
        self.argv = argv
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def command(monkeypatch):
    def install(outcome) -> FakeCommand:
        fake = FakeCommand(outcome)
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: fake)
        return fake

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return install


def test_a_command_gets_its_arguments_and_gives_the_exit_code(command):
    fake = command(0)
    assert cli.main(["train", "recipe.yaml", "--seed", "3"]) == 0
    assert fake.argv == ["recipe.yaml", "--seed", "3"]


def test_bad_input_is_one_line_and_exit_code_2(command, capsys):
    command(UserError("pairs.jsonl, row 3: empty completion."))
    assert cli.main(["train", "recipe.yaml"]) == 2
    assert capsys.readouterr().err == "orpo-dist: error: pairs.jsonl, row 3: empty completion.\n"


@pytest.mark.parametrize("argv", [["--debug", "train"], ["train", "--debug"], ["train", "--debug", "--seed", "3"]])
def test_debug_shows_the_traceback(command, argv):
    fake = command(UserError("bad"))
    with pytest.raises(UserError):
        cli.main(argv)
    assert "--debug" not in fake.argv


def test_debug_with_a_value_belongs_to_transformers(command):
    fake = command(0)
    assert cli.main(["train", "--debug", "underflow_overflow"]) == 0
    assert fake.argv == ["--debug", "underflow_overflow"]


def test_failures_keep_their_traceback(command):
    command(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        cli.main(["train"])


@pytest.mark.parametrize(("outcome", "code"), [(SystemExit(2), 2), (SystemExit(0), 0), (SystemExit("no"), 1)])
def test_exits_of_argparse_become_exit_codes(command, outcome, code):
    command(outcome)
    assert cli.main(["merge"]) == code


def test_interrupt(command, capsys):
    command(KeyboardInterrupt())
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize(
    ("rank", "local_rank", "told"),
    [("0", "0", "orpo-dist: error: bad"), ("3", "1", ""), ("2", "0", "orpo-dist: error (rank 2): bad")],
)
def test_one_message_per_node(command, capsys, monkeypatch, rank, local_rank, told):
    command(UserError("bad"))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err.strip() == told


def test_unknown_command_names_those_that_exist(capsys):
    assert cli.main(["trian"]) == 2
    told = capsys.readouterr().err
    assert "'trian' is not a command" in told
    assert ", ".join(cli.COMMANDS) in told and "submit" in told


def test_help_and_version(capsys):
    assert cli.main([]) == 0
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"orpo-dist {__version__}\n"


def test_help_of_train_lists_the_fields(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("--dataset_name", "--lora_r", "--nll_scope", "--per_device_train_batch_size"):
        assert name in shown


def test_help_imports_no_torch():
    program = "import sys, json; from orpo_dist import cli; cli.main([]); print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) is False


def test_every_command_exists():
    import importlib

    for module, _ in cli.COMMANDS.values():
        assert callable(importlib.import_module(module).main), module


def test_exit_code_of_the_program():
    done = subprocess.run(
        [sys.executable, "-m", "orpo_dist.cli", "train", "no-such-recipe.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no-such-recipe.yaml does not exist" in done.stderr


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["demo", "--output", "x"], "--output"),
        (["merge", "run", "--no-ver"], "--no-ver"),
        (["doctor", "--he"], "--he"),
        (["cancel", "1", "--no"], "--no"),
        (["status", "--he"], "--he"),
        (["convert-checkpoint", "x", "--he"], "--he"),
        (["launch", "--node-r", "0", "r.yaml"], "--node-r"),
        (["llm", "--train", "--mod", "m"], "--mod"),
        (["train", "--learning_r", "1"], "--learning_r"),
    ],
)
def test_no_command_takes_abbreviated_flags(argv, flag, capsys):
    """A later flag could make them ambiguous."""
    assert cli.main(argv) == 2
    assert flag in capsys.readouterr().err
