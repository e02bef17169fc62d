"""The forward and loss of TRL's ORPOTrainer, for machines where TRL cannot be installed.

Written after `concatenated_forward`, `get_batch_logps`, `odds_ratio_loss` and `get_batch_loss_metrics` of
https://github.com/huggingface/trl/blob/main/trl/experimental/orpo/orpo_trainer.py, including the
conversion of the logits to float32 by accelerate's mixed precision. tests/benchmarks/test_trl_forward.py compares it
with TRL itself.

Shape legend: B pairs, L tokens of the longest row, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100


def concatenated_batch(rows: Sequence[dict[str, Any]], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """2B rows padded on the right, chosen first; labels are IGNORED on prompt and padding."""
    sequences = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in rows]
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.full((len(sequences), width), pad_token_id)
    labels = torch.full_like(input_ids, IGNORED)
    attention_mask = torch.zeros_like(input_ids)
    for i, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        input_ids[i, :length] = torch.tensor(prompt + completion)
        labels[i, len(prompt) : length] = torch.tensor(completion)
        attention_mask[i, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def trl_loss(model: nn.Module, batch: dict[str, torch.Tensor], beta: float) -> tuple[torch.Tensor, dict[str, float]]:
    """() loss, and the metrics that TRL reads on the host in every micro-step."""
    labels, attention_mask = batch["labels"], batch["attention_mask"]
    outputs = model(batch["input_ids"], attention_mask=attention_mask, use_cache=False)
    logits = outputs.logits.float()  # accelerate converts the outputs of a mixed-precision forward
    pairs = logits.shape[0] // 2
    tokens = torch.where(attention_mask == 1, batch["input_ids"], IGNORED)
    nll = F.cross_entropy(
        logits[:pairs, :-1].contiguous().view(-1, logits.shape[-1]), tokens[:pairs, 1:].contiguous().view(-1)
    )
    logps = _mean_logps(logits, labels)
    chosen, rejected = logps[:pairs], logps[pairs:]
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    ratio = F.logsigmoid(log_odds)
    loss = nll - (beta * ratio).mean()
    rewards = beta * chosen.detach(), beta * rejected.detach()
    metrics = {
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).float().mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "logps/chosen": chosen.detach().mean(),
        "logps/rejected": rejected.detach().mean(),
        "logits/chosen": logits[:pairs, :-1].detach().mean(),
        "logits/rejected": logits[pairs:, :-1].detach().mean(),
        "nll_loss": nll.detach(),
        "log_odds_ratio": ratio.detach().mean(),
        "log_odds_chosen": log_odds.detach().mean(),
    }
    return loss, {name: value.item() for name, value in metrics.items()}


def _mean_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(2B,) mean log-probability of each row's labels."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    picked = torch.gather(logits, 2, torch.where(counted, labels, 0)[..., None])[..., 0]
    logps = picked - torch.stack([torch.logsumexp(row, -1) for row in logits])
    return (logps * counted).sum(-1) / counted.sum(-1)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) with the two branches of Maechler's note, as in TRL."""
    near_zero = torch.log(-torch.expm1(x))
    far = torch.log1p(-torch.exp(x))
    return torch.where(x > -0.6931471805599453, near_zero, far)
