"""The packed layout: the position of each pair in one row of tokens, and every index that separates the pairs.

Shape legend: B pairs, T tokens of the packed row, S = 2B causal sequences, K keys over all sequences, N scored rows,
L length of the longest sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from orpo_dist.loss import PairScores
from orpo_dist.packing.split import RowSplit, SequencePlace

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class PackedLayoutError(RuntimeError):
    """A part of the model does not support the packed layout. The message names the part and the reason."""


@dataclass(frozen=True)
class PairSegment:
    """One pair of a packed row; all numbers count tokens.

    start: where the pair begins in the row.
    prompt, chosen, rejected: lengths P, C, R, at least 1 each.
    prompt_copies: 1 when [P C R] shares the prompt, 2 when the row holds [P C][P R].
    nll_prompt: scored rows that predict prompt tokens: P - 1, or 0 when the NLL is the completion's alone.
    chosen_context, rejected_context: tokens of a completion that the model did not write and that are not scored, as
        [start, stop, start, stop, ...]. Never the first token.
    """

    start: int
    prompt: int
    chosen: int
    rejected: int
    prompt_copies: int
    nll_prompt: int
    chosen_context: Sequence[int] = ()
    rejected_context: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        return self.prompt_copies * self.prompt + self.chosen + self.rejected

    @property
    def scored(self) -> int:
        """Scored rows of the pair: nll_prompt, then scored_chosen, then scored_rejected."""
        return self.nll_prompt + self.scored_chosen + self.scored_rejected

    @property
    def scored_chosen(self) -> int:
        """Tokens of the chosen completion that the model wrote: C where it has one turn."""
        return self.chosen - context_tokens(self.chosen_context)

    @property
    def scored_rejected(self) -> int:
        return self.rejected - context_tokens(self.rejected_context)

    @property
    def rejected_start(self) -> int:
        """Place in the row of the first token of the rejected completion."""
        return self.start + self.tokens - self.rejected


class PackedLayout:
    """Indices of a packed row.

    Deliberately not a dict, tuple or dataclass: with bf16, DeepSpeed and FSDP2 cast the tensors inside those and round
    `tokens` (12345 becomes 12352). They pass objects of other types through unchanged, which also keeps float32
    statistics intact if the outputs of the forward are cast.

    A pair is two causal sequences, [P C] and [P R]. With a shared prompt the queries of the second are R alone, so its
    last query sees its last key ("bottom-right" causal masks) and the keys of P occur twice in `key_index`.

    segments: B pairs, host numbers.
    shared: whether the prompt is in the row once.
    rows: (N,) places in the row whose hidden states are scored, pair by pair, see PairSegment.scored. Row P-1 of a
        shared prompt occurs twice: it predicts the first token of both completions.
    targets: (N,) the token each scored row predicts.
    cu_seqlens_q, cu_seqlens_k: (S + 1,) int32, where each sequence's queries and keys begin.
    max_seqlen_q, max_seqlen_k: the longest of each, host numbers.
    key_index: (K,) places in the row of the keys of all sequences; None without sharing, where keys are the row itself.
    key_place: (T,) the inverse: the first position among the K of the key of each token of the row.
    prompt_rows, prompt_again: (sum of P,) places in the row of the prompts' tokens, and the second position of their
        keys among the K. All three are None without sharing.
    unshare_index: (S, L) places in the row of the tokens of each sequence; beyond a sequence's end, of its last token.
    reshare_index: (T,) where token t of the row is found in the flattened (S * L) unshared rows.
    weight: (B,) 1 for a pair, 0 for the filler of an empty bin.
    index: positions of the pairs in the dataset, on the host.
    tokens, pairs: () totals of the whole global batch, written by the trainer once per optimizer step.
    scores: per-pair results, written by the loss head.
    split: what this rank holds of the row where several ranks share it (packing/split.py); None: it has all of it.
    reached: whether a layer has used it: some models drop the keywords that they do not know.
    prompt_blocks: (sum of P,) for prompts with bidirectional attention: tokens of a prompt with the same number see
        each other, -1 where attention is causal; None where it is causal everywhere. A block is one stretch of tokens.
        Written by the image collator.
    visibility, block_masks: attention masks by (queries, keys, window) and by window, filled on first use on the
        layout's device.
    """

    def __init__(
        self,
        segments: list[PairSegment],
        input_ids: torch.Tensor,
        weight: torch.Tensor,
        index: list[int],
    ):
        """input_ids: (T,) the row itself, for the targets."""
        self.segments, self.weight, self.index = segments, weight, index
        self.shared = segments[0].prompt_copies == 1
        self.rows, target_places = _scored_rows(segments)
        self.targets = input_ids[target_places]

        sequences = [sequence for segment in segments for sequence in _sequences(segment)]
        query_lengths = [
            length
            for s in segments
            for length in (s.prompt + s.chosen, s.rejected if self.shared else s.prompt + s.rejected)
        ]
        key_lengths = [len(sequence) for sequence in sequences]
        self.cu_seqlens_q, self.cu_seqlens_k = _cumulative(query_lengths), _cumulative(key_lengths)
        self.max_seqlen_q, self.max_seqlen_k = max(query_lengths), max(key_lengths)
        self.key_index: torch.Tensor | None = None
        self.key_place: torch.Tensor | None = None
        self.prompt_rows: torch.Tensor | None = None
        self.prompt_again: torch.Tensor | None = None
        if self.shared:
            self.key_index = torch.cat(sequences)
            self.key_place, self.prompt_rows, self.prompt_again = _keys_of_rows(segments)
        self.unshare_index, self.reshare_index = _unsharing(sequences, query_lengths)

        self.tokens: torch.Tensor | None = None
        self.pairs: torch.Tensor | None = None
        self.scores: PairScores | None = None
        self.split: RowSplit | None = None
        self.reached = False
        self.prompt_blocks: torch.Tensor | None = None
        self.visibility: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self.block_masks: dict[int | None, BlockMask] = {}

    @property
    def length(self) -> int:
        """T, tokens of the row."""
        return self.reshare_index.shape[0]

    @property
    def scored_targets(self) -> torch.Tensor:
        """(N,) the token that each of `rows` predicts; of a split row (n,), those of its slice."""
        return self.targets if self.split is None else self.targets[self.split.places]

    @property
    def scored_counts(self) -> list[tuple[int, int, int]]:
        """Scored rows of each pair, in their order: of the prompt, of the chosen and of the rejected completion."""
        return [(s.nll_prompt, s.scored_chosen, s.scored_rejected) for s in self.segments]

    def blocks_of(self, sequence: int) -> torch.Tensor | None:
        """(P,) the prompt blocks among the queries of a sequence ([P C], [P R], [P C], ...); None without any."""
        if self.prompt_blocks is None or (self.shared and sequence % 2):
            return None
        return self.prompt_blocks.split([s.prompt for s in self.segments])[sequence // 2]

    def split_over(self, where: SequencePlace | None) -> "PackedLayout":
        """Share the row with the ranks of a group, before `to`; None: leave it whole."""
        self.split = None if where is None else RowSplit(where, self.length, self.rows, self.scored_counts)
        return self

    def counts(self) -> torch.Tensor:
        """(2,) float64 NLL tokens and pairs of this micro-batch. Called before `to`: no device sync."""
        scored = [s.nll_prompt + s.scored_chosen for s in self.segments]
        tokens = torch.tensor(scored, dtype=torch.float64).to(self.weight.device)
        return torch.stack([(tokens * self.weight).sum(), self.weight.sum().double()])

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "PackedLayout":
        """Move in place: the object that the trainer holds stays the one that the model writes `scores` to."""
        return self._replace(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedLayout":
        """Called by a DataLoader with pin_memory, so that `to` can be asynchronous."""
        return self._replace(torch.Tensor.pin_memory)

    def _replace(self, change) -> "PackedLayout":
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, change(value))
        if self.split is not None:
            self.split.replace(change)
        self.visibility, self.block_masks = {}, {}
        return self


def position_ids(segments: Sequence[PairSegment]) -> torch.Tensor:
    """(T,) positions of the tokens of a packed row: each sequence counts from 0, so a rejected completion that shares
    its prompt goes on from P."""
    parts = []
    for s in segments:
        second = s.prompt if s.prompt_copies == 1 else 0
        parts += [torch.arange(s.prompt + s.chosen), torch.arange(second, s.prompt + s.rejected)]
    return torch.cat(parts)


def _scored_rows(segments: Sequence[PairSegment]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) rows and (N,) places of the tokens they predict."""
    rows, targets = [], []
    for s in segments:
        first = s.prompt - 1 - s.nll_prompt
        chosen = torch.arange(s.start + first, s.start + s.prompt + s.chosen - 1)
        rejected = torch.arange(s.rejected_start, s.rejected_start + s.rejected)
        last_of_prompt = s.start + s.prompt - 1 if s.prompt_copies == 1 else s.rejected_start - 1
        of_rejected = torch.cat([torch.tensor([last_of_prompt]), rejected[:-1]])
        if s.chosen_context:
            chosen = chosen[_outside(s.chosen_context, len(chosen), s.nll_prompt)]
        if s.rejected_context:
            outside = _outside(s.rejected_context, s.rejected)
            of_rejected, rejected = of_rejected[outside], rejected[outside]
        rows += [chosen, of_rejected]
        targets += [chosen + 1, rejected]
    return torch.cat(rows), torch.cat(targets)


