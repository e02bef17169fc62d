import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from orpo_dist.data.files import file_format, read_file
from orpo_dist.errors import UserError

ROWS = [{"prompt": "p1", "chosen": "42", "rejected": "b"}, {"prompt": "p2", "chosen": "NA", "rejected": "c\nd"}]


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_json_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]) + "\n")
    assert list(read_file(path, "train")) == [(1, ROWS[0]), (3, ROWS[1])]


def test_json_lines_compressed(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode()))
    assert list(read_file(path, "train")) == [(1, ROWS[0])]


@pytest.mark.parametrize(
    "content",
    [
        ROWS,
        {"train": ROWS, "test": []},
        {"data": ROWS},
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
    ],
    ids=["list", "splits", "data", "columns"],
)
def test_json_layouts(tmp_path, content):
    path = write(tmp_path / "a.json", json.dumps(content, indent=1))
    assert list(read_file(path, "train")) == [(1, ROWS[0]), (2, ROWS[1])]


def test_json_lines_named_json(tmp_path):
    path = write(tmp_path / "a.json", "".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row for _, row in read_file(path, "train")] == ROWS


@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_cells_are_text(tmp_path, name, separator):
    text = separator.join(["\ufeffprompt", "chosen", "rejected"]) + "\r\n"
    text += separator.join(["p1", "42", "b"]) + "\r\n" + separator.join(["p2", "NA", '"c\nd"']) + "\r\n"
    assert list(read_file(write(tmp_path / name, text), "train")) == [(1, ROWS[0]), (2, ROWS[1])]


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_file(tmp_path / "a.parquet", "train")) == [(1, ROWS[0]), (2, ROWS[1])]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n["b"]\n', "a.jsonl, line 2: .* is not a JSON object"),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}\n]', "a.json, line 3: not valid JSON"),
        ("a.json", b"3", "holds one int"),
        ("a.json", b'{"a": [1], "b": [1, 2]}', "different lengths: `a` 1, `b` 2"),
        ("a.json", b'{"test": [{"a": 1}]}', "no split `train` in it. Splits found: test"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv, line 3: 3 cells, but the header has 2"),
        ("a.csv", b"", "the file is empty"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8 text"),
        ("a.parquet", b"nonsense", "not a readable Parquet file"),
        ("a.jsonl.gz", b"nonsense", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 99, "a.jsonl.gz: cannot be read"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}\n", "a.jsonl, line 2: a number that cannot be read"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 200_000 + b"\n", "a.jsonl, line 2: "),
        ("a.json", b'[{"a": ' + b"9" * 5000 + b"}]", "a.json: a number that cannot be read"),
        ("a.json", b"[" * 200_000, "a.json: JSON that is nested too deeply"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', "a.jsonl, line 2: the key `a` is in one object twice"),
        ("a.json", b'[{"a": {"b": "x", "b": "y"}}]', "a.json: the key `b` is in one object twice"),
        ("a.txt", b"text", "not one of the file types"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_file(tmp_path / name, "train"))


def test_file_format():
    assert file_format(Path("a.b.JSONL.gz")) == "jsonl"
    assert file_format(Path("README")) is None


@pytest.mark.parametrize("split, rows", [("validation", ROWS), ("eval", ROWS), ("dev", ROWS), ("train", [])])
def test_a_split_within_a_json_file_under_another_word(tmp_path, split, rows):
    path = write(tmp_path / "a.json", json.dumps({"train": [], "dev": ROWS}))
    assert [row for _, row in read_file(path, split)] == rows
