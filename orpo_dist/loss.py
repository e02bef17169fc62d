"""The ORPO objective as pure functions of log-probabilities, independent of models, devices and ranks.

For a global batch G (every rank, every micro-batch of one optimizer step), with m the mean log-probability of a
completion's tokens:

    L        = sum_nll(G) / tokens(G) - beta * mean over pairs of G of logsigmoid(log_odds)
    log_odds = (m_chosen - m_rejected) - (log1mexp(m_chosen) - log1mexp(m_rejected))

Hong, Lee, Thorne 2024 (https://arxiv.org/abs/2403.07691), equations 4, 6 and 7. A micro-batch contributes its share of
both sums, so the shares of all micro-batches and ranks sum to L for any split of G.

Shape legend: B pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LN_2 = 0.6931471805599453


@dataclass(frozen=True)
class PairScores:
    """The scores of B pairs from one forward pass.

    chosen_logps, rejected_logps: (B,) mean log-probability of the completion's tokens, in nats.
    nll_sum: (B,) minus the sum of log-probabilities over the tokens of the NLL term.
    nll_tokens: (B,) number of those tokens.
    chosen_logits, rejected_logits: (B,) mean logit over the rows that score the completion (for the log only).
    weight: (B,) 1 for a pair, 0 for the filler of an empty bin.
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    nll_sum: torch.Tensor
    nll_tokens: torch.Tensor
    chosen_logits: torch.Tensor
    rejected_logits: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """The options of the loss."""

    beta: float = 0.1
    label_smoothing: float = 0.0


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0, with finite values and gradients everywhere.

    `torch.where` alone is not enough: the gradient of the branch that was not selected is multiplied by zero, and
    0 * inf is NaN. Each branch therefore gets a safe constant where the other one is selected. Near 0, x is clamped to
    -eps. Branch point ln 2: Maechler 2012,
    https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf
    """
    near_zero = x > -LN_2
    near = torch.where(near_zero, x, -LN_2).clamp(max=-torch.finfo(x.dtype).eps)
    far = torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def log_odds(chosen_logps: torch.Tensor, rejected_logps: torch.Tensor) -> torch.Tensor:
    """(B,) log of the odds ratio of the chosen over the rejected completion, in at least float32."""
    dtype = torch.promote_types(chosen_logps.dtype, torch.float32)
    chosen, rejected = chosen_logps.to(dtype), rejected_logps.to(dtype)
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def preference(odds: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """(B,) log-likelihood of the preference when a share `label_smoothing` of the labels is flipped (as in DPO)."""
    if label_smoothing == 0:
        return F.logsigmoid(odds)
    return (1 - label_smoothing) * F.logsigmoid(odds) + label_smoothing * F.logsigmoid(-odds)


def orpo_loss(
    scores: PairScores, objective: Objective, tokens: torch.Tensor | float, pairs: torch.Tensor | float
) -> torch.Tensor:
    """() share of these B pairs in the loss of their global batch.

    tokens, pairs: number of NLL tokens and pairs in the whole global batch, over all ranks and micro-batches.
    """
    likelihood = preference(log_odds(scores.chosen_logps, scores.rejected_logps), objective.label_smoothing)
    nll = (scores.weight * scores.nll_sum).sum() / tokens
    return nll - objective.beta * (scores.weight * likelihood).sum() / pairs


SUM_NAMES = (
    "pairs",
    "nll_tokens",
    "nll_sum",
    "preference",
    "log_odds_ratio",
    "log_odds_chosen",
    "logps/chosen",
    "logps/rejected",
    "rewards/accuracies",
    "logits/chosen",
    "logits/rejected",
)


def pair_sums(scores: PairScores, objective: Objective) -> torch.Tensor:
    """(len(SUM_NAMES),) weighted sums over the pairs, additive over micro-batches and ranks. No gradient, no sync."""
    with torch.no_grad():
        odds = log_odds(scores.chosen_logps, scores.rejected_logps)
        per_pair = (
            torch.ones_like(odds),
            scores.nll_tokens,
            scores.nll_sum,
            preference(odds, objective.label_smoothing),
            F.logsigmoid(odds),
            odds,
            scores.chosen_logps,
            scores.rejected_logps,
            scores.chosen_logps > scores.rejected_logps,
            scores.chosen_logits,
            scores.rejected_logits,
        )
        return torch.stack([(scores.weight * x.to(odds.dtype)).sum() for x in per_pair])


def metrics_of(sums: list[float], objective: Objective) -> dict[str, float]:
    """TRL's metrics of a set of pairs from its sums (host numbers, in the order of SUM_NAMES).

    `loss` is the objective over the whole set. `logits/*` average over the rows that score completions; TRL's average
    over padding and prompts too.
    """
    total = dict(zip(SUM_NAMES, sums, strict=True))
    pairs, tokens = total["pairs"], total["nll_tokens"]
    mean = {name: value / pairs for name, value in total.items()}
    nll = total["nll_sum"] / tokens
    beta = objective.beta
    return {
        "loss": nll - beta * mean["preference"],
        "rewards/chosen": beta * mean["logps/chosen"],
        "rewards/rejected": beta * mean["logps/rejected"],
        "rewards/accuracies": mean["rewards/accuracies"],
        "rewards/margins": beta * (mean["logps/chosen"] - mean["logps/rejected"]),
        "logps/chosen": mean["logps/chosen"],
        "logps/rejected": mean["logps/rejected"],
        "logits/chosen": mean["logits/chosen"],
        "logits/rejected": mean["logits/rejected"],
        "nll_loss": nll,
        "log_odds_ratio": mean["log_odds_ratio"],
        "log_odds_chosen": mean["log_odds_chosen"],
    }
