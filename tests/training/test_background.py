"""Work in a thread: one at a time, its failure is raised where it is waited for."""

import threading

import pytest

from orpo_dist.training.background import Background


def test_it_runs_beside_and_says_once_how_long_it_took():
    go, background = threading.Event(), Background()
    assert background.wait() and background.took() is None
    background.start(lambda: bool(go.wait(10)))
    assert not background.wait(0.01) and background.took() is None
    with pytest.raises(AssertionError, match="one at a time"):
        background.start(lambda: None)
    go.set()
    assert background.wait() and not background.failed
    assert background.took() > 0 and background.took() is None


def test_its_failure_is_raised_once():
    def broken():
        raise ZeroDivisionError("a bug")

    background = Background()
    background.start(broken)
    with pytest.raises(ZeroDivisionError):
        background.wait()
    assert background.wait() and not background.failed
