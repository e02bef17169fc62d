"""Sums that stay on the device until they are logged, by hand."""

import pytest
import torch

from orpo_dist.loss import SUM_NAMES, Objective
from orpo_dist.training.metrics import MetricSums


class TwoRanks:
    """An accelerator whose other rank has the same sums."""

    device = torch.device("cpu")

    @staticmethod
    def reduce(tensor, reduction):
        assert reduction == "sum"
        return 2 * tensor


def sums(**values):
    return torch.tensor([float(values.get(name, 0)) for name in SUM_NAMES])


def test_metrics_over_all_ranks_since_the_last_line():
    metrics = MetricSums()
    one = sums(pairs=1, nll_tokens=4, nll_sum=8, preference=-1)
    metrics.add(one)
    metrics.add(sums(pairs=3, nll_tokens=6, nll_sum=7, preference=-5))
    assert one.tolist() == sums(pairs=1, nll_tokens=4, nll_sum=8, preference=-1).tolist()  # not added to
    logged = metrics.drain(TwoRanks, Objective(beta=0.5))
    # NLL 15 / 10 tokens; preference -6 / 4 pairs; the ranks cancel
    assert logged["nll_loss"] == pytest.approx(1.5)
    assert logged["loss"] == pytest.approx(1.5 + 0.5 * 1.5)
    assert metrics.drain(TwoRanks, Objective()) == {}


def test_a_checkpoint_keeps_what_is_not_logged_yet():
    metrics, resumed = MetricSums(), MetricSums()
    assert metrics.state() is None
    resumed.load(None, TwoRanks.device)
    metrics.add(sums(pairs=2, nll_tokens=4, nll_sum=8))
    resumed.load(metrics.state(), TwoRanks.device)
    assert resumed.drain(TwoRanks, Objective()) == metrics.drain(TwoRanks, Objective())
