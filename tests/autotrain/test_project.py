"""`orpo-dist llm`: both spellings of every flag, wrong command lines, exit codes; the project's backends."""

import subprocess
import sys

import pytest

from orpo_dist.autotrain.project import AutoTrainProject, main
from orpo_dist.errors import TrainingFailed, UserError
from tests.autotrain.options import MAPPED, params


def test_unknown_backend_is_a_clear_error():
    with pytest.raises(UserError, match="backend='spaces' is not in this version"):
        AutoTrainProject(params(), backend="spaces")
    with pytest.raises(UserError, match="needs backend='slurm'"):
        AutoTrainProject(params(), slurm="--nodes 2")


@pytest.fixture
def created(monkeypatch):
    """The parameters of the projects that the command line creates, instead of training them."""
    made = []
    monkeypatch.setattr(AutoTrainProject, "create", lambda self: made.append(self.params))
    return made


REQUIRED = ["--train", "--model", "m", "--data-path", "d", "--project-name", "p"]


@pytest.mark.parametrize("spelling", [lambda flag: flag, lambda flag: "--" + flag[2:].replace("-", "_")])
def test_both_spellings_of_every_flag(spelling, created):
    argv, expected = [*REQUIRED], {"model": "m", "data_path": "d", "project_name": "p"}
    skip = {"trainer", "attn_implementation", *expected}
    values = {name: value for name, (value, _, _) in MAPPED.items()} | {"padding": "left", "token": "t"}
    for name, value in values.items():
        if name in skip:
            continue
        flag = spelling("--" + name.replace("_", "-"))
        if value is True:
            argv.append(flag)
        elif value is False:
            argv.append(flag.replace("--", "--no_" if "_" in flag or flag == "--" else "--no-", 1))
        else:
            argv += [flag, str(value)]
        expected[name] = value
    assert main(argv) == 0
    assert {name: getattr(created[0], name) for name in expected} == expected


def test_flags_take_true_and_false_too(created):
    main([*REQUIRED, "--peft", "true", "--merge-adapter=false", "--add_eos_token", "False"])
    assert (created[0].peft, created[0].merge_adapter, created[0].add_eos_token) == (True, False, False)


def test_autotrains_own_example(created):
    """The command of DESIGN's and AutoTrain's documentation."""
    argv = "--trainer orpo --prompt-text-column prompt --text-column chosen --rejected-text-column rejected --peft"
    assert main([*REQUIRED, *argv.split()]) == 0
    assert created[0].peft and created[0].rejected_text_column == "rejected"


def test_foreign_flags_on_the_command_line(created):
    main([*REQUIRED, "--rl-gamma", "0.9", "--use_sweep", "--no-wandb-visualizer", "--block-size", "1024,512"])
    assert created[0].ignored == ["rl_gamma", "use_sweep", "wandb_visualizer"]
    assert created[0].block_size == (1024, 512)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Say what to do: orpo-dist llm --train"),
        (["--train"], "--model, --data-path, --project-name missing"),
        (["--train", "--model", "m", "--data_path", "d"], "--project-name missing"),
        ([*REQUIRED, "--batch-sise", "2"], r"--batch_sise is not an option: did you mean batch_size\?"),
        ([*REQUIRED, "--learning-rate", "2"], "--learning_rate is not an AutoTrain option: it is called lr here"),
        ([*REQUIRED, "--epoch", "2"], r"--epoch is not an option: did you mean epochs\?"),
        ([*REQUIRED, "stray"], "'stray' belongs to no flag"),
        ([*REQUIRED, "--lr"], "expected one argument"),
        ([*REQUIRED, "--lr", "fast"], "lr='fast' is not a number"),
        ([*REQUIRED, "--backend", "spaces-a10g-large"], "is not in this version"),
        (["--inference", "--model", "m"], "--inference is not supported"),
    ],
)
def test_wrong_command_lines(argv, message, created):
    with pytest.raises(UserError, match=message):
        main(argv)
    assert not created


@pytest.mark.parametrize(("code", "expected", "lines"), [(2, 2, 0), (1, 1, 1), (-9, 1, 1)])
def test_failed_processes_give_their_exit_code(code, expected, lines, monkeypatch, capsys):
    def fail(self):
        raise TrainingFailed(code)

    monkeypatch.setattr(AutoTrainProject, "create", fail)
    assert main(REQUIRED) == expected
    assert capsys.readouterr().err.count("\n") == lines


def test_help_imports_no_torch():
    code = "import sys; from orpo_dist.autotrain.project import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--rejected-text-column" in result.stdout and "--rl-gamma" not in result.stdout
