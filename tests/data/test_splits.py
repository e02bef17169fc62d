"""Which rows a run trains on and which it evaluates on."""

from pathlib import Path

import pytest

from orpo_dist.data.splits import load_splits
from orpo_dist.errors import UserError
from orpo_dist.options.data import DataArguments
from tests.pair_files import write_pairs


@pytest.fixture
def pairs(tmp_path) -> Path:
    """A folder with test.jsonl, 5 pairs."""
    write_pairs(tmp_path / "test.jsonl", 5, seed=2)
    return tmp_path


def test_held_out_rows_are_no_training_rows(pairs):
    data = DataArguments(dataset_name=str(pairs / "test.jsonl"), test_split_size=2)
    rows, held_out = load_splits(data, seed=1)
    assert (len(rows), len(held_out)) == (3, 2)
    assert not set(rows["prompt"]) & set(held_out["prompt"])
    assert load_splits(data, seed=1)[1]["prompt"] == held_out["prompt"]
    share = DataArguments(dataset_name=str(pairs / "test.jsonl"), test_split_size=0.4)
    assert [len(part) for part in load_splits(share, seed=1)] == [3, 2]
    for size in (5, 0.01):
        with pytest.raises(UserError, match="leaves no row"):
            load_splits(DataArguments(dataset_name=str(pairs / "test.jsonl"), test_split_size=size), seed=1)


def test_a_split_of_one_file_is_refused(tmp_path):
    """It would be the training rows again."""
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 20)
    with pytest.raises(UserError, match="test_split_size"):
        load_splits(DataArguments(dataset_name=str(file), dataset_test_split="test"), seed=0)
    train, held_out = load_splits(DataArguments(dataset_name=str(file), test_split_size=0.1), seed=0)
    assert (len(train), len(held_out)) == (18, 2)
