"""The short kill campaign: `make test-kill`. KILL_TOPOLOGIES (and KILL_OUT, for its figures) make it another one: that
of 64 kills is `make test-kill-all`."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.kill_campaign import REPOSITORY

SHORT = "plain:2,lora:1,zero2:1,zero3:1,fsdp2:1,plain/async:2,plain/workers:1,plain/last:2"
TOPOLOGIES = os.environ.get("KILL_TOPOLOGIES", SHORT)


@pytest.mark.kill
def test_killed_runs_end_like_those_that_nobody_touched(tmp_path):
    out = os.environ.get("KILL_OUT", str(tmp_path / "kills.json"))
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "kill_campaign.py"), "--seed=7", f"--out={out}"]
    done = subprocess.run(
        [*command, f"--topologies={TOPOLOGIES}"],
        capture_output=True,
        text=True,
        timeout=3000 if TOPOLOGIES == SHORT else None,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    with open(out) as file:
        summary = json.load(file)
    assert summary["kills"] == sum(int(entry.partition(":")[2]) for entry in TOPOLOGIES.split(","))
    assert summary["equal_weights"] and summary["equal_losses"] and summary["finished_runs_unchanged"]
