"""No process of a group outlives it: what Linux offers a launcher for that. Elsewhere these do nothing."""

import ctypes
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import psutil

# https://man7.org/linux/man-pages/man2/prctl.2.html
_SET_SIGNAL_ON_DEATH_OF_PARENT, _SET_CHILD_SUBREAPER, _GET_CHILD_SUBREAPER = 1, 36, 37
SECONDS_TO_END = 10.0  # loader workers look for their parent once in a few seconds


def on_death_of_parent(number: int) -> None:
    """This process gets the signal when its parent dies, however that happens. For the child, before it runs."""
    _prctl(_SET_SIGNAL_ON_DEATH_OF_PARENT, number)


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Within it, processes whose parent dies become children of this one, and not of the machine's first process."""
    before = ctypes.c_int(0)
    _prctl(_GET_CHILD_SUBREAPER, ctypes.byref(before))
    _prctl(_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_SET_CHILD_SUBREAPER, before.value)


def end_children(others: Collection[int]) -> None:
    """Wait for what the training processes have started, then kill it. others: ids of children to leave alone."""
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in others]
    _, alive = psutil.wait_procs(left, timeout=SECONDS_TO_END)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=SECONDS_TO_END)


def _prctl(option: int, value: object) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
