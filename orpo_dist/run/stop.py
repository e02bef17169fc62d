"""Stop requests: signals, a stop file, a time limit, a lost launcher.

A request only sets a flag. The flag is part of the one all-reduce of each optimizer step, so all ranks stop at the same
step and save one checkpoint together. A rank that stopped alone would leave the others waiting in their next
collective, and under ZeRO and FSDP every forward has some.
"""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from orpo_dist.errors import NonFiniteRun, RunStopped, SaveError, UserError

STOP_FILE = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# A signal to a whole process group reaches a worker twice: directly, and passed on by torchrun. Copies that arrive
# within this time are the same request.
ECHO_SECONDS = 5.0
# Time reserved for the checkpoint before max_runtime ends, until the first one has been timed.
LEAST_MARGIN, MARGIN_SHARE = 60.0, 0.05
# On the monotonic clock: the other one may be set while the run lasts.
PROCESS_STARTED = time.monotonic() - (time.time() - psutil.Process().create_time())


_raised: list[str] = []  # the signal that `raising_on_signals` has raised within its block


class StopRequests:
    """The stop requests that this rank has received.

    Args:
        folder: the run's folder, in which the first rank looks for the stop file.
        max_runtime: seconds from the start of the process; None for no limit.
        is_first_rank: whether this rank looks for the stop file.
    """

    # A stop file from an earlier run, or an earlier train() of this process, does not apply to this one.
    _asks_since = PROCESS_STARTED

    def __init__(self, folder: Path, max_runtime: float | None, *, is_first_rank: bool):
        self._file, self._max_runtime, self._is_first_rank = folder / STOP_FILE, max_runtime, is_first_rank
        self._pid, self._launcher = os.getpid(), _launcher()
        self._signal: str | None = None
        self._reason: str | None = None
        self._signalled_at = 0.0
        self._in_steps = False
        self._longest_step = self._longest_save = 0.0
        self._step_began: float | None = None

    def follow(self, folder: Path, max_runtime: float | None) -> None:
        """Take over another folder or limit, which options have changed."""
        self._file, self._max_runtime = folder / STOP_FILE, max_runtime

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within this block signals set the flag. Outside it and in other threads their handlers are unchanged."""
        if self._is_first_rank and self._file.exists() and self._is_of_an_earlier_run():
            self._file.unlink()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._signal = self._reason = None
        before = {number: signal.signal(number, self._on_signal) for number in _heard()}
        try:
            yield
        finally:
            self._in_steps = False
            StopRequests._asks_since = time.monotonic()
            for number, handler in before.items():
                signal.signal(number, handler)

    def steps_begin(self) -> None:
        """From now on a request takes effect at the end of the step. Before, there is nothing to save."""
        self._in_steps = True
        self._step_began = time.monotonic()
        if self._signal is not None:
            raise RunStopped(self._signal)
        heed_signals()

    def step_ends(self) -> None:
        """Record the duration of the step, for the time limit."""
        now = time.monotonic()
        if self._step_began is not None:
            self._longest_step = max(self._longest_step, now - self._step_began)
        self._step_began = now

    def saved(self, seconds: float) -> None:
        """Record the duration of a checkpoint, which does not count as part of a step."""
        self._longest_save = max(self._longest_save, seconds)
        self.not_a_step()

    def not_a_step(self) -> None:
        """What was done since the last step, such as an evaluation, does not count as part of the next."""
        self._step_began = time.monotonic()

    @property
    def in_steps(self) -> bool:
        """Whether a request waits to be agreed on; else it raises at once."""
        return self._in_steps

    def reason(self) -> str | None:
        """Why this rank wants to stop, or None. The first reason is kept: otherwise the time limit could be withdrawn
        when the margin for saving changes. Cheap: it reads a flag, a clock and the status of one file."""
        if self._reason is None:
            self._reason = self._look()
        return self._reason

    def _look(self) -> str | None:
        if self._signal is not None:
            return self._signal
        if self._is_first_rank and self._file.exists():
            return f"the file {self._file}"
        if self._max_runtime is not None:
            margin = 2 * self._longest_save or max(LEAST_MARGIN, MARGIN_SHARE * self._max_runtime)
            # If the limit is short, at least half of it is for training.
            margin = self._longest_step + min(margin, self._max_runtime / 2)
            if time.monotonic() - PROCESS_STARTED + margin >= self._max_runtime:
                return f"max_runtime of {self._max_runtime:.0f} s"
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the launcher is gone"
        return None

    def _is_of_an_earlier_run(self) -> bool:
        """Whether the stop file is older than this run, by the clock of its file system: on a shared one that is not
        the clock of this machine."""
        age = _file_system_time(self._file.parent) - self._file.stat().st_mtime
        return age > time.monotonic() - StopRequests._asks_since

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if os.getpid() != self._pid:  # a forked worker of a data loader
            _die_of(number)
        if self._signal is None:
            self._signal, self._signalled_at = name, time.monotonic()
            if not self._in_steps:
                raise RunStopped(name)
            if self._launcher is None:
                # The kernel's default action: Python handlers do not run while the main thread is in a collective.
                for other in _heard():
                    signal.signal(other, signal.SIG_DFL)
            os.write(2, f"orpo-dist: {name}: stopping after this step. Send it again to stop at once.\n".encode())
        elif self._launcher is None or time.monotonic() - self._signalled_at > ECHO_SECONDS:
            _die_of(number)


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """For the parts of a run that have nothing to save: a signal raises RunStopped in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            _die_of(number)
        signal.signal(number, signal.SIG_IGN)  # torchrun forwards the same signal
        _raised.append(signal.Signals(number).name)
        raise RunStopped(signal.Signals(number).name)

    process = os.getpid()
    before = {number: signal.signal(number, stop) for number in _heard()}
    try:
        yield
    finally:
        _raised.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def heed_signals() -> None:
    """Raises RunStopped again for a signal whose first one was swallowed: some libraries catch everything while they
    are imported, and Python does so in destructors."""
    if _raised:
        raise RunStopped(_raised[0])


def stop_behind(error: Exception) -> RunStopped | None:
    """The stop that was under way when `error` was raised: what a library cleans up may fail halfway through its work,
    as the pool of Dataset.map does. None if there was none, or if the error says more."""
    if isinstance(error, UserError | SaveError | NonFiniteRun):
        return None
    link: BaseException | None = error
    while link is not None and not isinstance(link, RunStopped):
        link = link.__context__
    return link


def ignore_signals() -> None:
    """Call it when the checkpoint is complete and the process is about to exit: a launcher must not kill it then."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _file_system_time(folder: Path) -> float:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as probe:
        return os.stat(probe.name).st_mtime


def _heard() -> list[signal.Signals]:
    """SIGHUP is left alone where it is ignored: below nohup a run outlives its terminal."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def _die_of(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _launcher() -> int | None:
    """Process id of torchrun or accelerate launch if one of them is the parent process, else None.

    SIGUSR1 kills both unless PET_SIGNALS_TO_HANDLE lists it, and their workers keep running.
    """
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return parent
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        try:
            command = psutil.Process(parent).cmdline()
        except psutil.Error:
            return None
        if any("accelerate" in word for word in command):
            return parent
    return None
