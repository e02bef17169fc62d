import pytest
from datasets import Dataset

from orpo_dist.packing.token_ids import first_unknown, inside, largest_token

ROWS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]},
    {"prompt_ids": [5], "chosen_ids": [90, 9], "rejected_ids": [12]},
]


@pytest.mark.parametrize("rows", [ROWS, Dataset.from_list(ROWS)], ids=["list", "dataset"])
def test_the_largest_token_and_where_it_is(rows):
    assert largest_token(rows) == 90
    assert first_unknown(rows, 90, set()) == (1, "chosen_ids", 90)
    assert first_unknown(rows, 12, {90}) == (1, "rejected_ids", 12)
    assert first_unknown(rows, 91, set()) is None


def test_no_rows_have_no_token():
    assert largest_token([]) == -1 and largest_token(Dataset.from_list(ROWS).select([])) == -1


@pytest.mark.parametrize(("token", "known"), [(None, None), (-1, None), (0, 0), (9, 9), (10, None)])
def test_inside(token, known):
    assert inside(token, 10) == known
