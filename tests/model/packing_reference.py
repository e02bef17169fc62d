"""Loss and gradients of a model in either layout, from its full logits: the oracle of the packed layout."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from orpo_dist.loss import Objective, PairScores, orpo_loss
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.layout import PackedLayout
from orpo_dist.packing.padded import PaddedCollator, score_padded

# (P, C, R): prompt longer and shorter than a window of 6, a completion of one token, a prompt of one token
LENGTHS = ((11, 7, 9), (5, 6, 3), (1, 1, 4), (8, 10, 1))


@dataclass(frozen=True)
class Result:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def rows(vocab: int = 97, lengths: tuple = LENGTHS) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    result = []
    for index, split in enumerate(lengths):
        ids = torch.randint(3, vocab, (sum(split),), generator=generator)
        prompt, chosen, rejected = (part.tolist() for part in ids.split(split))
        result.append(
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "weight": 1.0, "index": index}
        )
    return result


def score_packed(logits: torch.Tensor, layout: PackedLayout) -> PairScores:
    """logits: (1, T, V) of a packed row."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = -F.cross_entropy(wide[0, layout.rows], layout.targets, reduction="none")
    chosen, rejected, nll = [], [], []
    for s, part in zip(layout.segments, logps.split([s.scored for s in layout.segments]), strict=True):
        prompt_part, chosen_part, rejected_part = part.split([s.nll_prompt, s.chosen, s.rejected])
        chosen.append(chosen_part.mean())
        rejected.append(rejected_part.mean())
        nll.append(-prompt_part.sum() - chosen_part.sum())
    zeros = torch.zeros(len(chosen))
    tokens = torch.tensor([s.nll_prompt + s.chosen for s in layout.segments])
    return PairScores(
        torch.stack(chosen), torch.stack(rejected), torch.stack(nll), tokens, zeros, zeros, layout.weight
    )  # fmt: skip


def packed_result(model, *, prefix_sharing: bool = True, nll_scope: str = "sequence") -> Result:
    batch = PackedCollator(prefix_sharing, nll_scope)(rows())
    layout = batch["orpo_layout"]
    logits = model(**batch, use_cache=False).logits
    return _result(model, score_packed(logits, layout), layout.counts())


def padded_result(model, *, nll_scope: str = "sequence") -> Result:
    batch = PaddedCollator(0, nll_scope)(rows())
    layout = batch.pop("orpo_layout")
    logits = model(**batch, use_cache=False).logits
    return _result(model, score_padded(logits, layout), layout.counts())


def _result(model, scores: PairScores, counts: torch.Tensor) -> Result:
    loss = orpo_loss(scores, Objective(beta=1.0), counts[0].float(), counts[1].float())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Result(loss.detach(), gradients)


def assert_equal(ours: Result, theirs: Result, relative: float = 1e-5) -> None:
    """Loss and every gradient: max|difference| <= relative * max|gradient| + 1e-8 per tensor."""
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    assert ours.gradients.keys() == theirs.gradients.keys() and theirs.gradients
    wrong = {}
    for name, expected in theirs.gradients.items():
        difference = (ours.gradients[name] - expected).abs().max().item()
        if difference > relative * expected.abs().max().item() + 1e-8:
            wrong[name] = (difference, expected.abs().max().item())
    assert not wrong, f"gradients differ (difference, largest): {wrong}"
