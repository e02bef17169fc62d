"""What `data check` says that it read."""

from datasets import Dataset

from orpo_dist.data.audit import DroppedRow
from orpo_dist.data.prepare import format_of, sample_of
from orpo_dist.data.prepared_file import Note
from orpo_dist.data.report import describe_columns, describe_dropped, describe_files, describe_notes
from orpo_dist.data.rows import dataset_from_rows
from orpo_dist.options.data import PrepareOptions

ROWS = [
    {"prompt": f"p{i}", "good": [{"role": "assistant", "content": "g"}], "rejected": "r", "id": i} for i in range(3)
]


def columns(rows, **given) -> list[str]:
    dataset, options = dataset_from_rows(rows), PrepareOptions(**given)
    return describe_columns(dataset.column_names, sample_of(dataset), format_of(dataset, options), options)


def test_files_and_their_rows():
    rows = Dataset.from_dict({"prompt": ["p"] * 2500, "_source": ["b.jsonl"] * 1500 + ["a.jsonl"] * 1000})
    assert describe_files(rows, "folder", "test[:5]") == [
        "Read of folder, split test[:5]: 2500 rows from 2 files.",
        "  b.jsonl: 1500 rows",
        "  a.jsonl: 1000 rows",
    ]
    assert describe_files(rows.select(range(5)), "folder", "train")[1:] == ["  b.jsonl: 5 rows"]
    assert describe_files(rows.remove_columns("_source"), "a/b", "train") == ["Read of a/b, split train: 2500 rows."]
    many = Dataset.from_dict({"_source": [f"{i}.jsonl" for i in range(25)]})
    assert describe_files(many, "a", "train")[-1] == "  and 5 more files"


def test_columns_and_why_they_are_read():
    assert columns(ROWS, chosen_column="good", system_column="") == [
        "  prompt: column `prompt`, by its name; the first 3 rows hold text",
        "  chosen: column `good`, as chosen_column says; the first 3 rows hold messages (`role`)",
        "  rejected: column `rejected`, by its name; the first 3 rows hold text",
        "  system: no column, as system_column='' says",
        "  not read: `id`",
    ]


def test_columns_that_are_read_with_others_are_not_called_unread():
    row = {"instruction": "Q", "input": "x", "history": [], "chosen": "a", "rejected": "b", "chat_template_kwargs": {}}
    lines = columns([row], prompt_column="instruction")
    assert lines[-1] == "  read too: `input`, `history`, `chat_template_kwargs`"


def test_values_of_several_kinds():
    rows = [{"prompt": "p", "chosen": "c", "rejected": "[1]"}] * 3
    rows += [{"prompt": 7, "chosen": None, "rejected": {"from": "gpt", "value": "r"}}]
    assert [line.split("rows hold ")[1] for line in columns(rows)] == [
        "3 text, 1 numbers",
        "3 text, 1 nothing",
        "3 text that spells a list or an object, 1 one message (`from`)",
    ]


def test_bad_rows_by_kind_with_the_first_of_each():
    dropped = [DroppedRow("a", row, "chosen", "NaN", "nan") for row in range(5)]
    dropped.append(DroppedRow("a", 9, None, "bad tools", "none"))
    assert describe_dropped(dropped, 2) == [
        "  5 x NaN",
        "    a, row 0, column `chosen`: nan",
        "    a, row 1, column `chosen`: nan",
        "  1 x bad tools",
        "    a, row 9: none",
    ]


def test_notes_with_the_first_row_of_each():
    assert describe_notes([Note("prompt cut", 3, "a.jsonl", 7)]) == ["  note: 3 x prompt cut, first in a.jsonl, row 7"]
