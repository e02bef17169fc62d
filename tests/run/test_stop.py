"""Durations, and what a process does with a second signal."""

import os
import signal
import subprocess
import sys
import time

import pytest

from orpo_dist.errors import RunStopped, SaveError
from orpo_dist.run import stop
from orpo_dist.run.stop import StopRequests, raising_on_signals, stop_behind


def test_a_signal_before_the_first_step_ends_at_once():
    with pytest.raises(RunStopped, match="SIGUSR1"), raising_on_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)


def test_a_stop_that_a_failing_clean_up_hides_is_found():
    def asked_to_stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with pytest.raises(TimeoutError) as failed, raising_on_signals():
        try:
            asked_to_stop()
        finally:
            raise TimeoutError  # as the pool of Dataset.map does
    hidden = stop_behind(failed.value)
    assert hidden is not None and hidden.reason == "SIGTERM"
    assert stop_behind(TimeoutError()) is None
    with pytest.raises(SaveError) as failed, raising_on_signals():
        try:
            asked_to_stop()
        finally:
            raise SaveError("a full disk")  # it matters more
    assert stop_behind(failed.value) is None


def test_a_stop_that_a_library_swallows_is_heeded_before_the_first_step(tmp_path):
    with raising_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:
            pass
        with pytest.raises(RunStopped, match="SIGTERM"):
            StopRequests(tmp_path, None, is_first_rank=True).steps_begin()
    StopRequests(tmp_path, None, is_first_rank=True).steps_begin()


def test_only_the_first_rank_looks_for_the_stop_file(tmp_path):
    (tmp_path / "STOP").touch()
    assert StopRequests(tmp_path, None, is_first_rank=True).reason() == f"the file {tmp_path / 'STOP'}"
    assert StopRequests(tmp_path, None, is_first_rank=False).reason() is None


IN_A_LONG_STEP = """
import sys, time
from pathlib import Path
from orpo_dist.run import stop
from orpo_dist.run.stop import StopRequests
stop = StopRequests(Path("."), None, is_first_rank=False)
with stop.listening():
    stop.steps_begin()
    print("in a step", flush=True)
    begun = time.monotonic()
    while time.monotonic() < begun + 60:
        if {step_ends} and stop.reason():
            print(stop.reason(), flush=True)
            sys.exit(75)
        time.sleep(0.01)
"""


@pytest.fixture
def in_a_long_step():
    started = []

    def start(*, step_ends: bool, **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", IN_A_LONG_STEP.format(step_ends=step_ends)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        assert process.stdout.readline() == "in a step\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_one_signal_waits_for_the_step(in_a_long_step):
    process = in_a_long_step(step_ends=True)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    assert process.stdout.read() == "SIGUSR1\n"


def test_a_closed_terminal_asks_to_stop_unless_nohup_is_in_force(in_a_long_step):
    process = in_a_long_step(step_ends=True)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 75
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as below nohup
    try:
        process = in_a_long_step(step_ends=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert process.stdout.read() == "SIGTERM\n"


def test_a_second_signal_ends_the_process_at_once(in_a_long_step):
    process = in_a_long_step(step_ends=False)
    process.send_signal(signal.SIGTERM)
    assert "stopping after this step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT


def test_below_torchrun_the_same_signal_passed_on_is_no_second_one(in_a_long_step):
    process = in_a_long_step(step_ends=True, TORCHELASTIC_RUN_ID="none")
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 75


@pytest.mark.parametrize("skew", [-7200.0, 0.0, 7200.0])
def test_the_age_of_a_stop_file_is_by_the_clock_of_its_file_system(tmp_path, monkeypatch, skew):
    """`skew`: of the file server's clock. A file from before the run does not apply, one from within it does."""
    file, server = tmp_path / "STOP", stop._file_system_time
    monkeypatch.setattr(stop, "_file_system_time", lambda folder: server(folder) + skew)
    for age, applies in ((100, False), (30, True)):
        monkeypatch.setattr(StopRequests, "_asks_since", time.monotonic() - 60)
        file.touch()
        made = time.time() + skew - age
        os.utime(file, (made, made))
        with StopRequests(tmp_path, None, is_first_rank=True).listening():
            assert file.exists() == applies
    assert [path.name for path in tmp_path.iterdir()] == ["STOP"]


def test_an_evaluation_is_not_part_of_a_step(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("orpo_dist.run.stop.time.monotonic", lambda: now[0])
    requests = StopRequests(tmp_path, 3600.0, is_first_rank=False)
    requests.steps_begin()
    for seconds, done in (
        (2, requests.step_ends),
        (500, requests.not_a_step),
        (3, requests.step_ends),
        (70, lambda: requests.saved(70.0)),
    ):
        now[0] += seconds
        done()
    assert (requests._longest_step, requests._longest_save) == (3, 70)
