"""Rows one after another -> an Arrow file, and that file in parts, in memory that does not grow with the rows.

As Python objects, rows of message lists take about 7 KB each. Pages of a memory-mapped file count as resident until the
mapping is closed, so a pass over all rows opens the file anew for every part.
"""

import itertools
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset

from orpo_dist.data.cache import digest
from orpo_dist.data.rows import arrow_bytes, json_column, plain_column

JSON_TYPE = json_column([None]).type
# Of an Arrow batch. Opening a file maps 64 KiB of each of its batches, so they are not small.
BATCH_ROWS, BATCH_BYTES = 4000, 16 << 20
READ_ROWS = 1000  # made into Python objects at a time
FIRST_ROWS = 100  # before anything is known of their size
PART_BYTES = 64 << 20  # of the rows that are mapped at a time


@dataclass
class _Segment:
    """An Arrow file of batches with one schema."""

    path: Path
    schema: pyarrow.Schema
    sink: pyarrow.NativeFile = field(init=False)
    writer: pyarrow.ipc.RecordBatchStreamWriter = field(init=False)

    def __post_init__(self) -> None:
        self.sink = pyarrow.OSFile(str(self.path), "wb")
        self.writer = pyarrow.ipc.new_stream(self.sink, self.schema)

    def close(self) -> None:
        self.writer.close()
        self.sink.close()


def write_rows(rows: Iterable[dict[str, Any]], target: Path) -> int:
    """Writes the rows to the Arrow file `target`, in the columns and types of `dataset_from_rows`; returns how many.

    A column's type is that of all rows, and is known when all are read. What was written under a type that did not last
    is written again, from the file and not from the source.
    """
    segments: list[_Segment] = []
    types: dict[str, pyarrow.DataType] = {}
    count, size, source = 0, FIRST_ROWS, iter(rows)
    try:
        while batch := list(itertools.islice(source, size)):
            table = _batch(batch, types)
            if not segments or segments[-1].schema != table.schema:
                if segments:
                    segments[-1].close()
                segments.append(_Segment(target.with_name(f"{target.name}.{len(segments)}"), table.schema))
            segments[-1].writer.write_batch(table)
            count += len(batch)
            size = max(1, min(BATCH_ROWS, BATCH_BYTES * len(batch) // max(1, table.nbytes)))
    finally:
        if segments:
            segments[-1].close()
    if not segments:
        return 0
    final = pyarrow.schema(
        [(name, pyarrow.string() if kind == pyarrow.null() else kind) for name, kind in types.items()]
    )
    if len(segments) == 1 and segments[0].schema == final:
        segments[0].path.rename(target)
        return count
    with pyarrow.OSFile(str(target), "wb") as sink, pyarrow.ipc.new_stream(sink, final) as writer:
        for segment in segments:
            with pyarrow.OSFile(str(segment.path), "rb") as file, pyarrow.ipc.open_stream(file) as stream:
                for table in stream:
                    columns = [_as_type(table, name, kind) for name, kind in zip(final.names, final.types, strict=True)]
                    writer.write_batch(pyarrow.record_batch(columns, schema=final))
            segment.path.unlink()
    return count


def _batch(rows: list[dict[str, Any]], types: dict[str, pyarrow.DataType]) -> pyarrow.RecordBatch:
    """The rows with the types so far; `types` becomes what holds these rows too."""
    types |= {name: pyarrow.null() for row in rows for name in row if name not in types}
    columns = []
    for name, before in types.items():
        values = [row.get(name) for row in rows]
        column = None if before == JSON_TYPE else plain_column(values)
        kind = None if column is None else _common(before, column.type)
        if column is None or kind is None:
            column, kind = json_column(values), JSON_TYPE
        elif column.type != kind:
            column = pyarrow.array(column.to_pylist(), type=kind)
        types[name] = kind
        columns.append(column)
    return pyarrow.record_batch(columns, names=list(types))


def _common(one: pyarrow.DataType, other: pyarrow.DataType) -> pyarrow.DataType | None:
    """The type that holds values of both unchanged; None: there is none."""
    if one == other or other == pyarrow.null():
        return one
    if one == pyarrow.null():
        return other
    if pyarrow.types.is_list(one) and pyarrow.types.is_list(other):
        inner = _common(one.value_type, other.value_type)
        return None if inner is None else pyarrow.list_(inner)
    if pyarrow.types.is_struct(one) and pyarrow.types.is_struct(other):
        fields, others = list(one), list(other)
        if [item.name for item in fields] != [item.name for item in others]:
            return None  # a missing key would become a null, and the order of keys is what a template may print
        kinds = [_common(a.type, b.type) for a, b in zip(fields, others, strict=True)]
        if any(kind is None for kind in kinds):
            return None
        return pyarrow.struct([(item.name, kind) for item, kind in zip(fields, kinds, strict=True)])
    return None


def _as_type(table: pyarrow.RecordBatch, name: str, kind: pyarrow.DataType) -> pyarrow.Array:
    if name not in table.schema.names:
        return pyarrow.nulls(table.num_rows, kind)
    column = table.column(name)
    if column.type == kind:
        return column
    return json_column(column.to_pylist()) if kind == JSON_TYPE else pyarrow.array(column.to_pylist(), type=kind)


# -- reading --


def in_parts(dataset: Dataset) -> Iterator[Dataset]:
    """The data set in parts, in order. The memory of a part is given back when the caller drops it."""
    if not len(dataset):
        return
    first = dataset.with_format("arrow")[:READ_ROWS]  # the size of all rows would map the offsets of all
    rows = PART_BYTES * first.num_rows // max(1, first.nbytes)
    rows = max(1, rows // READ_ROWS) * READ_ROWS  # so that batches do not depend on where a part ends
    for start in range(0, len(dataset), rows):
        part = dataset.select(range(start, min(start + rows, len(dataset))))
        # A memory-mapped table is pickled as the file's name: the copy has a mapping of its own.
        yield pickle.loads(pickle.dumps(part)) if part.cache_files else part


def content_digest(dataset: Dataset) -> str:
    """A name for the rows of `dataset`: equal content, equal name, whatever file or fingerprint it has."""
    messages = (message for part in in_parts(dataset) for message in arrow_bytes(part))
    return digest(itertools.chain([str(dataset.features).encode()], messages))


def each_row(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows as Python objects, in memory that does not grow with them."""
    for part in in_parts(dataset):
        for batch in part.iter(batch_size=READ_ROWS):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
