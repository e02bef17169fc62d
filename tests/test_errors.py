"""Ends of a run: their exit codes, and what survives between processes."""

import pickle

from orpo_dist import errors
from orpo_dist.errors import BadRow, RankError, RunStopped, UserError


def test_exit_codes_that_schedulers_know():
    codes = (errors.FINISHED, errors.FAILED, errors.BAD_INPUT, errors.GAVE_UP, errors.STOPPED, errors.INTERRUPTED)
    assert codes == (0, 1, 2, 3, 75, 130)


def test_a_stopped_run_ends_the_process_with_its_code():
    stopped = RunStopped("SIGTERM", 7, "run/checkpoint-7")
    assert isinstance(stopped, SystemExit) and stopped.code == 75
    assert str(stopped).startswith("Stopped at step 7 (SIGTERM): saved run/checkpoint-7.")
    assert "nothing to save yet" in str(RunStopped("SIGTERM"))


def test_an_error_of_one_rank_is_a_users():
    assert issubclass(RankError, UserError)


def test_a_bad_row_survives_pickling():
    """Rows are read in worker processes."""
    bad = pickle.loads(pickle.dumps(BadRow("empty completion", "chosen", "it is empty")))
    assert (bad.kind, bad.column, bad.reason) == ("empty completion", "chosen", "it is empty")
