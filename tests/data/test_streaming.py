"""Rows written one batch after another have the columns and values of all rows at once."""

import json
import random

import pyarrow
import pytest
from datasets import Dataset

from orpo_dist.data import streaming
from orpo_dist.data.messages import decode
from orpo_dist.data.rows import dataset_from_rows
from orpo_dist.data.streaming import content_digest, each_row, in_parts, write_rows

MESSAGE = {"role": "user", "content": "Hi"}
VALUES = [
    None,
    "text",
    42,
    4.5,
    True,
    [],
    [MESSAGE],
    [{"content": "Hi", "role": "user"}],
    [{**MESSAGE, "name": None}],
    [{**MESSAGE, "name": "x"}],
    [{**MESSAGE, "calls": []}],
    [{**MESSAGE, "calls": [{"n": 1}]}],
    [{**MESSAGE, "calls": [{"n": 1.5}]}],
    {"from": "gpt", "value": "x"},
    2**70,
]


def written(rows, folder) -> Dataset:
    target = folder / "rows.arrow"
    assert write_rows(iter(rows), target) == len(rows)
    assert [path.name for path in folder.iterdir()] == ["rows.arrow"]
    return Dataset.from_file(str(target))


def spelled(dataset: Dataset) -> list[str]:
    """The rows with every type and order of keys."""
    return [json.dumps({name: decode(value) for name, value in row.items()}) for row in dataset]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(streaming, "BATCH_ROWS", 2)
    monkeypatch.setattr(streaming, "FIRST_ROWS", 2)


@pytest.mark.parametrize("seed", range(60))
def test_as_all_rows_at_once(seed, tmp_path, small_batches):
    chance = random.Random(seed)
    kinds = {name: chance.sample(VALUES, chance.randint(1, 3)) for name in "abc"}
    rows = []
    for number in range(chance.randint(1, 9)):
        names = [name for name in kinds if number > 3 or name != "c"]  # a column that comes late
        rows.append({name: chance.choice(kinds[name]) for name in names})
    expected = dataset_from_rows(rows)
    found = written(rows, tmp_path)
    complete = [json.dumps({name: row.get(name) for name in expected.column_names}) for row in rows]
    assert found.column_names == expected.column_names
    assert spelled(found) == spelled(expected) == complete
    assert found.features == expected.features


def test_no_rows(tmp_path):
    assert write_rows(iter([]), tmp_path / "rows.arrow") == 0
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_source_is_passed_on(tmp_path):
    def rows():
        yield {"a": 1}
        raise ValueError("line 2")

    with pytest.raises(ValueError, match="line 2"):
        write_rows(rows(), tmp_path / "rows.arrow")


def test_batches_of_large_rows_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BATCH_BYTES", 10_000)
    write_rows(({"a": "x" * 1000} for _ in range(500)), tmp_path / "rows.arrow")
    with pyarrow.ipc.open_stream(tmp_path / "rows.arrow") as stream:
        assert max(batch.num_rows for batch in list(stream)[1:]) <= 10


def test_parts_have_mappings_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PART_BYTES", 2000)
    monkeypatch.setattr(streaming, "READ_ROWS", 100)
    rows = [{"a": str(number)} for number in range(3000)]
    dataset = written(rows, tmp_path)
    parts = list(in_parts(dataset))
    assert len(parts) > 5 and [row for part in parts for row in part] == rows
    assert list(each_row(dataset)) == rows
    addresses = {part.data["a"].chunk(0).buffers()[2].address for part in parts[:2]}
    assert len(addresses) == 2
    assert list(each_row(dataset_from_rows(rows))) == rows
    assert list(each_row(dataset.select([5, 3]))) == [rows[5], rows[3]]


def test_the_digest_is_of_the_content():
    rows = [{"a": str(i)} for i in range(2500)]
    dataset = dataset_from_rows(rows)
    digest = content_digest(dataset)
    assert content_digest(Dataset.from_list(rows)) == digest
    assert content_digest(dataset.select(range(2500))) == digest
    assert content_digest(dataset_from_rows([*rows[:-1], {"a": "other"}])) != digest
    assert content_digest(dataset.shuffle(seed=1)) != digest
    assert content_digest(dataset.rename_column("a", "b")) != digest
