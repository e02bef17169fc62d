import math

from datasets import Dataset, IterableDataset

from orpo_dist.data.messages import decode
from orpo_dist.data.rows import content_digest, dataset_from_rows, materialise

MIXED = [
    {"a": "42", "tools": [{"arguments": {"x": 1}}]},
    {"a": 42, "tools": [{"arguments": {"y": "z"}}]},
    {"a": [{"role": "user"}], "b": float("nan")},
    {"a": None},
]


def decoded(dataset: Dataset) -> list[dict]:
    rows = [{name: decode(value) for name, value in row.items()} for row in dataset]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def test_values_survive_columns_of_mixed_types():
    rows = decoded(dataset_from_rows(MIXED))
    assert rows[:2] == MIXED[:2] and rows[3] == {}
    assert rows[2]["a"] == MIXED[2]["a"] and math.isnan(rows[2]["b"])


def test_uniform_columns_stay_plain():
    messages = [{"role": "user", "content": "Hi"}]
    dataset = dataset_from_rows([{"a": "x", "m": messages}, {"a": None, "m": messages}])
    assert dataset[:] == {"a": ["x", None], "m": [messages, messages]}


def test_a_stream_on_disk_has_the_same_values(tmp_path):
    def rows():
        yield from MIXED

    dataset = Dataset.from_file(str(materialise(IterableDataset.from_generator(rows), tmp_path)))
    assert dataset.column_names == ["a", "tools", "b"]
    assert decoded(dataset)[:2] == MIXED[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.arrow"]


def test_the_digest_is_of_the_content():
    rows = [{"a": str(i)} for i in range(2500)]
    dataset = dataset_from_rows(rows)
    digest = content_digest(dataset)
    assert content_digest(Dataset.from_list(rows)) == digest
    assert content_digest(dataset.select(range(2500))) == digest
    assert content_digest(dataset_from_rows([*rows[:-1], {"a": "other"}])) != digest
    assert content_digest(dataset.shuffle(seed=1)) != digest
    assert content_digest(dataset.rename_column("a", "b")) != digest
