"""What rank 0 does after the training may take longer than a collective may; if it fails, the run fails."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks.kill_campaign import REPOSITORY, START_SECONDS, make_inputs, recipe

CHANGES = {"max_steps": 2, "ddp_timeout": 10, "eval_strategy": "no", "dataset_test_split": None, "merge_adapter": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acts")
    make_inputs(folder)
    return folder


def run(folder: Path, how: str, act: str) -> tuple[int, str, Path]:
    output = folder / f"{how}-{act}"
    path = folder / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, output, "lora") | CHANGES))
    script = [str(Path(__file__).parent / "lingering.py"), how, act, "train", str(path)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "ORPO_DIST_CACHE": str(folder / "cache")}
    done = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, timeout=START_SECONDS)
    return done.returncode, done.stdout + done.stderr, output


@pytest.mark.topology
@pytest.mark.parametrize("act", ["save", "merge", "card"])
def test_the_other_ranks_wait_for_as_long_as_it_takes(folder, act):
    code, told, output = run(folder, "slow", act)
    assert code == 0, told[-3000:]
    assert (output / "run_summary.json").is_file() and (output / "README.md").is_file()
    assert (output / "merged" / "model.safetensors").is_file()


@pytest.mark.topology
@pytest.mark.parametrize("act", ["save", "merge", "card"])
def test_an_error_ends_every_rank_and_the_run_has_not_finished(folder, act):
    began = time.monotonic()
    code, told, output = run(folder, "fail", act)
    assert code != 0 and "rank 0 of 2" in told and "RuntimeError: broken on purpose" in told, told[-3000:]
    assert not (output / "run_summary.json").exists()
    assert time.monotonic() < began + 300
