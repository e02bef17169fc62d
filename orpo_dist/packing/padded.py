"""The padded layout: TRL's concatenated forward, 2B padded rows with the prompt in both.

It is the reference for the packed layout and the fallback for models that do not support it (encoder-decoder models).
Its loss comes from the loss head (model/head/), or from full logits (`score_padded`) where that does not fit.

Shape legend: B pairs, L length of the longest row, N scored rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from orpo_dist.loss import PairScores


class PaddedLayout:
    """Indices and masks of a padded batch.

    Deliberately not a dict, tuple or dataclass: with bf16, DeepSpeed and FSDP2 cast the tensors inside those and round
    `tokens` (12345 becomes 12352). They pass objects of other types through unchanged.

    targets: (2B, L) the token that row t predicts; 0 where none is scored. Chosen rows first, then rejected.
    completion: (2B, L) bool, rows that score a completion's token.
    nll: (B, L) bool, rows of the chosen half that count in the NLL term.
    weight: (B,) 1, or 0 for a filler.
    index: positions of the pairs in the dataset, on the host.
    rows: (N,) places, among the flattened (2B * L), of the rows that are scored, pair by pair: those of the NLL term
        alone, the chosen completion's, the rejected one's. None where the loss head cannot take them: a completion
        without a scored token, or one whose tokens are not all in the NLL term (a collator of the user's).
    scored_counts: how many of each kind a pair has, host numbers; empty without `rows`.
    tokens, pairs: () totals of the whole global batch, written by the trainer once per optimizer step.
    scores: per-pair results, written by the loss head.
    """

    def __init__(
        self,
        targets: torch.Tensor,
        completion: torch.Tensor,
        nll: torch.Tensor,
        weight: torch.Tensor,
        index: list[int],
    ):
        self.targets, self.completion, self.nll, self.weight, self.index = targets, completion, nll, weight, index
        self.rows, self.scored_counts = _scored_rows(completion, nll)
        self.tokens: torch.Tensor | None = None
        self.pairs: torch.Tensor | None = None
        self.scores: PairScores | None = None

    @property
    def scored_targets(self) -> torch.Tensor:
        """(N,) the token that each of `rows` predicts."""
        assert self.rows is not None
        return self.targets.flatten().index_select(0, self.rows)

    def counts(self) -> torch.Tensor:
        """(2,) float64 NLL tokens and pairs of this micro-batch. Called before `to`: no device sync."""
        tokens = (self.nll.sum(1) * self.weight).sum()
        return torch.stack([tokens, self.weight.sum()]).to(torch.float64)

    def to(self, device: torch.device) -> "PaddedLayout":
        self.targets = self.targets.to(device, non_blocking=True)
        self.completion = self.completion.to(device, non_blocking=True)
        self.nll = self.nll.to(device, non_blocking=True)
        self.weight = self.weight.to(device, non_blocking=True)
        self.rows = None if self.rows is None else self.rows.to(device, non_blocking=True)
        return self


def _scored_rows(completion: torch.Tensor, nll: torch.Tensor) -> tuple[torch.Tensor | None, list[tuple[int, int, int]]]:
    """`rows` and `scored_counts` of PaddedLayout. Masks on the CPU, where the collator makes them."""
    pairs, length = nll.shape
    parts = (nll & ~completion[:pairs], completion[:pairs], completion[pairs:])
    counts = [(int(a), int(b), int(c)) for a, b, c in zip(*(part.sum(1) for part in parts), strict=True)]
    if (parts[1] & ~nll).any() or any(chosen == 0 or rejected == 0 for _, chosen, rejected in counts):
        return None, []
    places = torch.arange(2 * pairs * length).view(2, pairs, length)
    starts = (places[0], places[0], places[1])
    rows = [place[i][part[i]] for i in range(pairs) for place, part in zip(starts, parts, strict=True)]
    return torch.cat(rows), counts


class _TargetLogps(torch.autograd.Function):
    """(2B, L) log-probabilities of `targets` from logits (2B, L, V), row by row in float32 at least.

    Nothing of the size of the logits is kept but the logits: autograd would keep a float32 copy and a softmax, four
    times the bytes of bfloat16 logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.stack([torch.logsumexp(row.to(wide), 1) for row in logits])
        ctx.save_for_backward(logits, targets, total)
        return logits.gather(2, targets[..., None])[..., 0].to(wide) - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, total = ctx.saved_tensors
        result = torch.empty_like(logits)
        for into, row, target, row_total, row_grad in zip(result, logits, targets, total, grad, strict=True):
            error = (row.to(total.dtype) - row_total[:, None]).exp_().mul_(-row_grad[:, None])
            into.copy_(error.scatter_add_(1, target[:, None], row_grad[:, None]))
        return result, None


def score_padded(logits: torch.Tensor, layout: PaddedLayout) -> PairScores:
    """Scores of B pairs from the logits (2B, L, V) of a padded batch, in float32 (float64 for float64 logits)."""
    pairs = layout.weight.shape[0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = _TargetLogps.apply(logits, layout.targets)
    assert isinstance(logps, torch.Tensor)
    lengths = layout.completion.sum(1)
    means = torch.where(layout.completion, logps, 0.0).sum(1) / lengths
    with torch.no_grad():
        mean_logits = torch.stack([row.to(wide).mean(1) for row in logits.detach()])
        mean_logits = torch.where(layout.completion, mean_logits, 0.0).sum(1) / lengths
    return PairScores(
        chosen_logps=means[:pairs],
        rejected_logps=means[pairs:],
        nll_sum=-torch.where(layout.nll, logps[:pairs], 0.0).sum(1),
        nll_tokens=layout.nll.sum(1),
        chosen_logits=mean_logits[:pairs],
        rejected_logits=mean_logits[pairs:],
        weight=layout.weight,
    )


@dataclass(frozen=True)
class PaddedCollator:
    """Rows of token ids to one padded batch of a decoder model.

    Two pairs, pad token 0, nll_scope="sequence":

        {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2]}
        {"prompt_ids": [5],    "chosen_ids": [4, 2], "rejected_ids": [3, 2]}

        input_ids       attention_mask   targets        completion   nll
        5 6 7 2 0       1 1 1 1 0        6 7 2 0 0      . x x . .    x x x . .
        5 4 2 0 0       1 1 1 0 0        4 2 0 0 0      x x . . .    x x . . .
        5 6 8 9 2       1 1 1 1 1        6 8 9 2 0      . x x x .
        5 3 2 0 0       1 1 1 0 0        3 2 0 0 0      x x . . .

    Row t predicts token t + 1, so the row before a completion scores its first token. With nll_scope="completion" the
    NLL rows are the chosen completion's. Tokens that `chosen_context` and `rejected_context` name are not scored, see
    PackedCollator.
    """

    pad_token_id: int
    nll_scope: str

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sequences = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
        input_ids, attention_mask = pad_right(sequences, self.pad_token_id)
        targets, _ = pad_right([sequence[1:] for sequence in sequences], 0, input_ids.shape[1])
        completion = torch.zeros_like(input_ids, dtype=torch.bool)
        nll = torch.zeros_like(input_ids[: len(rows)], dtype=torch.bool)
        for i, sequence in enumerate(sequences):
            first = len(rows[i % len(rows)]["prompt_ids"]) - 1
            completion[i, first : len(sequence) - 1] = True
            if i < len(rows):
                nll[i, (0 if self.nll_scope == "sequence" else first) : len(sequence) - 1] = True
            for start, stop in _contexts(rows, i):
                completion[i, first + start : first + stop] = False
                if i < len(rows):
                    nll[i, first + start : first + stop] = False
        layout = PaddedLayout(targets, completion, nll, _weights(rows), [row["index"] for row in rows])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "orpo_layout": layout}


@dataclass(frozen=True)
class EncoderDecoderCollator:
    """Rows of token ids to one padded batch of an encoder-decoder model (T5), as TRL's concatenated forward.

    The prompt goes to the encoder (2B rows, as each completion needs it), the completion to the decoder. Decoder row t
    predicts completion token t, so nothing is shifted and every NLL token is a token of the chosen completion.
    """

    pad_token_id: int
    decoder_start_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        completions = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
        input_ids, attention_mask = pad_right([row["prompt_ids"] for row in rows] * 2, self.pad_token_id)
        targets, scored = pad_right(completions, 0)
        shifted = [[self.decoder_start_token_id, *completion[:-1]] for completion in completions]
        decoder_input_ids, _ = pad_right(shifted, self.pad_token_id)
        completion = scored.bool()
        for i in range(len(completions)):
            for start, stop in _contexts(rows, i):
                completion[i, start:stop] = False
        layout = PaddedLayout(
            targets, completion, completion[: len(rows)].clone(), _weights(rows), [row["index"] for row in rows]
        )
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "orpo_layout": layout,
        }


def pad_right(sequences: list[list[int]], value: int, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, L) ids padded with `value`, and their (rows, L) mask of ones and zeros."""
    width = length or max(map(len, sequences))
    ids = torch.tensor([sequence + [value] * (width - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences])
    return ids, mask


def _contexts(rows: Sequence[dict[str, Any]], i: int) -> list[tuple[int, int]]:
    """The stretches of completion number i of the 2B that are not scored."""
    context = rows[i % len(rows)].get("chosen_context" if i < len(rows) else "rejected_context") or ()
    return list(zip(context[::2], context[1::2], strict=True))


def _weights(rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