def context_tokens(context: Sequence[int]) -> int:
    """Tokens in stretches [start, stop, start, stop, ...]."""
    return sum(context[1::2]) - sum(context[::2])


def _outside(context: Sequence[int], length: int, before: int = 0) -> torch.Tensor:
    """(length,) bool: False in the stretches of `context`, which count from place `before`."""
    mask = torch.ones(length, dtype=torch.bool)
    for start, stop in zip(context[::2], context[1::2], strict=True):
        mask[before + start : before + stop] = False
    return mask


def _sequences(s: PairSegment) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in the row of the tokens of [P C] and of [P R]."""
    prompt = s.start if s.prompt_copies == 1 else s.rejected_start - s.prompt
    return (
        torch.arange(s.start, s.start + s.prompt + s.chosen),
        torch.cat(
            [
                torch.arange(prompt, prompt + s.prompt),
                torch.arange(s.rejected_start, s.rejected_start + s.rejected),
            ]
        ),
    )


def _unsharing(sequences: list[torch.Tensor], query_lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, sequences))
    index = torch.stack([torch.cat([s, s[-1:].expand(longest - len(s))]) for s in sequences])
    # The queries of a sequence are its last tokens, and in order of sequences they are the row itself.
    back = [
        torch.arange(i * longest + len(sequence) - queries, i * longest + len(sequence))
        for i, (sequence, queries) in enumerate(zip(sequences, query_lengths, strict=True))
    ]
    return index, torch.cat(back)


def _keys_of_rows(segments: Sequence[PairSegment]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """key_place, prompt_rows and prompt_again of PackedLayout, for shared prompts."""
    place, rows, again = [], [], []
    start = 0  # of the pair's keys [P C][P R]
    for s in segments:
        second = start + s.prompt + s.chosen
        rejected = second + s.prompt
        place += [torch.arange(start, second), torch.arange(rejected, rejected + s.rejected)]
        rows.append(torch.arange(s.start, s.start + s.prompt))
        again.append(torch.arange(second, rejected))
        start = rejected + s.rejected
    return torch.cat(place), torch.cat(rows), torch.cat(again)


def _cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
