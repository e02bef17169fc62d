"""Data files -> rows, with errors that name the file and the line.

Every reader yields `(number, row)`: the line of a JSONL file, the number of the record (from 1) elsewhere.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet

from orpo_dist.data.json_array import IrregularJson, array_of_objects
from orpo_dist.data.messages import without_nulls
from orpo_dist.data.pandas_json import pandas_rows
from orpo_dist.data.split_names import names_a_split, split_called
from orpo_dist.data.unique_keys import DECODER, RepeatedKey
from orpo_dist.errors import UserError

Numbered = Iterator[tuple[int, dict[str, Any]]]
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
csv.field_size_limit(1 << 30)  # Python's default of 128 KiB is less than one long conversation


def file_format(path: Path) -> str | None:
    """The format that a file's name announces, with or without `.gz`; None where it announces none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def read_file(path: Path, split: str) -> Numbered:
    """The rows of one file. `split` matters for a JSON file that holds several, under any word for it.

    Raises:
        UserError: not readable as what its name says, with the line.
    """
    kind = file_format(path)
    if kind is None:
        raise UserError(f"{path}: not one of the file types {', '.join(FORMATS)} (or one of these with .gz).")
    try:
        if kind == "parquet":
            yield from _read_parquet(path)
        elif kind in ("csv", "tsv"):
            yield from _read_csv(path, "\t" if kind == "tsv" else ",")
        elif kind == "jsonl":
            yield from _read_jsonl(path)
        else:
            yield from _read_json(path, split)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Convert it to UTF-8."
        ) from None
    except (OSError, EOFError, zlib.error) as error:  # the last two: compressed files that are cut or damaged
        raise UserError(f"{path}: cannot be read: {error}") from None


def _open(path: Path) -> IO[str]:
    # utf-8-sig: a byte order mark would become part of the first column's name
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _read_jsonl(path: Path) -> Numbered:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = DECODER.decode(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON: {error.msg} at column {error.colno}. Each line must hold "
                    "one JSON object."
                ) from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {_unreadable(error)}") from None
            yield number, _object(row, path, f"line {number}")


def _read_json(path: Path, split: str) -> Numbered:
    read = 0
    try:
        with _open(path) as file:
            for read, row in enumerate(array_of_objects(file), 1):
                yield read, row
        return
    except IrregularJson:
        pass  # an object, or an error, whose place the whole text tells
    with _open(path) as file:
        text = file.read()
    try:
        content = DECODER.decode(text)
    except json.JSONDecodeError as error:
        if _is_object(text.lstrip().split("\n", 1)[0]):  # JSON lines under the name .json
            yield from _read_jsonl(path)
            return
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {_unreadable(error)}") from None
    if isinstance(content, dict):
        content = _records(content, path, split)
    if not isinstance(content, list):
        raise UserError(f"{path}: holds one {type(content).__name__}, not a list of rows.")
    if content and isinstance(content[0], list):
        raise UserError(
            f"{path}: a list of lists, without the names of the columns (pandas' to_json(orient='values')). Write it "
            "with orient='records', lines=True."
        )
    for number, row in enumerate(content[read:], read + 1):
        yield number, _object(row, path, f"row {number}")


def _records(content: dict[str, Any], path: Path, split: str) -> Any:
    """The rows in a JSON object: rows by split, columns, `{"data": rows}`, or one row."""
    called = split_called(split, {key: () for key in content})
    if called is not None and isinstance(content[called], list):
        return content[called]
    if (rows := pandas_rows(content)) is not None:
        return rows
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    if lists and all(names_a_split(key) for key in content):
        raise UserError(f"{path}: no split `{split}` in it. Splits found: {', '.join(content)}.")
    if len(lists) == 1 and all(isinstance(row, dict) for row in next(iter(lists.values()))):
        return next(iter(lists.values()))
    if lists and len(lists) == len(content):
        if len({len(value) for value in lists.values()}) > 1:
            lengths = ", ".join(f"`{key}` {len(value)}" for key, value in lists.items())
            raise UserError(f"{path}: its columns have different lengths: {lengths}.")
        return [dict(zip(content, values, strict=True)) for values in zip(*content.values(), strict=True)]
    return [content]


def _read_csv(path: Path, delimiter: str) -> Numbered:
    """Every cell is text: an answer `42` or `NA` stays what it is, and an empty cell is empty text."""
    with _open(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)  # else an open quote takes in all rows below
        try:
            header = next(reader, None)
            if header is None:
                raise UserError(f"{path}: the file is empty.")
            if twice := sorted({name for name in header if name and header.count(name) > 1}):
                raise UserError(f"{path}: several columns are called `{twice[0]}`. Rename or remove all but one.")
            number = 0
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)}. Quote "
                        "cells that contain the separator or a line break."
                    )
                yield number, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not valid CSV: {error}.") from None


def _read_parquet(path: Path) -> Numbered:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: without_nulls(value) for name, value in row.items()}
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None


def _object(row: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{path}, {where}: {str(row)[:60]!r} is not a JSON object with named columns.")
    return row


def _unreadable(error: Exception) -> str:
    if isinstance(error, RepeatedKey):
        return str(error)
    if isinstance(error, RecursionError):
        return "JSON that is nested too deeply. Take the row out."
    return f"a number that cannot be read: {str(error).split(';')[0]}. Store it as text, or take the row out."


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
