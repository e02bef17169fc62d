"""The result of a preparation, written part by part and read back."""

import pytest
from datasets import Dataset, Features, Value

from orpo_dist.data.audit import DroppedRow
from orpo_dist.data.prepared_file import Note, PreparedWriter, read_prepared

FEATURES = Features(
    {
        **dict.fromkeys(("ids", "row", "truncated_prompt", "truncated_completions"), Value("int32")),
        **dict.fromkeys(("source", "column", "kind", "reason"), Value("string")),
    }
)


def audited(*rows: dict) -> Dataset:
    return Dataset.from_list([{**dict.fromkeys(FEATURES), "source": "a", **row} for row in rows], features=FEATURES)


def good(row: int, prompts: int = 0, completions: int = 0) -> dict:
    return {"row": row, "ids": row, "truncated_prompt": prompts, "truncated_completions": completions}


BAD = {"row": 3, "kind": "NaN", "reason": "nan"}


def test_parts_are_read_back_as_one(tmp_path):
    with PreparedWriter(tmp_path, FEATURES, ["ids", "row"], "text") as writer:
        writer.add(audited(good(1), good(2, completions=2)))
        writer.add(audited(BAD, good(4, prompts=1, completions=1)))
    found = read_prepared(tmp_path)
    assert found.dataset[:] == {"ids": [1, 2, 4], "row": [1, 2, 4]}
    assert found.dropped == [DroppedRow("a", 3, None, "NaN", "nan")]
    assert found.notes == [Note("completion cut", 2, "a", 2), Note("prompt cut", 1, "a", 4)]
    assert (found.format, found.rows) == ("text", 4)
    assert found.counts == {"truncated_prompt": 1, "truncated_completions": 3}


def test_no_good_row(tmp_path):
    with PreparedWriter(tmp_path, FEATURES, ["ids"], "text") as writer:
        writer.add(audited(BAD))
    assert len(read_prepared(tmp_path).dataset) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dropped.jsonl", "report.json"]


def test_an_error_leaves_no_report(tmp_path):
    with pytest.raises(ZeroDivisionError), PreparedWriter(tmp_path, FEATURES, ["ids"], "text"):
        raise ZeroDivisionError
    assert not (tmp_path / "report.json").exists()
