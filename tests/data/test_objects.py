"""What may be given to prepare_pairs in Python."""

import numpy
import pandas
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from orpo_dist.data.objects import rows_of
from orpo_dist.data.prepare import as_dataset, prepare_pairs
from orpo_dist.errors import UserError
from orpo_dist.options.data import PrepareOptions

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Q{n}"}],
        "chosen": [{"role": "assistant", "content": "Yes"}],
        "rejected": [{"role": "assistant", "content": "No"}],
    }
    for n in range(3)
]


def parquet_frame(folder) -> pandas.DataFrame:
    pandas.DataFrame(ROWS).to_parquet(folder / "a.parquet")
    return pandas.read_parquet(folder / "a.parquet")


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: ROWS,
        lambda folder: tuple(ROWS),
        lambda folder: (row for row in ROWS),
        lambda folder: [{**row, "prompt": tuple(row["prompt"])} for row in ROWS],
        lambda folder: {name: [row[name] for row in ROWS] for name in ROWS[0]},
        parquet_frame,
        lambda folder: parquet_frame(folder).to_dict("records"),
        lambda folder: parquet_frame(folder).to_dict("list"),
        lambda folder: Dataset.from_list(ROWS).with_format("numpy"),
        lambda folder: Dataset.from_list(ROWS).with_format("pandas"),
        lambda folder: Dataset.from_list(ROWS).with_format("torch"),
        lambda folder: IterableDataset.from_generator(lambda: iter(ROWS)),
    ],
    ids=[
        "list",
        "tuple",
        "generator",
        "tuples",
        "columns",
        "frame",
        "records",
        "lists",
        "numpy",
        "pandas",
        "torch",
        "stream",
    ],
)
def test_the_same_tokens_whatever_the_container(make, chat_tokenizer, tmp_path):
    prepared = prepare_pairs(make(tmp_path), chat_tokenizer, PrepareOptions())
    texts = [chat_tokenizer.decode(row["prompt_ids"]) for row in prepared.dataset]
    assert texts == [f"<|im_start|>user\nQ{n}<|im_end|>\n<|im_start|>assistant\n" for n in range(3)]


def test_numpy_values():
    (row,) = as_dataset([{"a": numpy.int64(3), "b": numpy.float32(0.5), "c": numpy.array(["x", "y"])}], "train")
    assert row == {"a": 3, "b": {"__json__": "0.5"}, "c": ["x", "y"]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (DatasetDict({"train": Dataset.from_list(ROWS)}), "the splits train: choose one"),
        ({"a": Dataset.from_list(ROWS)}, "the splits a: choose one"),
        (
            IterableDatasetDict({"train": IterableDataset.from_generator(lambda: iter(ROWS))}),
            "the splits train: choose",
        ),
        ("pairs.jsonl", "give a `datasets` object"),
        (3, "give a `datasets` object"),
        ([["a", "b"]], "row 0: .* is not a mapping with named columns"),
        ({"a": [1], "b": [1, 2]}, "different lengths: `a` 1, `b` 2"),
        ({"prompt": "a"}, "one list per column"),
    ],
)
def test_what_holds_no_rows(given, message):
    with pytest.raises(UserError, match=message):
        rows_of(given, "train")


def test_nesting_without_end_names_the_row():
    deep = value = []
    for _ in range(5000):
        value.append([])
        value = value[0]
    with pytest.raises(UserError, match="row 1: a value is nested too deeply"):
        as_dataset([ROWS[0], {**ROWS[0], "extra": deep}], "train")


def test_a_column_whose_name_is_not_text():
    with pytest.raises(UserError, match=r"row 0: the column's name .* holds half of a character"):
        as_dataset([{**ROWS[0], "\ud83d": 1}], "train")
