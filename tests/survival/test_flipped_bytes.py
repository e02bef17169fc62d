"""One byte is flipped in each file of a checkpoint of several processes, one at a time: all are refused.

In one process: tests/training/test_resuming.py.
"""

import re

import pytest

from benchmarks.kill_campaign import START_SECONDS, Run, make_inputs
from orpo_dist.run.checkpoint import MARKER, Damaged, verify

CHANGES = {"eval_strategy": "no", "dataset_test_split": None, "save_total_limit": None, "async_save": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flipped")
    make_inputs(folder)
    return folder


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.topology
@pytest.mark.parametrize(
    "topology",
    ["ddp", pytest.param("zero3", marks=pytest.mark.long), pytest.param("fsdp2_sharded", marks=pytest.mark.long)],
)
def test_each_file(folder, topology):
    output = folder / topology
    run = Run(folder, output, topology, changes={**CHANGES, "max_steps": 1})
    assert run.wait(START_SECONDS) == 0, run.text()[-5000:]
    checkpoint = output / "checkpoint-1"
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER and path.stat().st_size]
    assert len(files) > 10
    for path in files:
        at = path.stat().st_size // 2
        flip(path, at)
        refusals = []
        for rank in range(2):
            try:
                verify(checkpoint, rank, 2)
            except Damaged as error:
                refusals.append(str(error))
        assert refusals == [f"{path.relative_to(checkpoint)} is not what was written (its checksum differs)"]
        flip(path, at)
    verify(checkpoint)


@pytest.mark.slow
@pytest.mark.topology
def test_ranks_that_resume_agree(folder):
    output = folder / "resumed"
    first = Run(folder, output, "ddp", changes={**CHANGES, "max_steps": 2})
    assert first.wait(START_SECONDS) == 0, first.text()[-5000:]
    newest = output / "checkpoint-2"
    flip(newest / "optimizer.pt", 5000)
    told = r"optimizer\.pt is not what was written"
    named = Run(folder, output, "ddp", changes={**CHANGES, "max_steps": 3, "resume_from_checkpoint": str(newest)})
    assert named.wait(START_SECONDS) != 0
    assert re.search(rf"checkpoint-2 is not a usable checkpoint: {told}", named.text()), named.text()[-5000:]
    assert re.search(r"exitcode *: 2|exit code 2", named.text()), named.text()[-5000:]
    resumed = Run(folder, output, "ddp", changes={**CHANGES, "max_steps": 3})
    assert resumed.wait(START_SECONDS) == 0, resumed.text()[-5000:]
    assert re.search(rf"Skipping checkpoint-2: {told}", resumed.text())
    assert f"Resuming from {output / 'checkpoint-1'}" in resumed.text()
    for step in (1, 2, 3):
        verify(output / f"checkpoint-{step}")
