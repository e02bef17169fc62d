"""A group of processes that dies is started again, a bounded number of times, and only where that may help."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from orpo_dist.cluster import orphans
from orpo_dist.cluster.peers import Peers
from orpo_dist.cluster.processes import GroupEnd, run_group
from orpo_dist.cluster.restarts import Restarts, run_with_restarts
from orpo_dist.errors import RunStopped
from orpo_dist.run.checkpoint import seal

# Each start takes the next word: what rank 1 does after a step. `5+kill` writes checkpoint-5 before.
PROGRAM = """
import os, pathlib, signal, sys, time
rank, run = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
steps = pathlib.Path(os.environ["ORPO_DIST_STEPS"])
starts = run / f"starts.{rank}"
number = len(starts.read_text().splitlines()) if starts.exists() else 0
with starts.open("a") as file:
    print(" ".join(sys.argv[3:]) or "plain", file=file)
saves, _, how = sys.argv[2].split(",")[number].rpartition("+")
(steps / f"step.{rank}").write_text("7")
if saves and rank == 0:
    (run / f"checkpoint-{saves}").mkdir()
    (run / f"checkpoint-{saves}" / "complete.json").touch()
if rank == 1:
    time.sleep(0.3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "orphan":
        if os.fork() == 0:
            (run / "orphan").write_text(str(os.getpid()))
            signal.pause()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(how))
for _ in range(300):  # torchrun ends rank 1 when this one fails, if need be before its first line
    time.sleep(0.1)
    if how in ("0", "75") and (run / "starts.1").exists() and len((run / "starts.1").read_text().splitlines()) > number:
        break
sys.exit(int(how) if how in ("0", "75") else 1)
"""


@pytest.fixture
def restarted(tmp_path, capfd):
    """Run a group that ends in these ways, one after the other; (exit code, lines about restarts, starts of a rank)."""
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def run(ends: str, limit: int = 3, asked: str = ""):
        def start(resume, restart):
            return run_group([*launch, str(tmp_path / "program.py"), str(tmp_path), ends, *resume])

        code = run_with_restarts(start, limit, tmp_path, asked, Peers({}))
        told = [line for line in capfd.readouterr().err.splitlines() if "restart" in line]
        return code, told, (tmp_path / "starts.1").read_text().splitlines()

    return run


def test_killed_ranks_are_replaced_from_the_newest_checkpoint(restarted):
    code, told, starts = restarted("5+kill,10+segv,0")
    assert code == 0
    assert told == [
        "orpo-dist: restart 1 of 3: rank 1 was killed by SIGKILL at step 7; resuming from checkpoint-5",
        "orpo-dist: restart 2 of 3: rank 1 was killed by SIGSEGV at step 7; resuming from checkpoint-10",
    ]
    assert starts == ["plain", "--resume_from_checkpoint auto", "--resume_from_checkpoint auto"]


@pytest.mark.parametrize("code", [2, 3, 75])
def test_what_a_restart_cannot_help_is_not_restarted(code, restarted):
    assert restarted(str(code)) == (code, [], ["plain"])


def test_the_limit(restarted):
    code, told, starts = restarted("1+kill,2+kill,0", limit=1)
    assert code == 137 and len(starts) == 2
    assert told[-1] == (
        "orpo-dist: rank 1 was killed by SIGKILL at step 7; not restarted: already restarted 1 of 1 times "
        "(--max-restarts)"
    )


def test_no_checkpoint_in_between(restarted):
    code, told, starts = restarted("kill,4+1,1,kill", limit=9)
    assert code == 1 and len(starts) == 3
    assert "no checkpoint yet, starting from the beginning" in told[0]
    assert "resuming from checkpoint-4" in told[1]
    assert told[2].endswith("not restarted: failed twice with no new checkpoint in between (newest: checkpoint-4)")


def test_no_process_outlives_its_group(restarted, tmp_path, monkeypatch):
    monkeypatch.setattr(orphans, "SECONDS_TO_END", 0.5)
    code, told, _ = restarted("orphan,0")
    assert code == 0 and len(told) == 1
    orphan = int((tmp_path / "orphan").read_text())
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE


class StopsInBetween(Peers):
    """A signal comes while the nodes agree."""

    def agree(self, end, decide):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().agree(end, decide)


def test_a_run_that_was_asked_to_stop_is_not_restarted(tmp_path):
    starts = []

    def start(resume, restart):
        starts.append(restart)
        return GroupEnd(137, "rank 0 was killed by SIGKILL")

    before = signal.getsignal(signal.SIGTERM)
    assert run_with_restarts(start, 3, tmp_path, "", StopsInBetween({})) == 137
    assert starts == [0] and signal.getsignal(signal.SIGTERM) == before


def test_a_stop_before_there_are_processes_starts_none(tmp_path):
    """While the launcher's libraries are imported, which takes seconds."""
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "complete.json").touch()

    def start(resume, restart):
        os.kill(os.getpid(), signal.SIGHUP)
        raise AssertionError("it goes on")

    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(RunStopped) as stop:
        run_with_restarts(start, 3, tmp_path, "", Peers({}))
    assert stop.value.code == 75 and "Stopped at step 5 (SIGHUP): saved" in str(stop.value)
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_run_started_from_a_path_goes_on_from_what_it_saved(tmp_path):
    """checkpoint-9 is of an earlier run in the folder, which this one went back behind."""
    for step in (4, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete.json").touch()
    restarts = Restarts(5, tmp_path, str(tmp_path / "checkpoint-4"), tmp_path)
    killed = [GroupEnd(137, "rank 1 was killed by SIGKILL")]
    assert restarts.decide(killed).resume == ()
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "complete.json").touch()
    assert restarts._resume("checkpoint-9") == ["--resume_from_checkpoint", str(tmp_path / "checkpoint-6")]


def test_a_checkpoint_between_two_names_is_one(tmp_path):
    """Killed while checkpoint-5 was replaced, with no other: without it the run would not know where to go on."""
    seal_in = tmp_path / "_saving" / "checkpoint-5"
    for folder in (seal_in, tmp_path / "_deleting-checkpoint-5"):
        folder.mkdir(parents=True)
        seal(folder, 5, 2, {})
    verdict = Restarts(1, tmp_path, "", tmp_path).decide([GroupEnd(137, "rank 0 was killed by SIGKILL")])
    assert verdict.said == "restart 1 of 1: rank 0 was killed by SIGKILL; resuming from checkpoint-5"


def test_one_process_is_replaced_too_and_ends_with_its_launcher(tmp_path):
    """The launcher of a single process is killed: the process gets SIGTERM, which stops a run with a checkpoint."""
    program = (
        "import signal, sys\n"
        "from orpo_dist.cluster import processes\n"
        "processes._one_process([sys.executable, '-c', 'import os, pathlib, signal, sys, time\\n"
        'signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("told").touch(), sys.exit(75)))\\n'
        'pathlib.Path("runs").touch()\\ntime.sleep(60)\'])\n'
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    _until(lambda: (tmp_path / "runs").exists())
    launcher.kill()
    launcher.wait()
    _until(lambda: (tmp_path / "told").exists())


def _until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
