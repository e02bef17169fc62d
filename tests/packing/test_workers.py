"""Workers of a data loader among signals, in real processes."""

import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from orpo_dist.packing.loader import PairDataLoader
from orpo_dist.packing.workers import LEFT_TO_THE_RANK, begin_worker, signals_held


class Rows:
    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return index


def loader(seconds=0.02):
    return PairDataLoader(Rows(seconds), batch_size=1, num_workers=2, worker_init_fn=begin_worker, prefetch_factor=1)


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", LEFT_TO_THE_RANK)
def test_workers_ignore_what_asks_a_run_to_stop(number):
    got = []
    for batch in loader():
        got += batch.tolist()
        if len(got) in (1, 5, 20):  # the first: the workers may just have begun
            pids = [str(worker.pid) for worker in workers_of(psutil.Process())]
            # From another process: SIGTERM of their own rank ends them.
            subprocess.run(["kill", f"-{number.value}", *pids], check=True)
    assert got == list(range(40))


def test_workers_end_when_their_rank_is_done_with_them():
    batches = iter(loader(seconds=30))  # busy for longer than the test may take
    workers = workers_of(psutil.Process())
    assert len(workers) == 2
    began = time.monotonic()
    batches._shutdown_workers()  # waits five seconds for each, then sends SIGTERM
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive and time.monotonic() < began + 25


RANK = """
from tests.packing.test_workers import loader
for batch in loader(seconds={seconds}):
    print("going", flush=True)
"""


@pytest.mark.parametrize("seconds", [0.02, 60], ids=["idle", "busy"])
def test_workers_end_with_a_rank_that_is_killed(seconds):
    rank = subprocess.Popen([sys.executable, "-c", RANK.format(seconds=seconds)], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(workers := workers_of(psutil.Process(rank.pid))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    rank.kill()
    rank.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_signals_held_back_reach_their_process_afterwards():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("USR1"))
    try:
        with signals_held():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # os.kill's may go to another thread
            assert not heard
        assert heard == ["USR1"]
    finally:
        signal.signal(signal.SIGUSR1, before)
