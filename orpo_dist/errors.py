"""How a run can fail or stop. docs/runs.md describes each exit code for the user.

    Exception
    ├── ValueError
    │   └── UserError          2  BAD_INPUT    the user can fix it; a restart would fail in the same way
    │       └── RankError      2  BAD_INPUT    the same, but known to one rank only
    ├── SaveError              1  FAILED       a checkpoint could not be written
    ├── NonFiniteRun           3  GAVE_UP      too many steps with a non-finite loss or gradient norm
    ├── RuntimeError
    │   └── TrainingFailed     the code of the training processes, which have printed the error
    ├── BadRow                 -               one row; the data step drops it or raises a UserError
    └── anything else          1  FAILED       with its traceback
    BaseException
    ├── SystemExit
    │   └── RunStopped        75  STOPPED      stopped on request; a checkpoint is saved and the run can be resumed
    └── KeyboardInterrupt    130  INTERRUPTED  Ctrl-C outside of a run

0 (FINISHED) is the only exit code of a finished run. A restart can help after 1 and 75, never after 2 and 3.
"""

import sys

FINISHED, FAILED, BAD_INPUT, GAVE_UP, STOPPED, INTERRUPTED = 0, 1, 2, 3, 75, 130


class UserError(ValueError):
    """Something the user can fix: bad data, a contradicting option, a missing package or model. Exit code 2.

    The message says what is wrong, where (file, row, column, option) and what to do. The command line prints it
    without a traceback. A restart would fail in the same way.

    It is a ValueError because callers of TRL's trainers catch that for wrong arguments.
    """


class RankError(UserError):
    """A UserError that only this rank knows about: every rank prints its own. Exit code 2."""


class SaveError(Exception):
    """A checkpoint could not be written (full disk, read-only folder). Earlier checkpoints are intact. Exit code 1."""


class NonFiniteRun(Exception):
    """Too many optimizer steps with a non-finite loss or gradient norm. Exit code 3: a restart does not help."""


class TrainingFailed(RuntimeError):
    """The training processes that this process started have failed and printed the reason.

    Attributes:
        exit_code: the most informative exit code of the processes (see `cluster.processes.telling_code`).
    """

    def __init__(self, exit_code: int):
        super().__init__(f"the training processes failed (exit code {exit_code}); their error is above.")
        self.exit_code = exit_code


class RunStopped(SystemExit):
    """The run stopped on request, saved a checkpoint and can be resumed. Exit code 75 (EX_TEMPFAIL of sysexits.h).

    A SystemExit, so that a script that calls `ORPOTrainer.train` also ends with this code.

    Attributes:
        reason: the source of the request: a signal, the stop file, the time limit, the launcher.
        step: optimizer steps done; 0 if training had not started.
        checkpoint: the folder to resume from; None if training had not started.
        printed: whether the training processes started by this process have already printed it.
    """

    def __init__(self, reason: str, step: int = 0, checkpoint: str | None = None, *, printed: bool = False):
        super().__init__(STOPPED)
        self.reason, self.step, self.checkpoint, self.printed = reason, step, checkpoint, printed

    def __str__(self) -> str:
        saved = f"saved {self.checkpoint}" if self.checkpoint else "nothing to save yet"
        return f"Stopped at step {self.step} ({self.reason}): {saved}. Continue with --resume_from_checkpoint auto."


class BadRow(Exception):
    """One row that cannot be trained on.

    Attributes:
        kind: a key of `data.audit.ADVICE`.
        column: the affected column; None for the whole row.
        reason: what is wrong with it.
    """

    def __init__(self, kind: str, column: str | None, reason: str):
        super().__init__(kind, column, reason)  # all three, so that it can be pickled between processes
        self.kind, self.column, self.reason = kind, column, reason


def raised_in(error: BaseException) -> str:
    """The module that raised `error`, "" if it was never raised. An error from the standard library is attributed to
    its caller: if `json` rejects a text, the module that called `json` counts.

    Distinguishes a library that rejects an option from a bug that raises the same type of error.
    """
    module, trace = "", error.__traceback__
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        if name.split(".")[0] not in sys.stdlib_module_names:
            module = name
        trace = trace.tb_next
    return module
