"""Rows as batches for a DataLoader."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from orpo_dist.packing.sampler import FILLER, GlobalBatchSampler
from orpo_dist.packing.workers import signals_held


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
    """A DataLoader that passes the Trainer's epoch to its sampler.

    Do not pass it to `accelerator.prepare`: its sampler is already sharded, and accelerate's BatchSamplerShard loses
    the epoch on a resume in the middle of one.
    """

    def __iter__(self) -> Any:
        with signals_held():
            return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, GlobalBatchSampler):
            self.batch_sampler.set_epoch(epoch)
