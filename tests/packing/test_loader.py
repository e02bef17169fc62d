"""Rows as a DataLoader sees them."""

from orpo_dist.packing.loader import PairDataset
from orpo_dist.packing.sampler import FILLER


def test_the_filler_is_a_pair_of_weight_zero():
    row = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    pairs = PairDataset([row], filler_id=9)
    assert pairs[0] == {**row, "weight": 1.0, "index": 0}
    assert pairs[FILLER]["weight"] == 0.0 and pairs[FILLER]["chosen_ids"] == [9]
