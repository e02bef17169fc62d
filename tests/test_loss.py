import math

import pytest
import torch
from trl.experimental.orpo.orpo_trainer import log1mexp as trl_log1mexp

from orpo_dist.loss import Objective, PairScores, log1mexp, log_odds, metrics_of, orpo_loss, pair_sums, preference


def scores(chosen, rejected, nll_sum=None, nll_tokens=None, weight=None):
    chosen, rejected = torch.as_tensor(chosen), torch.as_tensor(rejected)
    ones = torch.ones_like(chosen)
    return PairScores(
        chosen_logps=chosen,
        rejected_logps=rejected,
        nll_sum=ones * 3 if nll_sum is None else torch.tensor(nll_sum),
        nll_tokens=ones * 2 if nll_tokens is None else torch.tensor(nll_tokens),
        chosen_logits=ones * 0.5,
        rejected_logits=ones * 0.25,
        weight=ones if weight is None else torch.tensor(weight),
    )


def test_loss_of_one_pair_by_hand():
    # chosen: probability 1/2 per token, odds 1; rejected: 1/4, odds 1/3. log odds ratio = log 3.
    pair = scores([math.log(0.5)], [math.log(0.25)], nll_sum=[2 * math.log(2)], nll_tokens=[2.0])
    assert log_odds(pair.chosen_logps, pair.rejected_logps).item() == pytest.approx(math.log(3), rel=1e-6)
    # logsigmoid(log 3) = log(3/4); nll per token = log 2
    loss = orpo_loss(pair, Objective(beta=0.1), tokens=2, pairs=1)
    assert loss.item() == pytest.approx(math.log(2) - 0.1 * math.log(0.75), rel=1e-6)


def test_label_smoothing_by_hand():
    odds = torch.tensor([math.log(3)])
    # sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4
    assert preference(odds, 0.2).item() == pytest.approx(0.8 * math.log(0.75) + 0.2 * math.log(0.25), rel=1e-6)


def test_log1mexp_equals_its_definition_and_trl():
    x = torch.tensor([-40.0, -5.0, -1.0, -0.7, -0.69, -0.1, -1e-3, -1e-6], dtype=torch.float64)
    exact = torch.tensor([math.log(-math.expm1(v)) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x), exact, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(log1mexp(x), trl_log1mexp(x), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_for_every_log_probability(dtype):
    values = [0.0, -0.0, -1e-45, -1e-12, -1e-8, -1e-7, -1e-4, -0.6931472, -0.6931471, -1.0, -20.0, -90.0, -1e4, -1e30]
    for chosen in values:
        for rejected in values:
            c = torch.tensor([chosen], dtype=dtype, requires_grad=True)
            r = torch.tensor([rejected], dtype=dtype, requires_grad=True)
            loss = orpo_loss(scores(c, r), Objective(), tokens=2, pairs=1)
            loss.backward()
            assert loss.isfinite() and c.grad.isfinite() and r.grad.isfinite(), (chosen, rejected)


def test_trls_log1mexp_has_nan_gradients_where_ours_are_finite():
    x = torch.tensor([0.0], requires_grad=True)
    trl_log1mexp(x).backward()
    assert not x.grad.isfinite()
    x.grad = None
    log1mexp(x).backward()
    assert x.grad.isfinite()


def test_gradient_of_the_odds_agrees_with_autograd_in_float64():
    c = torch.tensor([-0.3, -2.0, -1e-3], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([-1.1, -0.2, -4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_odds, (c, r), eps=1e-8, atol=1e-5)


def test_half_precision_is_computed_in_float32():
    c, r = torch.tensor([-0.5], dtype=torch.bfloat16), torch.tensor([-1.0], dtype=torch.bfloat16)
    assert log_odds(c, r).dtype == torch.float32


def test_shares_of_any_cut_add_up_to_the_loss_of_the_whole():
    torch.manual_seed(0)
    chosen, rejected = -torch.rand(7, dtype=torch.float64), -torch.rand(7, dtype=torch.float64)
    nll, tokens = torch.rand(7, dtype=torch.float64) * 9, torch.arange(3, 10, dtype=torch.float64)

    def part(where):
        return PairScores(
            chosen[where], rejected[where], nll[where], tokens[where], nll[where], nll[where], torch.ones(len(where))
        )

    objective = Objective(beta=0.3, label_smoothing=0.1)
    whole = orpo_loss(part(list(range(7))), objective, tokens.sum(), 7)
    for cut in ([[0, 1, 2, 3], [4, 5, 6]], [[i] for i in range(7)], [[6, 0], [1, 5, 2, 4], [3]]):
        shares = sum(orpo_loss(part(where), objective, tokens.sum(), 7) for where in cut)
        torch.testing.assert_close(shares, whole, rtol=1e-12, atol=0)
        sums = sum(pair_sums(part(where), objective) for where in cut)
        assert metrics_of(sums.tolist(), objective)["loss"] == pytest.approx(whole.item(), rel=1e-12)


def test_a_filler_counts_nothing():
    pair = scores([-0.5, -0.1], [-1.0, -0.2], nll_sum=[3.0, 50.0], nll_tokens=[2.0, 7.0], weight=[1.0, 0.0])
    alone = scores([-0.5], [-1.0], nll_sum=[3.0], nll_tokens=[2.0])
    objective = Objective()
    assert orpo_loss(pair, objective, 2, 1) == orpo_loss(alone, objective, 2, 1)
    assert torch.equal(pair_sums(pair, objective), pair_sums(alone, objective))


def test_metrics_by_hand():
    objective = Objective(beta=0.1)
    two = scores([-0.5, -2.0], [-1.0, -1.0], nll_sum=[4.0, 6.0], nll_tokens=[4.0, 4.0])
    metrics = metrics_of(pair_sums(two, objective).tolist(), objective)
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["rewards/margins"] == pytest.approx(0.1 * (-1.25 + 1.0))
    assert metrics["nll_loss"] == pytest.approx(10 / 8)
    assert metrics["logps/chosen"] == pytest.approx(-1.25)
