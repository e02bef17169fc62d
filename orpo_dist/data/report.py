"""What was read: files and rows, columns and the kinds of their values, and what was noted about rows."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pyarrow.compute
from datasets import Dataset

from orpo_dist.data.audit import DroppedRow, count_kinds
from orpo_dist.data.messages import decode
from orpo_dist.data.pairs import PairFormat
from orpo_dist.data.prepared_file import Note
from orpo_dist.data.rows import BATCH, SOURCE_COLUMN
from orpo_dist.data.streaming import in_parts
from orpo_dist.options.data import PrepareOptions

FILES = 20  # named, of a data set of many shards
ROLES = ("prompt", "chosen", "rejected", "system", "tools", "image")


def describe_files(rows: Dataset, name: str, split: str) -> list[str]:
    """The files of the split and how many rows came from each."""
    head = f"Read of {name}, split {split}: {len(rows)} rows"
    if SOURCE_COLUMN not in rows.column_names:
        return [f"{head}."]
    counts: Counter[str] = Counter()
    for part in in_parts(rows.select_columns([SOURCE_COLUMN])):
        for table in part.with_format("arrow").iter(batch_size=BATCH):
            for item in pyarrow.compute.value_counts(table[SOURCE_COLUMN].combine_chunks()).to_pylist():
                counts[decode(item["values"])] += item["counts"]
    lines = [f"{head} from {len(counts)} {'file' if len(counts) == 1 else 'files'}."]
    lines += [f"  {file}: {count} rows" for file, count in list(counts.items())[:FILES]]
    if len(counts) > FILES:
        lines.append(f"  and {len(counts) - FILES} more files")
    return lines


def describe_columns(
    columns: Sequence[str], sample: Sequence[dict[str, Any]], pair_format: PairFormat, options: PrepareOptions
) -> list[str]:
    """Each column that is read, why it is read as that, and what its first values are; and the columns that are not."""
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    lines, read = [], []
    for role in ROLES:
        column = getattr(pair_format, role)
        option = f"{role}_column"
        if not column:
            if given[option] == "":
                lines.append(f"  {role}: no column, as {option}='' says")
            continue
        read.append(column)
        why = f"as {option} says" if given[option] else "by its name"
        kinds = Counter(_kind(decode(row[column])) for row in sample)
        values = ", ".join(kind if len(kinds) == 1 else f"{count} {kind}" for kind, count in kinds.most_common())
        lines.append(f"  {role}: column `{column}`, {why}; the first {len(sample)} rows hold {values}")
    more = (*pair_format.joined, pair_format.history, pair_format.template_kwargs)
    if others := [name for name in more if name and name not in read]:
        read += others
        lines.append(f"  read too: {', '.join(f'`{name}`' for name in others)}")
    if unread := [column for column in columns if column not in read and not column.startswith("_")]:
        lines.append(f"  not read: {', '.join(f'`{column}`' for column in unread)}")
    return lines


def describe_dropped(dropped: list[DroppedRow], examples: int) -> list[str]:
    """The bad rows by kind, with the first of each."""
    lines = []
    for kind, count in count_kinds(dropped).items():
        lines.append(f"  {count} x {kind}")
        lines += [f"    {row.describe()}" for row in [row for row in dropped if row.kind == kind][:examples]]
    return lines


def describe_notes(notes: Sequence[Note]) -> list[str]:
    """What is noted about rows that are kept, with the first row of each."""
    return [f"  note: {note.rows} x {note.kind}, first in {note.source}, row {note.row}" for note in notes]


def _kind(value: Any) -> str:
    """What a cell holds, as a word of docs/data.md."""
    if value is None or value == "" or value == []:
        return "nothing"
    if isinstance(value, str):
        return "text that spells a list or an object" if value.strip()[:1] in ("[", "{") else "text"
    if isinstance(value, bool | int | float):
        return "NaN" if isinstance(value, float) and math.isnan(value) else "numbers"
    first = value[0] if isinstance(value, list) else value
    if isinstance(first, dict):
        if "role" in first:
            return "messages (`role`)" if isinstance(value, list) else "one message (`role`)"
        if "from" in first:
            return "messages (`from`)" if isinstance(value, list) else "one message (`from`)"
        return "objects"
    return "lists" if isinstance(value, list) else type(value).__name__
