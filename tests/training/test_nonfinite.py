"""Losses that stand out, and steps that are not applied."""

import json
import math

import pytest
from accelerate import PartialState

from orpo_dist.errors import NonFiniteRun
from orpo_dist.training.nonfinite import LossHistory, NonFiniteSteps


@pytest.fixture(autouse=True)
def state():
    PartialState()  # accelerate's loggers ask for it


def test_a_spike_needs_twenty_losses_before_it():
    history = LossHistory()
    assert [history.add(2.0) for _ in range(19)] == [None] * 19
    assert history.add(100.0) is None
    assert history.add(2.0) is None


def test_a_spike_is_told_with_the_usual_loss():
    history = LossHistory()
    for n in range(40):
        history.add(2.0 + 0.01 * (-1) ** n)  # mean 2, deviation 0.01
    assert history.add(2.9) is None  # beyond 6 deviations, below 1.5 times the mean
    assert history.add(9.0) == pytest.approx((40 * 2 + 2.9) / 41)


def test_a_loss_that_is_not_a_number_is_not_remembered():
    history = LossHistory()
    assert history.add(math.nan) is None and history.add(math.inf) is None
    assert len(history.losses) == 0


@pytest.fixture
def steps(tmp_path):
    return NonFiniteSteps(tmp_path / "run", 3, lambda index: {"row": 10 * index}, writes=True)


def test_pairs_of_a_bad_step_are_written(steps, tmp_path):
    steps.bad(4, math.nan, math.inf, [2, 5])
    (line,) = (tmp_path / "run" / "nonfinite_steps.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 4,
        "loss": "nan",
        "grad_norm": "inf",
        "pairs": [{"index": 2, "row": 20}, {"index": 5, "row": 50}],
    }


def test_a_good_step_between_them_starts_the_count_again(steps):
    steps.bad(1, math.nan, 1.0, [])
    steps.bad(2, math.nan, 1.0, [])
    steps.good()
    steps.bad(4, math.nan, 1.0, [])
    steps.bad(5, math.nan, 1.0, [])
    with pytest.raises(NonFiniteRun, match="3 steps in a row"):
        steps.bad(6, math.nan, 1.0, [])


def test_spikes_have_a_file_of_their_own_and_other_ranks_write_none(steps, tmp_path):
    steps.spike(7, 9.0, 2.0, [1])
    (line,) = (tmp_path / "run" / "loss_spikes.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 7, "loss": 9.0, "usual_loss": 2.0, "pairs": [{"index": 1, "row": 10}]}
    other = NonFiniteSteps(tmp_path / "other", 3, lambda index: {}, writes=False)
    other.bad(1, math.nan, 1.0, [1])
    assert not (tmp_path / "other").exists()
