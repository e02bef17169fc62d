"""How a run can end other than well, and the exit code of each end (docs/runs.md)."""

FINISHED, FAILED, BAD_INPUT, GAVE_UP, STOPPED, INTERRUPTED = 0, 1, 2, 3, 75, 130


class UserError(Exception):
    """Something the user can mend: bad data, a contradicting option, a missing package or model.

    The message says what is wrong, where (file, row, column, option) and what to do. The command line prints it as
    it is, without a traceback, and exits with code 2: starting again would end in the same way.
    """


class RankError(UserError):
    """A UserError that only this rank knows about: every rank prints its own."""


class SaveError(Exception):
    """A checkpoint could not be written (full disk, read-only folder). Earlier checkpoints are whole. Exit code 1."""


class NonFiniteRun(Exception):
    """Too many optimizer steps with a loss or gradient norm that is no number. Exit code 3: do not start again."""


class RunStopped(SystemExit):
    """The run was asked to stop, saved a checkpoint and can be resumed. Exit code 75 (EX_TEMPFAIL of sysexits.h).

    A SystemExit, so that a script that calls `ORPOTrainer.train` ends with this code too.

    Attributes:
        reason: who asked: a signal, the stop file, the time limit, the launcher.
        step: optimizer steps done; 0 when training had not begun.
        checkpoint: the folder to resume from, None when training had not begun.
    """

    def __init__(self, reason: str, step: int = 0, checkpoint: str | None = None):
        super().__init__(STOPPED)
        self.reason, self.step, self.checkpoint = reason, step, checkpoint

    def __str__(self) -> str:
        saved = f"saved {self.checkpoint}" if self.checkpoint else "nothing to save yet"
        return f"Stopped at step {self.step} ({self.reason}): {saved}. Continue with --resume_from_checkpoint auto."


class BadRow(Exception):
    """One row that cannot be trained on. `kind` is a key of ADVICE; `reason` says what was found in `column`."""

    def __init__(self, kind: str, column: str | None, reason: str):
        super().__init__(kind, column, reason)  # all three, so that it survives pickling between processes
        self.kind = kind
        self.column = column
        self.reason = reason
