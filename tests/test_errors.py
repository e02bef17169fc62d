"""The tree of errors: exit codes as its docstring draws them, and where an error was raised."""

import ast
import pickle

import pytest

from orpo_dist import cli, errors


def test_callers_of_trl_catch_a_user_error():
    assert issubclass(errors.UserError, ValueError) and issubclass(errors.RankError, errors.UserError)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UserError("bad"), errors.BAD_INPUT),
        (errors.RankError("bad"), errors.BAD_INPUT),
        (errors.SaveError("full"), errors.FAILED),
        (errors.NonFiniteRun("nan"), errors.GAVE_UP),
        (errors.RunStopped("SIGTERM"), errors.STOPPED),
        (KeyboardInterrupt(), errors.INTERRUPTED),
    ],
)
def test_the_exit_codes_that_the_tree_of_errors_shows(error, code, monkeypatch):
    def main(argv):
        raise error

    monkeypatch.setattr("orpo_dist.cluster.status.main", main)
    assert cli.main(["status"]) == code
    line = next(line for line in errors.__doc__.splitlines() if f" {type(error).__name__} " in line)
    assert f" {code}  " in line


def test_where_an_error_was_raised():
    assert errors.raised_in(ValueError("never raised")) == ""
    try:
        ast.literal_eval("{")  # the standard library counts as its caller
    except SyntaxError as error:
        assert errors.raised_in(error) == __name__


def test_exit_codes_that_schedulers_know():
    codes = (errors.FINISHED, errors.FAILED, errors.BAD_INPUT, errors.GAVE_UP, errors.STOPPED, errors.INTERRUPTED)
    assert codes == (0, 1, 2, 3, 75, 130)


def test_a_stopped_run_ends_the_process_with_its_code():
    stopped = errors.RunStopped("SIGTERM", 7, "run/checkpoint-7")
    assert isinstance(stopped, SystemExit) and stopped.code == 75
    assert str(stopped).startswith("Stopped at step 7 (SIGTERM): saved run/checkpoint-7.")
    assert "nothing to save yet" in str(errors.RunStopped("SIGTERM"))


def test_a_bad_row_survives_pickling():
    """Rows are read in worker processes."""
    bad = pickle.loads(pickle.dumps(errors.BadRow("empty completion", "chosen", "it is empty")))
    assert (bad.kind, bad.column, bad.reason) == ("empty completion", "chosen", "it is empty")
