import json
import pickle

import pytest

from orpo_dist.data.audit import ADVICE, DroppedRow, check_bad_rows, write_dropped_rows
from orpo_dist.errors import BadRow, UserError
from orpo_dist.options.data import PrepareOptions

BAD = [
    DroppedRow("a.jsonl", 3, "chosen", "empty completion", "no text"),
    DroppedRow("a.jsonl", 9, "prompt", "prompt too long", "1300 tokens"),
    DroppedRow("a.jsonl", 12, "prompt", "prompt too long", "1400 tokens"),
]


@pytest.mark.parametrize("limit", [0.03, 0.5, 3, 10])
def test_as_many_as_allowed(limit):
    check_bad_rows(BAD, 100, PrepareOptions(max_bad_rows=limit), "train")


@pytest.mark.parametrize("limit", [0, 0.02, 0.0299, 1, 2])
def test_more_than_allowed(limit, tmp_path):
    with pytest.raises(UserError) as caught:
        check_bad_rows(BAD, 100, PrepareOptions(max_bad_rows=limit), "train", tmp_path / "dropped_rows.jsonl")
    message = str(caught.value)
    assert message.startswith(f"train: 3 of 100 rows are bad, more than max_bad_rows={limit}")
    assert "2 x prompt too long. First: a.jsonl, row 9, column `prompt`: 1300 tokens" in message
    assert "Set max_prompt_length to cut long prompts" in message
    assert "1 x empty completion" in message and str(tmp_path / "dropped_rows.jsonl") in message
    assert message.endswith("To train without them set max_bad_rows=3.")


def test_one_means_one_row_and_not_all():
    with pytest.raises(UserError, match="max_bad_rows=1 allows"):
        check_bad_rows(BAD[:2], 100, PrepareOptions(max_bad_rows=1), "train")


def test_nothing_left_is_an_error_whatever_is_allowed():
    with pytest.raises(UserError, match="no rows left: all 3 rows are bad"):
        check_bad_rows(BAD, 3, PrepareOptions(max_bad_rows=10), "train")
    with pytest.raises(UserError, match="has no rows"):
        check_bad_rows([], 0, PrepareOptions(), "train")


def test_error_policy_stops_at_the_first():
    with pytest.raises(UserError, match=r"a\.jsonl, row 3, column `chosen`: no text") as caught:
        check_bad_rows(BAD, 100, PrepareOptions(on_bad_row="error", max_bad_rows=10), "train")
    assert ADVICE["empty completion"] in str(caught.value)


def test_report_of_several_data_sets(tmp_path):
    path = tmp_path / "run" / "dropped_rows.jsonl"
    write_dropped_rows(path, "train", BAD)
    write_dropped_rows(path, "eval", BAD[:1])
    write_dropped_rows(path, "train", BAD[1:])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["dataset"], line["row"]) for line in lines] == [("eval", 3), ("train", 9), ("train", 12)]
    assert lines[0] == {
        "dataset": "eval",
        "source": "a.jsonl",
        "row": 3,
        "column": "chosen",
        "kind": "empty completion",
        "reason": "no text",
    }
    assert [file.name for file in path.parent.iterdir()] == ["dropped_rows.jsonl"]


def test_a_bad_row_crosses_processes():
    bad = pickle.loads(pickle.dumps(BadRow("NaN", "chosen", "NaN here")))
    assert (bad.kind, bad.column, bad.reason) == ("NaN", "chosen", "NaN here")
