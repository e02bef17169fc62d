"""Limits of phases, and who is named. Real ranks that are stopped: tests/survival/test_hangs.py."""

import subprocess
import sys

import pytest

from orpo_dist.distributed import hang
from orpo_dist.distributed.hang import HangLimits, HangWatch

LIMITS = HangLimits(step=10, save=20, evaluation=30, last_act=40)


@pytest.fixture
def clock(monkeypatch):
    """The watch's clock, and the timeouts that it gives to collectives."""
    now, timeouts = [100.0], []
    monkeypatch.setattr(hang.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(hang, "collectives_may_take", timeouts.append)
    return now, timeouts


def test_each_phase_has_its_limit_and_the_one_around_begins_anew(clock):
    now, timeouts = clock
    watch = HangWatch(LIMITS)
    watch.now("step", "step 2")
    assert watch._place.deadline == 110
    with watch.phase("save", "the save of step 2"):
        assert (watch._place.what, watch._place.deadline) == ("the save of step 2", 120)
        now[0] = 115
        watch.progress()
        assert watch._place.deadline == 135
    assert (watch._place.what, watch._place.deadline) == ("step 2", 125)
    assert timeouts == [limit + hang.GRACE_SECONDS for limit in (10, 20, 10)]


def test_a_step_after_a_step_does_not_touch_the_process_groups(clock):
    watch = HangWatch(LIMITS)
    for step in range(3):
        watch.now("step", f"step {step}")
    assert len(clock[1]) == 1


def test_until_the_first_step_has_ended_everything_has_the_limit_of_the_start(clock):
    watch = HangWatch(LIMITS)
    watch.now("start", "step 1")
    with watch.phase("evaluation", "the evaluation of step 0"):
        assert watch._place.deadline == 100 + hang.START_SECONDS
    watch.now("step", "step 2")
    assert watch._place.deadline == 110


def test_outside_of_phases_there_is_no_limit(clock):
    watch = HangWatch(LIMITS)
    with watch.phase("last act", "merging the adapter"):
        assert watch._limits.of("last act") == (40, "last_act_timeout")
    assert watch._place is None


def test_one_process_has_no_watch():
    watch = HangWatch(LIMITS)
    watch.begin()
    assert watch._store is None


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("3|b|step 5", "3|b|step 5", "No sign of life from rank 1 on b, last seen in step 5."),
        (None, None, "No sign of life from rank 1, which has given none yet."),
        ("3|b|step 5", "5|b|the save of step 5", "All ranks are alive: rank 1 in the save of step 5."),
    ],
)
def test_who_is_named(monkeypatch, before, after, told):
    monkeypatch.setattr(hang, "BEAT_SECONDS", 0.01)
    watch, looks = HangWatch(LIMITS), iter([{1: before}, {1: after}])
    monkeypatch.setattr(watch, "_signs", lambda: next(looks))
    assert watch._others() == told


def test_a_store_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(hang, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(hang, "STORE_SECONDS", 0.05)
    watch = HangWatch(LIMITS)
    monkeypatch.setattr(watch, "_signs", lambda: hang.threading.Event().wait(5))
    assert watch._others().startswith("The store of the process group does not answer")


def test_no_thread_is_left_when_the_interpreter_ends(tmp_path):
    """A thread that comes back from the store then aborts the process. Here it is in the store nearly all the time."""
    program = """
import sys
from torch import distributed
from orpo_dist.distributed import hang
hang.BEAT_SECONDS = 0.0
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
watch = hang.HangWatch(hang.HangLimits(10, 10, 10, 10))
watch.begin()
assert len(watch._threads) == 2
"""
    command = [sys.executable, "-c", program, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    told = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
