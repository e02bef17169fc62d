"""The launcher inside this process: what its processes get, what is left behind, and the exit code."""

import logging
import os
import signal
import sys
import threading

import pytest

from orpo_dist.cluster.processes import run_launcher

# Rank 1 ends as told, or asks the launcher to stop once both ranks run.
PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
open(f"{rank}.txt", "w").write(os.environ["SECRET"])
if sys.argv[1] == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    if rank == 1:
        os.kill(os.getppid(), signal.SIGUSR1)
    time.sleep(60)
sys.exit(int(sys.argv[1]) if rank == 1 else 0)
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "SECRET", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return lambda how: run_launcher([*command, "program.py", how], {"SECRET": "hush"})


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


def test_a_signal_reaches_the_processes(launch):
    assert launch("wait") == 75


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
