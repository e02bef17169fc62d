"""Who may train in a folder."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from orpo_dist.errors import UserError
from orpo_dist.run import owner as owners
from orpo_dist.run.owner import OWNER_NAME, Owner, check_owner, owned

HOLDER = """
import sys, time
from pathlib import Path
from orpo_dist.run.owner import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that owns `tmp_path / "run"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"mine\n"
    yield process
    process.kill()
    process.communicate()


def elsewhere(folder) -> Owner:
    """Write the file of an owner on another machine."""
    folder.mkdir(exist_ok=True)
    owner = replace(Owner.this_process(), host="n7", machine="another boot", pid=1, job="812")
    (folder / OWNER_NAME).write_text(json.dumps(asdict(owner)))
    return owner


def test_a_live_process_of_this_machine_refuses_at_once_and_a_dead_one_does_not(holder, tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match=f"Another run trains in .*: process {holder.pid} on "), owned(tmp_path / "run"):
        pass
    holder.send_signal(signal.SIGSTOP)  # held up, not dead
    with pytest.raises(UserError, match="Another run trains"), owned(tmp_path / "run"):
        pass
    assert time.monotonic() < began + 5
    holder.kill()
    holder.wait()
    with owned(tmp_path / "run"):
        check_owner(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_blocks_of_one_process_may_be_nested(tmp_path):
    with owned(tmp_path):
        with owned(tmp_path):
            pass
        assert (tmp_path / OWNER_NAME).exists()
    assert not (tmp_path / OWNER_NAME).exists()


def test_a_process_id_that_is_used_again_is_not_the_owner(tmp_path):
    (tmp_path / OWNER_NAME).write_text(json.dumps(asdict(replace(Owner.this_process(), started=1e9))))
    with owned(tmp_path):
        check_owner(tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_an_owner_of_another_machine_is_alive_while_its_file_changes(tmp_path, monkeypatch, known):
    monkeypatch.setattr(owners, "DEAD_SECONDS", 10.0)
    elsewhere(tmp_path)
    if not known:
        (tmp_path / OWNER_NAME).write_text("{")  # just being written
    stopped = threading.Event()

    def beat():
        while not stopped.wait(1):
            os.utime(tmp_path / OWNER_NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(UserError, match="Another run trains"), owned(tmp_path):
            pass
    finally:
        stopped.set()
        thread.join()
    assert time.monotonic() < began + 9
    with owned(tmp_path):  # it is silent now, for as long as DEAD_SECONDS
        assert time.monotonic() > began + 10


@pytest.mark.parametrize(
    "odd", [{"pid": "7"}, {"pid": -5}, {"pid": 2**70}, {"started": "now"}, {"started": 1e300}, {"job": 3}]
)
def test_a_damaged_file_is_of_an_unknown_process(tmp_path, monkeypatch, odd):
    monkeypatch.setattr(owners, "DEAD_SECONDS", 0.5)
    (tmp_path / OWNER_NAME).write_text(json.dumps({**asdict(Owner.this_process()), **odd}))
    with owned(tmp_path):
        check_owner(tmp_path)


def test_an_owner_that_has_been_silent_for_long_is_not_waited_for(tmp_path):
    elsewhere(tmp_path)
    os.utime(tmp_path / OWNER_NAME, (1e9, 1e9))
    began = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() < began + 5


def test_an_owner_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(owners, "BEAT_SECONDS", 0.1)
    with owned(tmp_path):
        os.utime(tmp_path / OWNER_NAME, (1e9, 1e9))
        time.sleep(1)
        assert (tmp_path / OWNER_NAME).stat().st_mtime > 1e9 + 1


def test_a_run_that_was_taken_over_saves_no_more_and_leaves_the_file(tmp_path):
    with owned(tmp_path):
        elsewhere(tmp_path)
        with pytest.raises(UserError, match="taken over by process 1 of job 812 on n7"):
            check_owner(tmp_path)
    assert json.loads((tmp_path / OWNER_NAME).read_text())["host"] == "n7"


def start(folder, wait, results):
    wait.wait()
    try:
        with owned(folder):
            results.put("owns")
            time.sleep(8)
    except UserError:
        results.put("refused")


@pytest.mark.parametrize("left_behind", [False, True])
def test_of_several_starts_at_once_one_goes_on(tmp_path, left_behind):
    folder = tmp_path / "run"
    if left_behind:
        elsewhere(folder)
        os.utime(folder / OWNER_NAME, (1e9, 1e9))
    context = multiprocessing.get_context("fork")
    wait, results = context.Barrier(4), context.Queue()
    starts = [context.Process(target=start, args=(folder, wait, results)) for _ in range(4)]
    for process in starts:
        process.start()
    said = sorted(results.get(timeout=60) for _ in starts)
    for process in starts:
        process.join()
    assert said == ["owns", "refused", "refused", "refused"]


@pytest.mark.parametrize("place", ["/proc/orpo_x", "file/run"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"Cannot write the run's folder {place}: "), owned(owners.Path(place)):
        pass
