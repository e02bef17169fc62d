"""Words for splits."""

from pathlib import Path

import pytest

from orpo_dist.data.split_names import names_a_split, split_called


@pytest.mark.parametrize(
    "asked, splits, found",
    [
        ("train", {"train": []}, "train"),
        ("valid", {"train": [], "val": []}, "val"),
        ("validation", {"dev": [], "val": []}, None),  # which of them is not known
        ("test", {"train": [], "evaluation": []}, None),  # `evaluation` may be either
        ("eval", {"validation": [], "test": []}, "validation"),
        ("eval", {"validation": [], "test": [Path("my_eval-1.csv")]}, "test"),
        ("eval", {"validation": [], "test": [Path("medieval.csv")]}, "validation"),
        ("eval", {"test": []}, "test"),
        ("eval", {"evaluation": [], "test": []}, "evaluation"),
        ("gold", {"train": []}, None),
        ("train", {"train_prefs": [], "train_sft": []}, None),
    ],
)
def test_the_split_that_a_word_means(asked, splits, found):
    assert split_called(asked, splits) == found


def test_words_that_datasets_knows():
    assert all(names_a_split(word) for word in ("train", "training", "val", "dev", "valid", "eval", "testing"))
    assert not any(names_a_split(word) for word in ("prompt", "data", "train_prefs"))
