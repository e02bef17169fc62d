"""The pass over the scored rows that one rank of a sequence-parallel group holds.

A pair whose completions lie on several ranks has a coefficient that is known when all of them have scored their rows.
Such pairs are taken first, in two rounds (packing/split.py): a rank scores its rows of the round's pair as open chunks,
the group adds up two sums per pair, everybody knows the coefficients and scales its rows. Then come the other rows, as
on one rank, and one more sum over the group makes the scores. Matmuls and memory are those of one rank's rows.

Shape legend: B pairs, N scored rows of the whole row, n those of this slice.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from orpo_dist.loss import PairScores, orpo_loss
from orpo_dist.model.head.chunked_pass import ChunkedPass
from orpo_dist.model.head.chunks import Chunk, PairRows, PairStarts, pair_starts, plan_slice
from orpo_dist.packing.exchange import sum_over_group
from orpo_dist.packing.split import RowSplit


class SlicePass(ChunkedPass):
    """`job.pair_rows` are those of the whole row, `starts` those of the (n,) rows here. Every rank of the group must
    run it, without rows too."""

    @property
    def split(self) -> RowSplit:
        assert self.job.split is not None
        return self.job.split

    def _planned(self) -> tuple[list[PairStarts], list[Chunk]]:
        here = [PairRows(*counts) for counts in self.split.counts]
        self.open_chunks, plan = plan_slice(here, self.job.pair_rows, self.split.rounds, self.job.chunk_rows)
        return pair_starts(here), plan

    def _longest_chunk(self) -> int:
        chunks = [chunk for round_ in (*self.open_chunks, self.plan) for chunk in round_]
        return max((chunk.stop - chunk.start for chunk in chunks), default=0)

    def run(self) -> torch.Tensor:
        """() this rank's share of the loss: that of the whole row is the sum over the group. The gradients are those of
        the whole loss by the rows here, and one rank of the group has the pairs' weight for the metrics."""
        for pairs, chunks in zip(self.split.rounds, self.open_chunks, strict=True):
            for chunk in chunks:
                assert chunk.open_branch is not None
                rows = slice(chunk.start, chunk.stop)
                error = self._score(rows)
                if any(self.needed):
                    buffer = self._branch_buffer(chunk.open_branch)
                    self._form_gradients(rows, error, buffer, None, chunk.open_branch)
            if self.job.with_gradients:
                self._close_round(pairs)
        self._run_plan()
        scores = self._scores()
        self.job.scores = scores
        if self.split.where.place:
            self.job.scores = replace(scores, weight=torch.zeros_like(scores.weight))
        return orpo_loss(scores, self.job.objective, self.tokens, self.pairs) / self.split.where.size

    def _close_round(self, pairs: Sequence[int]) -> None:
        """The coefficients of pairs that lie on several ranks, from the sums of all; then the open rows here."""
        starts = [self.starts[i] for i in pairs]
        sums = torch.stack([total for start in starts for total in _branch_sums(self.logps, start)])
        sum_over_group(sums, self.split)
        counts = [self.job.pair_rows[i] for i in pairs]
        chosen = torch.stack([sums[2 * k] / count.chosen for k, count in enumerate(counts)])
        rejected = torch.stack([sums[2 * k + 1] / count.rejected for k, count in enumerate(counts)])
        by_chosen, by_rejected = self._by_means(pairs, chosen, rejected)
        for k, (pair, count, start) in enumerate(zip(pairs, counts, starts, strict=True)):
            self._set_factors(pair, by_chosen[k] / count.chosen, by_rejected[k] / count.rejected)
            if start.chosen < start.end and any(self.needed):
                self._scale_open_rows(start, start.end)

    def _scores(self) -> PairScores:
        columns = []
        for s in self.starts:
            logps, logits = _branch_sums(self.logps, s), _branch_sums(self.mean_logits, s)
            columns.append(torch.stack([*logps, -self.logps[s.prompt : s.rejected].sum(), *logits]))
        sums = sum_over_group(torch.stack(columns, 1), self.split)
        chosen, rejected = torch.empty_like(sums[0]), torch.empty_like(sums[0])
        for i, pair in enumerate(self.job.pair_rows):
            chosen[i], rejected[i] = pair.chosen, pair.rejected  # fills: no copy from the host, no sync
        return PairScores(
            chosen_logps=sums[0] / chosen,
            rejected_logps=sums[1] / rejected,
            nll_sum=sums[2],
            nll_tokens=self.nll_tokens,
            chosen_logits=sums[3] / chosen,
            rejected_logits=sums[4] / rejected,
            weight=self.pair_weight,
        )


def _branch_sums(values: torch.Tensor, start: PairStarts) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the chosen and over the rejected rows of a pair here, 0 without any."""
    return values[start.chosen : start.rejected].sum(), values[start.rejected : start.end].sum()
