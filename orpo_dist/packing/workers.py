"""Signals in the worker processes of a data loader.

A worker leaves stop requests to its rank: a signal to a process group, or to every process of a job, would otherwise
kill the workers, and the rank would fail instead of saving. It ends when its rank tells it to, or is gone.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LEFT_TO_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
WATCH_SECONDS = 1.0


@contextmanager
def signals_held() -> Iterator[None]:
    """Processes forked within this block begin with these signals blocked, so that none arrives before `begin_worker`.
    The caller's own arrive after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_RANK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(worker: int) -> None:
    """`worker_init_fn` of a DataLoader."""
    rank = os.getppid()
    if sys.platform == "darwin":  # no sigtimedwait; torch's own handler for SIGTERM stays, with which it ends workers
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_RANK)
    threading.Thread(target=_watch, args=(rank,), name="signals", daemon=True).start()


def _watch(rank: int) -> None:
    """Take the blocked signals. SIGTERM is ignored unless the rank sent it: torch and multiprocessing end their workers
    with it, and wait for them without a limit. torch's own watch on the parent works only while a worker is idle."""
    while True:
        taken = signal.sigtimedwait(LEFT_TO_THE_RANK, WATCH_SECONDS)
        told = taken is not None and taken.si_signo == signal.SIGTERM and taken.si_pid == rank
        if told or os.getppid() != rank:
            os._exit(0)
