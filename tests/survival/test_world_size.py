"""A run goes on with another number of ranks and the same global batch; ZeRO after a conversion."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import kill_campaign
from benchmarks.kill_campaign import START_SECONDS, Run, make_inputs
from orpo_dist import cli

STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    make_inputs(folder)
    return folder


def run(folder, output, topology, monkeypatch, *, steps, ranks):
    monkeypatch.setattr(kill_campaign, "STEPS", steps)
    monkeypatch.setitem(kill_campaign.PROCESSES, topology, ranks)
    started = Run(folder, output, topology)
    code = started.wait(START_SECONDS)
    return code, started.text()


@pytest.mark.topology
@pytest.mark.parametrize("topology", ["ddp", "zero2", "zero3"])
def test_from_two_ranks_to_one(folder, topology, monkeypatch):
    output = folder / topology
    assert run(folder, output, topology, monkeypatch, steps=3, ranks=2)[0] == 0
    if topology.startswith("zero"):
        code, told = run(folder, output, topology, monkeypatch, steps=STEPS, ranks=1)
        command = f"convert-checkpoint {output / 'checkpoint-3'}"
        assert code != 0 and f"Convert it once, then start again: orpo-dist {command}" in told
        assert cli.main(command.split()) == 0
    if topology == "ddp":  # the plain command, and the reference for all
        code, told = run(folder, output, "plain", monkeypatch, steps=STEPS, ranks=1)
    else:
        code, told = run(folder, output, topology, monkeypatch, steps=STEPS, ranks=1)
    assert code == 0, told[-3000:]
    assert f"Resuming from {output / 'checkpoint-3'}" in told
    whole = folder / "whole"
    if not whole.exists():
        assert run(folder, whole, "plain", monkeypatch, steps=3, ranks=1)[0] == 0
        assert run(folder, whole, "plain", monkeypatch, steps=STEPS, ranks=1)[0] == 0
    ours, theirs = load_file(output / "model.safetensors"), load_file(whole / "model.safetensors")
    for name, weight in theirs.items():
        # AdamW amplifies rounding; a lost state or a wrong step count would show as 1e-4 and more.
        assert torch.linalg.vector_norm(ours[name] - weight) <= 1e-4 * torch.linalg.vector_norm(weight), name
