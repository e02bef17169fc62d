"""Each signal, below each launcher: stop, save, resume to the same end. srun's turn is in the tests of the cluster."""

import json
import signal
import time

import psutil
import pytest

from benchmarks.kill_campaign import START_SECONDS, STEPS, Run, make_inputs, newest, same_losses, same_weights

SIGNALS = {signal.SIGTERM: 2, signal.SIGINT: 5, signal.SIGUSR1: 8}  # sent when this checkpoint is there


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    make_inputs(folder)
    return folder


@pytest.mark.topology
@pytest.mark.parametrize(("topology", "launcher"), [("plain", "python"), ("ddp", "torchrun"), ("zero2", "accelerate")])
def test_every_signal_stops_saves_and_resumes_to_the_same_end(folder, topology, launcher):
    """The signal goes to the launcher alone. torchrun and accelerate launch do not know SIGUSR1 and die of it; the
    ranks notice."""
    whole, stopped = folder / f"{topology}-whole", folder / f"{topology}-stopped"
    assert Run(folder, whole, topology).wait(START_SECONDS) == 0
    for number, step in SIGNALS.items():
        run = Run(folder, stopped, topology)
        deadline = time.monotonic() + START_SECONDS
        while newest(stopped) < step:
            assert run.process.poll() is None and time.monotonic() < deadline, run.text()[-3000:]
            time.sleep(0.01)
        processes = run.everything()
        run.process.send_signal(number)
        code = run.wait(START_SECONDS)
        _, alive = psutil.wait_procs(processes, timeout=START_SECONDS)
        assert not alive
        told = run.text()
        assert f"orpo-dist: Stopped at step {newest(stopped)}" in told, told[-3000:]
        assert not (stopped / "run_summary.json").exists()
        assert step < newest(stopped) < STEPS
        assert (stopped / f"checkpoint-{newest(stopped)}" / "complete.json").is_file()
        if launcher == "python":
            assert code == 75
            assert f"({number.name})" in told
        elif number != signal.SIGUSR1:
            assert code != 0
    last = Run(folder, stopped, topology)
    assert last.wait(START_SECONDS) == 0, last.text()[-3000:]
    assert json.loads((stopped / "run_summary.json").read_text())["steps"] == STEPS
    assert same_weights(whole, stopped)
    assert same_losses(whole, stopped)
