"""Metrics of a whole set, against hand-made log-probabilities."""

import math

import pytest
import torch
from accelerate import Accelerator

from orpo_dist.loss import Objective, PairScores, log_odds
from orpo_dist.packing.sampler import FILLER
from orpo_dist.training.evaluation import EvaluationPass, with_prefix


def scores(chosen, rejected, weight):
    chosen, rejected, weight = (torch.tensor(values, dtype=torch.float32) for values in (chosen, rejected, weight))
    ones = torch.ones_like(chosen)
    fields = {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "nll_sum": 2 * ones,
        "nll_tokens": 4 * ones,
        "weight": weight,
    }
    rest = {name: ones for name in PairScores.__dataclass_fields__ if name not in fields}
    return PairScores(**fields, **rest)


def test_each_pair_counts_once_whatever_its_batch():
    objective = Objective(beta=0.5)
    one, many = EvaluationPass(objective, keeps_pairs=True), EvaluationPass(objective, keeps_pairs=True)
    chosen, rejected = [-1.0, -0.5, -2.0], [-1.5, -0.25, -3.0]
    one.add(scores(chosen, rejected, [1.0, 1.0, 1.0]), [2, 0, 1])
    many.add(scores(chosen[:1], rejected[:1], [1.0]), [2])
    many.add(scores([*chosen[1:], -7.0], [*rejected[1:], -7.0], [1.0, 1.0, 0.0]), [0, 1, FILLER])
    accelerator = Accelerator(cpu=True)
    ours, theirs = one.metrics(accelerator), many.metrics(accelerator)
    assert ours == pytest.approx(theirs)
    assert ours["rewards/accuracies"] == pytest.approx(2 / 3)
    assert ours["rewards/margins"] == pytest.approx(0.5 * (0.5 - 0.25 + 1.0) / 3)
    odds = [log_odds(torch.tensor(c), torch.tensor(r)).item() for c, r in zip(chosen, rejected, strict=True)]
    assert ours["log_odds_chosen"] == pytest.approx(sum(odds) / 3, rel=1e-5)
    assert math.isfinite(ours["loss"])
    predicted = many.predictions()
    assert predicted.predictions[0].tolist() == [-0.5, -2.0, -1.0]  # in the order of the set, without the filler
    assert predicted.predictions[1].tolist() == [-0.25, -3.0, -1.5]
    assert predicted.label_ids.tolist() == [0, 0, 0]


def test_pairs_are_kept_only_when_asked_for():
    evaluation = EvaluationPass(Objective(), keeps_pairs=False)
    evaluation.add(scores([-1.0], [-2.0], [1.0]), [0])
    assert evaluation.predictions() is None


def test_prefix():
    assert with_prefix({"loss": 1, "eval_own": 2}, "eval") == {"eval_loss": 1, "eval_own": 2}


def test_a_rank_that_shares_its_pairs_gives_no_predictions():
    silent = EvaluationPass(Objective(), keeps_pairs=True, speaks_for_pairs=False)
    silent.add(scores([-1.0], [-1.5], [0.0]), [0])
    predicted = silent.predictions()
    assert predicted is not None and [len(side) for side in predicted.predictions] == [0, 0]
