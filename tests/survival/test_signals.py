"""Each signal, below each launcher: stop, save, resume to the same end. srun's turn is in the tests of the cluster."""

import json
import os
import signal
import time
from contextlib import suppress

import psutil
import pytest

from benchmarks.kill_campaign import START_SECONDS, STEPS, Run, make_inputs, newest, same_losses, same_weights
from tests.pair_files import write_pairs

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


PERIOD = 20
LONG = {"max_steps": 5000, "save_steps": PERIOD, "eval_strategy": "no", "dataset_test_split": None, "logging_steps": 50}


def signalled(run: Run, number: signal.Signals, target: str) -> None:
    """To the launcher, to every process (as SLURM and a preemption do), or to the process group (Ctrl-C)."""
    if target == "launcher":
        run.process.send_signal(number)
    elif target == "group":
        os.killpg(run.process.pid, number)
    else:
        for process in run.everything():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def stopped_run(folder, name, topology, launcher, number, target, workers):
    output = folder / name
    # An epoch has three steps: without persistent workers there may be none for a moment.
    changes = {**LONG, "dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    run = Run(folder, output, topology, launcher, changes, own_group=True)
    deadline = time.monotonic() + START_SECONDS
    while newest(output) < PERIOD:
        assert run.process.poll() is None and time.monotonic() < deadline, run.text()[-3000:]
        time.sleep(0.01)
    time.sleep(0.3)
    processes = run.everything()
    loaders = [process for process in processes if process.name().startswith("pt_data")]
    ranks = 1 if topology == "plain" else 2
    assert len(loaders) == workers * ranks, [process.name() for process in processes]
    signalled(run, number, target)
    code = run.wait(START_SECONDS)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    told = run.text()
    assert f"orpo-dist: Stopped at step {newest(output)} ({number.name})" in told, told[-3000:]
    assert "Traceback" not in told or (launcher == "" and topology != "plain")  # torchrun shows one of its own
    assert newest(output) % PERIOD and newest(output) > PERIOD, told[-3000:]
    assert (output / f"checkpoint-{newest(output)}" / "complete.json").is_file()
    return code


@pytest.mark.topology
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("target", ["launcher", "every", "group"])
@pytest.mark.parametrize(("topology", "launcher"), [("plain", "python"), ("ddp", "orpo-dist")])
def test_wherever_a_signal_arrives_a_checkpoint_is_saved(folder, topology, launcher, target, workers):
    numbers = {"launcher": signal.SIGUSR1, "every": signal.SIGTERM, "group": signal.SIGINT}
    name = f"{launcher}-{target}-{workers}"
    assert stopped_run(folder, name, topology, launcher, numbers[target], target, workers) == 75


@pytest.mark.topology
@pytest.mark.parametrize("target", ["launcher", "every", "group"])
@pytest.mark.parametrize(("topology", "number"), [("ddp", signal.SIGTERM), ("zero2", signal.SIGINT)])
def test_below_other_launchers_too(folder, topology, number, target):
    """torchrun and accelerate launch end with 1 whatever their processes end with."""
    code = stopped_run(folder, f"{topology}-{target}", topology, "", number, target, 2)
    assert code != 0


@pytest.mark.topology
@pytest.mark.parametrize(("topology", "launcher"), [("plain", "python"), ("ddp", "orpo-dist"), ("zero3", "")])
def test_a_signal_in_a_long_evaluation_does_not_wait_for_its_end(tmp_path, topology, launcher):
    make_inputs(tmp_path)
    write_pairs(tmp_path / "test.jsonl", 1500, seed=2)
    output = tmp_path / "run"
    changes = {"eval_steps": 2, "save_steps": 100, "logging_steps": 1, "per_device_eval_batch_size": 1}
    run = Run(tmp_path, output, topology, launcher, changes)
    log, deadline = output / "log.jsonl", time.monotonic() + START_SECONDS
    while not (log.exists() and '"step": 2,' in log.read_text()):
        assert run.process.poll() is None and time.monotonic() < deadline, run.text()[-3000:]
        time.sleep(0.02)
    run.process.send_signal(signal.SIGTERM)
    code = run.wait(START_SECONDS)
    told = run.text()
    assert code == 75 or (launcher == "" and code != 0)
    assert f"orpo-dist: Stopped at step 2 (SIGTERM): saved {output / 'checkpoint-2'}" in told, told[-3000:]
    assert (output / "checkpoint-2" / "complete.json").is_file()
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["step"] for event in events if "eval_loss" in event] == [0]
