"""Token counts of pairs and what they cost, by hand."""

import pytest

from orpo_dist.packing.lengths import PairLengths, pair_costs, pair_lengths, sharing_gain


def test_cost_counts_the_shared_prompt_once():
    # P=4, C=2, R=3, H=10: 9 tokens and 1+2+..+6 = 21 query-keys of [P C], 5+6+7 = 18 of R, each 1/60 token
    assert pair_costs([PairLengths(4, 2, 3)], hidden_size=10) == [9 + 39 / 60]


def test_lengths_follow_a_selection_of_rows():
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt_ids": [1] * n, "chosen_ids": [1] * (n + 1), "rejected_ids": [1] * (2 * n)} for n in range(1, 6)]
    table = datasets.Dataset.from_list(rows).select([4, 0, 2])
    assert pair_lengths(table) == [PairLengths(5, 6, 10), PairLengths(1, 2, 2), PairLengths(3, 4, 6)]
    assert pair_lengths([rows[4], rows[0]]) == [PairLengths(5, 6, 10), PairLengths(1, 2, 2)]


def test_sharing_gain():
    assert sharing_gain([PairLengths(4, 2, 2), PairLengths(2, 1, 1)]) == pytest.approx((12 + 6) / 12)


def test_a_pairs_query_keys_by_hand():
    # [P C]: 1 + 2 + 3 + 4 = 10; R after P=2: 3 + 4 + 5 = 12
    assert PairLengths(2, 2, 3).query_keys == 22
