"""A rank that dies or hangs takes the run down in bounded time, and the last lines say which, where and why."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.kill_campaign import REPOSITORY, make_inputs, newest, recipe

BOUND = 1500  # seconds, on a machine that others use too


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deaths")
    make_inputs(folder)
    return folder


@pytest.fixture
def harmed(folder):
    """Run two ranks below torchrun of which rank 1 comes to harm; (exit code, last lines, output folder)."""

    def run(harm: str, **changes):
        output = folder / harm
        path = folder / f"{harm}.yaml"
        path.write_text(yaml.safe_dump({**recipe(folder, output, "ddp"), **changes}))
        script = [str(Path(__file__).parent / "dying.py"), harm, "train", str(path)]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment["ORPO_DIST_CACHE"] = str(folder / "cache")
        done = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, timeout=BOUND)
        return done.returncode, done.stderr, output

    return run


@pytest.mark.topology
def test_an_exception_names_rank_host_and_reason(harmed):
    code, told, output = harmed("raise")
    assert code != 0
    assert f"orpo-dist: rank 1 of 2 on {socket.gethostname()} failed: RuntimeError: broken on purpose" in told
    summary = told[told.index("Root Cause (first observed failure)") :]  # torchrun's last lines
    assert "rank      : 1" in summary and "exitcode  : 1" in summary and "broken on purpose" in summary
    assert newest(output) == 2


@pytest.mark.topology
def test_a_killed_rank_is_named_with_its_signal(harmed):
    code, told, output = harmed("kill")
    assert code != 0
    summary = told[told.index("Root Cause (first observed failure)") :]
    assert "rank      : 1" in summary and "exitcode  : -9" in summary and "SIGKILL" in summary
    assert newest(output) == 2


@pytest.mark.topology
def test_a_hang_ends_after_the_timeout_which_does_not_count_before_the_first_step(harmed):
    code, told, output = harmed("hang", ddp_timeout=10)
    assert code != 0
    assert "has waited longer than 10 s in step 3 (ddp_timeout). All ranks are alive: rank " in told
    assert newest(output) == 2  # rank 1 slept through twice the timeout before its first step


@pytest.mark.topology
def test_out_of_memory_on_one_rank_is_told_by_that_rank(harmed):
    code, told, output = harmed("oom")
    assert code != 0
    assert "orpo-dist: error (rank 1): Out of memory in step 3. The longest of" in told
    assert "exitcode  : 2" in told
    assert newest(output) == 2


@pytest.mark.topology
def test_a_loss_that_is_no_number_on_one_rank_stops_the_step_on_all(harmed):
    code, told, output = harmed("nan", max_nonfinite_steps=2)
    assert code != 0 and "exitcode  : 3" in told and "nonfinite_steps.jsonl lists their pairs" in told
    events = [json.loads(line) for line in (output / "nonfinite_steps.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [3, 4]
    assert all(event["loss"] == "inf" and event["grad_norm"] == "nan" for event in events)
    # All pairs of the global batch: step 3 is the last of the epoch (22 pairs, 8 per step), step 4 a whole one.
    assert [len({pair["index"] for pair in event["pairs"]}) for event in events] == [6, 8]
