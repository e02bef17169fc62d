"""The example runs, says what it promises, and computes what the package computes."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from orpo_dist.loss import Objective, PairScores, log1mexp, orpo_loss
from orpo_dist.packing.collate import PackedCollator

EXAMPLE = Path(__file__).parents[2] / "examples" / "orpo_in_80_lines.py"


@pytest.fixture(scope="module")
def example():
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


@pytest.fixture
def model(example):
    torch.manual_seed(1)
    return example.Model()


def test_it_runs_and_its_margin_grows():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True)
    assert "packed = padded, with 22 tokens instead of 36" in done.stdout
    steps = re.findall(r"step +(\d+): loss ([\d.]+), margin ([+-][\d.]+)", done.stdout)
    assert [int(step) for step, _, _ in steps] == [0, 10, 20, 30]
    losses, margins = ([float(row[column]) for row in steps] for column in (1, 2))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 5
    assert margins == sorted(margins) and margins[-1] > margins[0] + 1


def test_its_row_is_the_collators(example):
    (ids, positions, _), (rows, targets, _) = example.pack(example.PAIRS)
    pairs = [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "weight": 1.0, "index": i}
        for i, (p, c, r) in enumerate(example.PAIRS)
    ]
    batch = PackedCollator(prefix_sharing=True, nll_scope="sequence")(pairs)
    assert ids.tolist() == batch["input_ids"][0].tolist()
    assert positions.tolist() == batch["position_ids"][0].tolist()
    assert rows.tolist() == batch["orpo_layout"].rows.tolist()
    assert targets.tolist() == batch["orpo_layout"].targets.tolist()


def test_who_sees_whom(example):
    # P P C R R: the second token of R sees P and R and not C, C does not see R
    (_, positions, sees), _ = example.pack([([5, 6], [7], [8, 9])])
    assert positions.tolist() == [0, 1, 2, 2, 3]
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_packed_and_padded_have_the_same_gradients(example, model):
    def gradients(logps):
        return torch.autograd.grad(example.orpo(*logps(model, example.PAIRS))[0], list(model.parameters()))

    for ours, theirs in zip(gradients(example.packed_logps), gradients(example.padded_logps), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_its_loss_is_the_packages(example, model):
    sums, counts = example.padded_logps(model, example.PAIRS)
    chosen, rejected = (sums / counts)[:, 1:].unbind(1)
    tokens = counts[:, :2].sum(1)
    zeros = torch.zeros(len(sums))
    scores = PairScores(chosen, rejected, -sums[:, :2].sum(1), tokens, zeros, zeros, torch.ones(len(sums)))
    expected = orpo_loss(scores, Objective(beta=example.BETA), tokens.sum(), len(sums))
    torch.testing.assert_close(example.orpo(sums, counts)[0], expected)
    x = torch.tensor([-1e-4, -0.5, -0.7, -30.0])
    torch.testing.assert_close(example.log1mexp(x), log1mexp(x))
