"""The short kill campaign: `make test-kill`. The long one is benchmarks/kill_campaign.py itself."""

import json
import subprocess
import sys

import pytest

from benchmarks.kill_campaign import REPOSITORY


@pytest.mark.kill
def test_killed_runs_end_like_those_that_nobody_touched(tmp_path):
    out = tmp_path / "kills.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "kill_campaign.py"), "--seed=7", f"--out={out}"]
    done = subprocess.run(
        [*command, "--topologies=plain:2,lora:1,zero2:1,zero3:1,fsdp2:1"], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    summary = json.loads(out.read_text())
    assert summary["kills"] == 6
    assert summary["equal_weights"] and summary["equal_losses"]
