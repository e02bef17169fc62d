import math

import pyarrow.parquet
from datasets import Dataset, IterableDataset

from orpo_dist.data.messages import decode
from orpo_dist.data.rows import dataset_from_rows, materialise, parquet_schema, save_parquet

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


def test_numbers_and_nulls_inside_of_values_are_kept():
    values = [{"x": 1}, {"x": 1.5}, {"x": None}]
    for name in ("flat", "nested"):
        rows = [{"a": value if name == "flat" else [{"arguments": value}]} for value in values]
        stored = decoded(dataset_from_rows(rows))
        assert stored == rows
        first = stored[0]["a"] if name == "flat" else stored[0]["a"][0]["arguments"]
        assert isinstance(first["x"], int)


def test_images_stay_bytes():
    image = {"bytes": b"\x89PNG", "path": None}
    assert dataset_from_rows([{"images": [image]}])[0] == {"images": [image]}


def test_half_a_character_is_kept_for_the_audit(tmp_path):
    rows = [{"a": "good", "b": 1}, {"a": "cut off \ud83d", "b": 10**30}]
    assert decoded(dataset_from_rows(rows)) == rows
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert decoded(Dataset.from_file(str(materialise(stream, tmp_path)))) == rows


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


def test_parquet_files_of_one_schema_are_not_read_into_memory(tmp_path):
    """Their rows are those of the other readers, in batches."""
    tables = [{"prompt": [f"p{i}" for i in range(start, start + 250)]} for start in (0, 250)]
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for file, table in zip(files, tables, strict=True):
        pyarrow.parquet.write_table(pyarrow.table(table), file)
    schema = parquet_schema(files)
    save_parquet(files, schema, tmp_path / "saved.arrow")
    saved = Dataset.from_file(str(tmp_path / "saved.arrow"))
    assert saved["prompt"][:] == [f"p{i}" for i in range(500)]
    assert saved["_row"][:] == [*range(1, 251)] * 2 and saved["_source"][249:251] == [str(file) for file in files]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [1]}), files[1])
    assert parquet_schema(files) is None and parquet_schema([tmp_path / "c.jsonl"]) is None
    assert list(tmp_path.glob(".*")) == []
