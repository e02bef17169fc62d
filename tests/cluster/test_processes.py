"""The launcher inside this process: what its processes get, what is left behind, and the exit code."""

import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest

from orpo_dist.cluster.launch import main
from orpo_dist.cluster.processes import first_cause, run_launcher
from orpo_dist.errors import RunStopped
from orpo_dist.run.stop import raising_on_signals

# Rank 1 ends as told, or asks the launcher to stop once both ranks run.
PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
open(f"{rank}.txt", "a").write(os.environ["SECRET"])
if "OMPI_COMM_WORLD_SIZE" in os.environ:
    sys.exit(9)
if sys.argv[1] == "wait":
    number = signal.Signals[sys.argv[2]]
    signal.signal(number, lambda *_: sys.exit(75))
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getppid(), number)
    time.sleep(60)
if sys.argv[1] == "starting":  # it has no handlers yet
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getppid(), signal.Signals[sys.argv[2]])
    time.sleep(60)
if sys.argv[1] == "hup":
    time.sleep(0.5)
    os.kill(os.getppid() if rank else os.getpid(), signal.SIGHUP)
    time.sleep(0.5)
    sys.exit(0)
sys.exit(int(sys.argv[1]) if rank == 1 else 0)
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "SECRET", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "9")  # of the launchers, not of the processes
    monkeypatch.setenv("PET_MAX_RESTARTS", "3")  # torchrun would start again whatever the exit code
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return lambda *how: run_launcher([*command, "program.py", *how], {"SECRET": "hush"})


def settings():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    return dict(os.environ), [signal.getsignal(number) for number in numbers], logger.level


@pytest.mark.parametrize(("code", "lines"), [(0, 0), (1, 1), (2, 0), (75, 0)])
def test_the_exit_code_is_the_processes(code, lines, launch, tmp_path, capfd):
    before = settings()
    assert launch(str(code)) == code
    assert settings() == before
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text() == "hush"
    told = capfd.readouterr().err
    assert "Traceback" not in told and told.count("rank 1 ") == told.count("exit code 1") == lines


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_a_signal_reaches_the_processes(launch, name):
    assert launch("wait", name) == 75


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_processes_that_are_starting_stops_the_run(launch, name):
    assert launch("starting", name) == 75


def test_a_signal_before_there_are_processes_is_not_lost(launch, monkeypatch):
    def launcher(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return lambda: None

    before = settings()
    monkeypatch.setattr("orpo_dist.cluster.processes._launcher", launcher)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(RunStopped, match="SIGTERM"):
            launch("0")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert settings() == before


def test_a_signal_before_a_launcher_has_begun(monkeypatch):
    def begins(argv):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("orpo_dist.cluster.launch._launch", begins)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(RunStopped, match="SIGTERM"):
            main(["recipe.yaml"])
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_a_signal_that_an_import_of_a_launcher_swallows_is_not_lost(launch, monkeypatch):
    def launcher(*_):
        with suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return lambda: None

    monkeypatch.setattr("orpo_dist.cluster.processes._launcher", launcher)
    monkeypatch.setattr("orpo_dist.cluster.processes._forwarding_signals", lambda _: raising_on_signals())
    with pytest.raises(RunStopped, match="SIGTERM"):
        launch("0")


def test_below_nohup_a_closed_terminal_changes_nothing(launch):
    """SIGHUP is ignored there, by the processes too; the launcher must not set a handler of its own."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch("hup") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("ends", "cause"),
    [
        ([(0, 1), (1, -9)], "rank 1 was killed by SIGKILL"),
        ([(0, -15), (3, -11)], "rank 3 was killed by SIGSEGV"),
        ([(2, 1), (0, -15)], "rank 2 ended with exit code 1"),
        ([(0, -15)], "rank 0 was killed by SIGTERM"),
        ([(0, -63)], "rank 0 was killed by signal 63"),
        ([], ""),
    ],
)
def test_the_first_cause(ends, cause):
    assert first_cause(ends) == cause


def test_in_a_thread(launch):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(launch("3")))
    thread.start()
    thread.join()
    assert codes == [3]


def test_accelerates_launcher_of_one_process(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
    environment = {"RANK": "1", "SECRET": "hush"}
    assert run_launcher([*command, "program.py", "3"], environment) == 3
    assert "the training process ended with exit code 3" in capfd.readouterr().err
