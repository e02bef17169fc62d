"""Which pairs each data rank sees in each micro-step: a pure function of (seed, epoch), without communication.

The pairs of a global batch are drawn first and do not depend on the number of data ranks; then they are split into
data ranks x accumulation bins of near-equal cost. ZeRO-3 and FSDP2 synchronise at every micro-step, so bins of similar
cost share one, and every rank has the same number of them.
"""

import heapq
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from orpo_dist.distributed.ranks import on_first_rank
from orpo_dist.errors import UserError

FILLER = -1  # index of a pair of weight zero, with which a rank without pairs takes part in collectives
UNNUMBERED = -2  # index of a row whose place in the dataset is not known: its loader is the user's


def balanced_bins(batch: Sequence[int], costs: Sequence[float], bins: int) -> list[list[int]]:
    """Split `batch` into `bins` lists of near-equal cost, greedily: the costliest pair goes to the cheapest bin. The
    costliest bin comes first."""
    contents: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0.0, 0, b) for b in range(bins)]
    for i in sorted(batch, key=lambda i: (-costs[i], i)):
        load, count, b = heapq.heappop(heap)
        contents[b].append(i)
        heapq.heappush(heap, (load + costs[i], count + 1, b))
    by_load = sorted(heap, key=lambda entry: (-entry[0], entry[2]))
    return [contents[b] for _, _, b in by_load]


class GlobalBatchSampler(Sampler[list[int]]):
    """Batch sampler of one data rank. It is already sharded and must never be wrapped in a sharding sampler.

    Every optimizer step uses `global_batch` pairs, split into `accumulation` bins per rank. The last, smaller global
    batch of an epoch is kept unless `drop_last`, with only as many micro-steps as it needs.

    order: a sampler of the user. It yields the positions of an epoch's pairs, which the first rank draws for all.
    """

    def __init__(
        self,
        costs: Sequence[float],
        *,
        global_batch: int,
        accumulation: int,
        data_ranks: int,
        data_rank: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        order: "Sampler[int] | None" = None,
    ):
        self.costs, self.global_batch, self.accumulation = costs, global_batch, accumulation
        self.data_ranks, self.data_rank, self.seed = data_ranks, data_rank, seed
        self.shuffle, self.drop_last, self.epoch = shuffle, drop_last, 0
        self.order: Any = order

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if callable(getattr(self.order, "set_epoch", None)):  # as accelerate asks: samplers have no type for it
            self.order.set_epoch(epoch)

    def global_batches(self) -> Iterator[list[int]]:
        """The pairs of each optimizer step of this epoch, the same on every rank and for any number of ranks."""
        if self.order is not None:
            order = on_first_rank(self._ordered)
        elif self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.costs), generator=generator).tolist()
        else:
            order = list(range(len(self.costs)))
        for start in range(0, len(order), self.global_batch):
            batch = order[start : start + self.global_batch]
            if len(batch) == self.global_batch or not self.drop_last:
                yield batch

    def _ordered(self) -> list[int]:
        try:
            return [operator.index(position) for position in self.order]
        except TypeError as error:
            raise UserError(f"The training sampler must yield positions of rows, whole numbers: {error}.") from error

    def _micro_steps(self, pairs: int) -> int:
        return min(self.accumulation, -(-pairs // self.data_ranks))

    def __len__(self) -> int:
        full, tail = divmod(len(self.costs if self.order is None else self.order), self.global_batch)
        return full * self._micro_steps(self.global_batch) + (0 if self.drop_last else self._micro_steps(tail))

    def plan(self, batch: Sequence[int]) -> list[list[list[int]]]:
        """Bins of one global batch as [micro-step][rank]; an empty bin is an empty list."""
        micro_steps = self._micro_steps(len(batch))
        bins = balanced_bins(batch, self.costs, micro_steps * self.data_ranks)
        return [bins[m * self.data_ranks : (m + 1) * self.data_ranks] for m in range(micro_steps)]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            for micro_step in self.plan(batch):
                yield micro_step[self.data_rank] or [FILLER]


class EvaluationSampler(Sampler[list[int]]):
    """Batch sampler of one data rank for evaluation.

    Each pair occurs exactly once over all data ranks, and pairs of similar cost share a batch. All ranks have the same
    number of batches (the last ones may be fillers).
    """

    def __init__(self, costs: Sequence[float], *, batch_size: int, data_ranks: int, data_rank: int):
        self.costs, self.batch_size, self.data_ranks, self.data_rank = costs, batch_size, data_ranks, data_rank

    def __len__(self) -> int:
        return -(-len(self.costs) // (self.batch_size * self.data_ranks))

    def __iter__(self) -> Iterator[list[int]]:
        order = sorted(range(len(self.costs)), key=lambda i: (-self.costs[i], i))
        per_step = self.batch_size * self.data_ranks
        for start in range(0, len(order), per_step):
            yield order[start : start + per_step][self.data_rank :: self.data_ranks] or [FILLER]
