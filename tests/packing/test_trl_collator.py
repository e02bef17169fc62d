"""A collator written for TRL in front of the padded layout."""

import pytest
import torch

from orpo_dist.errors import UserError
from orpo_dist.packing.padded import PaddedCollator
from orpo_dist.packing.trl_collator import TRLCollator

ROWS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2], "weight": 1.0, "index": 0},
    {"prompt_ids": [5], "chosen_ids": [4, 2], "rejected_ids": [3, 2], "weight": 1.0, "index": 1},
]


WITH_TURNS = [
    ROWS[0],
    {**ROWS[1], "chosen_ids": [4, 2, 8, 9, 3], "chosen_context": [2, 4], "rejected_context": [1, 2]},
]


@pytest.mark.parametrize("rows", [ROWS, WITH_TURNS])
def test_a_collator_written_for_trl_gives_the_same_batch(rows):
    from trl.experimental.utils import DPODataCollatorWithPadding

    ours = PaddedCollator(pad_token_id=0, nll_scope="sequence")(rows)
    theirs = TRLCollator(DPODataCollatorWithPadding(pad_token_id=0), pad_token_id=0, nll_scope="sequence")(rows)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    for name in ("completion", "nll", "weight"):
        assert torch.equal(getattr(ours["orpo_layout"], name), getattr(theirs["orpo_layout"], name)), name
    completion = ours["orpo_layout"].completion
    assert torch.equal(ours["orpo_layout"].targets[completion], theirs["orpo_layout"].targets[completion])
    nll = ours["orpo_layout"].nll
    assert torch.equal(ours["orpo_layout"].targets[:2][nll], theirs["orpo_layout"].targets[:2][nll])


def test_a_batch_without_what_the_loss_needs_is_refused():
    collator = TRLCollator(lambda rows: {"chosen_input_ids": torch.ones(2, 3)}, pad_token_id=0, nll_scope="sequence")
    with pytest.raises(UserError, match="data_collator did not return chosen_attention_mask, chosen_labels, rejected_"):
        collator(ROWS)


def test_the_columns_a_collator_sees():
    seen = []
    collator = TRLCollator(lambda rows: seen.extend(rows) or {}, pad_token_id=0, nll_scope="sequence")
    with pytest.raises(UserError):
        collator(ROWS[:1])
    (row,) = seen
    prompt, chosen = ROWS[0]["prompt_ids"], ROWS[0]["chosen_ids"]
    assert row["prompt_input_ids"] == prompt and row["chosen_input_ids"] == prompt + chosen
    assert row["chosen_labels"] == [-100] * len(prompt) + chosen
    assert row["chosen_attention_mask"] == [1] * len(prompt + chosen)
