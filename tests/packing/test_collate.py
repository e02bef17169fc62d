"""The worked example of PackedCollator, number by number, and its variants."""

import pytest
import torch

from orpo_dist.packing.collate import PackedCollator

ROWS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2], "weight": 1.0, "index": 10},
    {"prompt_ids": [5], "chosen_ids": [4, 2], "rejected_ids": [3, 2], "weight": 0.0, "index": 11},
]


def test_worked_example():
    batch = PackedCollator(prefix_sharing=True, nll_scope="sequence")(ROWS)
    assert list(batch) == ["input_ids", "position_ids", "orpo_layout"]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2, 8, 9, 2, 5, 4, 2, 3, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1, 2]]
    layout = batch["orpo_layout"]
    assert layout.rows.tolist() == [0, 1, 2, 1, 4, 5, 7, 8, 7, 10]
    assert layout.targets.tolist() == [6, 7, 2, 8, 9, 2, 4, 2, 3, 2]
    assert layout.cu_seqlens_q.tolist() == [0, 4, 7, 10, 12]
    assert layout.cu_seqlens_k.tolist() == [0, 4, 9, 12, 15]
    assert (layout.max_seqlen_q, layout.max_seqlen_k) == (4, 5)
    assert layout.key_index.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 7, 10, 11]
    assert layout.index == [10, 11] and layout.weight.tolist() == [1.0, 0.0]
    assert layout.counts().tolist() == [3.0, 1.0]  # the filler counts neither tokens nor pairs
    assert [s.scored for s in layout.segments] == [6, 4]


def test_completion_scope_leaves_prompt_rows_out():
    layout = PackedCollator(prefix_sharing=True, nll_scope="completion")(ROWS)["orpo_layout"]
    assert layout.rows.tolist() == [1, 2, 1, 4, 5, 7, 8, 7, 10]
    assert layout.targets.tolist() == [7, 2, 8, 9, 2, 4, 2, 3, 2]
    assert layout.counts().tolist() == [2.0, 1.0]
    assert [s.nll_prompt for s in layout.segments] == [0, 0]


def test_without_sharing_the_prompt_is_there_twice():
    batch = PackedCollator(prefix_sharing=False, nll_scope="sequence")(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2, 5, 6, 8, 9, 2, 5, 4, 2, 5, 3, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2]]
    layout = batch["orpo_layout"]
    assert layout.rows.tolist() == [0, 1, 2, 5, 6, 7, 9, 10, 12, 13]
    assert layout.targets.tolist() == [6, 7, 2, 8, 9, 2, 4, 2, 3, 2]
    assert layout.key_index is None and not layout.shared
    assert layout.cu_seqlens_q.tolist() == layout.cu_seqlens_k.tolist() == [0, 4, 9, 12, 15]


@pytest.mark.parametrize("column", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_a_pair_without_tokens_is_refused(column):
    with pytest.raises(ValueError, match="pair 10 has an empty"):
        PackedCollator(prefix_sharing=True, nll_scope="sequence")([{**ROWS[0], column: []}])


def test_collator_needs_no_device_and_no_random_state():
    state = torch.random.get_rng_state()
    PackedCollator(prefix_sharing=True, nll_scope="sequence")(ROWS)
    assert torch.equal(state, torch.random.get_rng_state())
