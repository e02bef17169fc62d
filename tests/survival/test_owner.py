"""Two starts in one folder, as real processes: the second is refused and removes nothing of the first."""

import time

import pytest

from benchmarks.kill_campaign import START_SECONDS, Run, make_inputs, newest
from orpo_dist.run.checkpoint import checkpoint_folders, verify

LONG = {"max_steps": 5000, "save_steps": 2, "eval_strategy": "no", "dataset_test_split": None, "logging_steps": 50}


@pytest.mark.topology
@pytest.mark.parametrize("topology", ["plain", "ddp"])
def test_the_second_start_is_refused_while_the_first_saves(tmp_path, topology):
    make_inputs(tmp_path)
    output = tmp_path / "run"
    first = Run(tmp_path, output, topology, changes=LONG)
    deadline = time.monotonic() + START_SECONDS
    while newest(output) < 4:
        assert first.process.poll() is None and time.monotonic() < deadline, first.text()[-3000:]
        time.sleep(0.05)
    second = Run(tmp_path, output, topology, launcher="" if topology == "plain" else "orpo-dist", changes=LONG)
    code = second.wait(START_SECONDS)
    told = (tmp_path / "run.txt").read_text(errors="replace")
    assert code == 2, told[-3000:]
    assert f"orpo-dist: error: Another run trains in {output}: process " in told
    before = newest(output)
    while newest(output) < before + 6:
        assert first.process.poll() is None and time.monotonic() < deadline, first.text()[-3000:]
        time.sleep(0.05)
    first.process.terminate()
    first.wait(START_SECONDS)
    for folder in checkpoint_folders(output):
        verify(folder)
    assert not (output / ".owner.json").exists()
