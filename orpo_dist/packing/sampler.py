"""Which pairs each rank sees in each micro-step: a pure function of (seed, epoch), without communication.

The pairs of a global batch are drawn first and do not depend on the number of ranks; then they are split into
world_size x accumulation bins of near-equal cost. ZeRO-3 and FSDP2 synchronise at every micro-step, so bins of similar
cost share one, and every rank has the same number of them.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
FILLER = -1  # index of a pair of weight zero: keeps a rank without pairs in step with the collectives of the others


@dataclass(frozen=True)
class PairLengths:
    """Tokens of one pair: prompt P, chosen C, rejected R."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def shared_tokens(self) -> int:
        return self.prompt + self.chosen + self.rejected

    @property
    def query_keys(self) -> float:
        """Causal query-key pairs with the prompt shared."""
        branch = self.rejected * self.prompt + self.rejected * (self.rejected + 1) / 2
        return (self.prompt + self.chosen) * (self.prompt + self.chosen + 1) / 2 + branch


def pair_costs(lengths: Sequence[PairLengths], hidden_size: int) -> list[float]:
    """Work of each pair in units of one token through the linear layers.

    A block does about 24 H^2 FLOPs per token in its linear layers and 4 H per (query, key) in attention, so a
    query-key pair counts 1 / (6 H) tokens.
    """
    return [pair.shared_tokens + pair.query_keys / (6 * hidden_size) for pair in lengths]


def token_counts(rows: Any, token_id: int) -> list[int]:
    """How often a token stands in each prompt: of a vision-language model's image token, its image tokens."""
    if isinstance(rows, list):
        return [list(row["prompt_ids"]).count(token_id) for row in rows]
    counts: list[int] = []
    for batch in rows.select_columns(["prompt_ids"]).with_format("numpy").iter(10_000):
        counts += [int((ids == token_id).sum()) for ids in batch["prompt_ids"]]
    return counts


def sharing_gain(lengths: Sequence[PairLengths]) -> float:
    """(2P + C + R) / (P + C + R) over all pairs: what computing each prompt once saves in tokens. 2 at most."""
    shared = sum(pair.shared_tokens for pair in lengths)
    return 1 + sum(pair.prompt for pair in lengths) / shared if shared else 1.0


def balanced_bins(batch: Sequence[int], costs: Sequence[float], bins: int) -> list[list[int]]:
    """Split `batch` into `bins` lists of near-equal cost, dearest bin first: longest first, to the emptiest bin."""
    contents: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0.0, 0, b) for b in range(bins)]
    for i in sorted(batch, key=lambda i: (-costs[i], i)):
        load, count, b = heapq.heappop(heap)
        contents[b].append(i)
        heapq.heappush(heap, (load + costs[i], count + 1, b))
    by_load = sorted(heap, key=lambda entry: (-entry[0], entry[2]))
    return [contents[b] for _, _, b in by_load]


class GlobalBatchSampler(Sampler[list[int]]):
    """Batch sampler of one rank. It is rank-aware already and must never be wrapped in a sharding sampler.

    Every optimizer step takes `global_batch` pairs and gives each rank `accumulation` bins of them. The last, smaller
    global batch of an epoch is kept unless `drop_last`; it has as few micro-steps as its pairs need.
    """

    def __init__(
        self,
        costs: Sequence[float],
        *,
        global_batch: int,
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ):
        self.costs, self.global_batch, self.accumulation = costs, global_batch, accumulation
        self.world_size, self.rank, self.seed = world_size, rank, seed
        self.shuffle, self.drop_last, self.epoch = shuffle, drop_last, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def global_batches(self) -> Iterator[list[int]]:
        """The pairs of each optimizer step of this epoch, the same on every rank and for every world size."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.costs), generator=generator).tolist()
        else:
            order = list(range(len(self.costs)))
        for start in range(0, len(order), self.global_batch):
            batch = order[start : start + self.global_batch]
            if len(batch) == self.global_batch or not self.drop_last:
                yield batch

    def _micro_steps(self, pairs: int) -> int:
        return min(self.accumulation, -(-pairs // self.world_size))

    def __len__(self) -> int:
        full, tail = divmod(len(self.costs), self.global_batch)
        return full * self._micro_steps(self.global_batch) + (0 if self.drop_last else self._micro_steps(tail))

    def plan(self, batch: Sequence[int]) -> list[list[list[int]]]:
        """Bins of one global batch as [micro-step][rank]; an empty bin is an empty list."""
        micro_steps = self._micro_steps(len(batch))
        bins = balanced_bins(batch, self.costs, micro_steps * self.world_size)
        return [bins[m * self.world_size : (m + 1) * self.world_size] for m in range(micro_steps)]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            for micro_step in self.plan(batch):
                yield micro_step[self.rank] or [FILLER]


class EvaluationSampler(Sampler[list[int]]):
    """Batch sampler of one rank for evaluation: every pair exactly once over all ranks, the same number of batches on
    each (the last ones may be fillers), pairs of similar cost together."""

    def __init__(self, costs: Sequence[float], *, batch_size: int, world_size: int, rank: int):
        self.costs, self.batch_size, self.world_size, self.rank = costs, batch_size, world_size, rank

    def __len__(self) -> int:
        return -(-len(self.costs) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = sorted(range(len(self.costs)), key=lambda i: (-self.costs[i], i))
        per_step = self.batch_size * self.world_size
        for start in range(0, len(order), per_step):
            yield order[start : start + per_step][self.rank :: self.world_size] or [FILLER]


def is_tokenised(rows: Any) -> bool:
    """Whether `rows` hold token ids already: a non-empty list of dicts or a datasets.Dataset with those columns."""
    columns = rows[0].keys() if isinstance(rows, list) and rows else getattr(rows, "column_names", None) or ()
    return set(TOKEN_COLUMNS) <= set(columns)


def pair_lengths(rows: Any) -> list[PairLengths]:
    """Token counts of every row, read from Arrow's offsets where `rows` is a datasets.Dataset."""
    if isinstance(rows, list):
        return [PairLengths(*(len(row[column]) for column in TOKEN_COLUMNS)) for row in rows]
    lengths: list[PairLengths] = []
    for batch in rows.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(10_000):
        columns = [batch[column].combine_chunks().value_lengths().to_pylist() for column in TOKEN_COLUMNS]
        lengths += [PairLengths(*row) for row in zip(*columns, strict=True)]
    return lengths


class PairDataset(Dataset[dict]):
    """Rows with `prompt_ids`, `chosen_ids`, `rejected_ids`, plus the filler pair of one token each and weight zero."""

    def __init__(self, rows: Sequence[dict], filler_id: int):
        self.rows = rows
        self.filler = {"prompt_ids": [filler_id], "chosen_ids": [filler_id], "rejected_ids": [filler_id], "weight": 0.0}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if index == FILLER:
            return {**self.filler, "index": FILLER}
        return {**self.rows[index], "weight": 1.0, "index": index}


class PairDataLoader(DataLoader):
    """A DataLoader that the Trainer can tell the epoch.

    Kept away from `accelerator.prepare`: nothing in it is left to shard, and through accelerate's BatchSamplerShard a
    resume in the middle of an epoch would lose the epoch.
    """

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, GlobalBatchSampler):
            self.batch_sampler.set_epoch(epoch)
