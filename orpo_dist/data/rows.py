"""Rows as Python objects or as a stream -> `datasets.Dataset`, without changing a value.

Arrow columns have one type. Where that would change a value ("42" beside 42, a tool call's arguments, which would get
the keys of all other calls) the column holds {"__json__": text}; messages.decode undoes it. Images in memory become
{"bytes": PNG, "path": None}, and inside of JSON a data URL.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    LargeList,
    List,
    Value,
)
from datasets.arrow_writer import ArrowWriter

from orpo_dist.data.messages import JSON_KEY, without_nulls
from orpo_dist.errors import UserError
from orpo_dist.images.decode import stored_in_memory

SOURCE_COLUMN = "_source"  # the file a row came from
ROW_COLUMN = "_row"  # its number there
BATCH = 1000
ARROW_LEVELS = 32  # of nesting in a column; Arrow's own bound when columns are exchanged is 64
PARQUET_BATCH, PARQUET_BYTES = 100, 4 << 20  # rows with images are large


def dataset_from_rows(rows: Sequence[dict[str, Any]]) -> Dataset:
    """The rows as a data set whose columns are the union of their keys; a missing key is None.

    Raises:
        UserError: a value that is nested too deeply, or a column's name that is not text.
    """
    encoded = [encoded_row(row, index) for index, row in enumerate(rows)]
    columns = dict.fromkeys(key for row in encoded for key in row)
    return Dataset(pyarrow.table({name: _column([row.get(name) for row in encoded]) for name in columns}))


def encoded_row(row: dict[str, Any], index: int) -> dict[str, Any]:
    """The row as Python's own types, with its images encoded. `index` names a row that is from no file.

    Raises:
        UserError: a value that is nested too deeply, or a column's name that is not text.
    """
    where = f"{row[SOURCE_COLUMN]}, row {row[ROW_COLUMN]}" if SOURCE_COLUMN in row else f"row {index}"
    try:
        encoded = {str(name): _encoded(value) for name, value in row.items()}
    except RecursionError:
        raise UserError(f"{where}: a value is nested too deeply. Take the row out.") from None
    for name in encoded:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: the column's name {name!r} holds half of a character. Rename it.") from None
    return encoded


def _column(values: list[Any]) -> pyarrow.Array | pyarrow.ChunkedArray:
    array = plain_column(values)
    if array is None:
        return json_column(values)
    return array if array.type != pyarrow.null() else array.cast(pyarrow.string())


def plain_column(values: list[Any]) -> pyarrow.Array | pyarrow.ChunkedArray | None:
    """The values as Arrow's own types; None where that would change one of them."""
    try:
        array = pyarrow.array(values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError, OverflowError):
        return None  # also a column of images with more than 2 GiB
    except UnicodeEncodeError:
        return None  # half of a surrogate pair, which JSON can hold as its escape; messages.py makes it a bad row
    if not _is_exact(array) or array.to_pylist() != values:
        return None
    return array if all(_in_order(value, array.type) for value in values) else None


def json_column(values: list[Any]) -> pyarrow.Array:
    """The values as JSON text, which `messages.decode` undoes."""
    cells = [None if value is None else {JSON_KEY: _dumps(value)} for value in values]
    return pyarrow.array(cells, type=pyarrow.struct([(JSON_KEY, pyarrow.string())]))


def _in_order(value: Any, kind: pyarrow.DataType) -> bool:
    """Whether the keys of all objects have the order of the type's fields: a template may print them."""
    if value is None or not pyarrow.types.is_nested(kind):
        return True
    if pyarrow.types.is_list(kind):
        return not pyarrow.types.is_nested(kind.value_type) or all(_in_order(item, kind.value_type) for item in value)
    fields = list(kind)
    if list(value) != [field.name for field in fields]:
        return False
    return all(_in_order(value[field.name], field.type) for field in fields if pyarrow.types.is_nested(field.type))


def _is_exact(array: pyarrow.Array | pyarrow.ChunkedArray, levels: int = ARROW_LEVELS) -> bool:
    """Whether Arrow tells the values apart as JSON does: 1 from 1.0 (one of them makes a whole column floating), and a
    null that was written inside of a mapping from the key that other mappings have."""
    kind = array.type
    if levels == 0 or pyarrow.types.is_floating(kind) or isinstance(kind, pyarrow.BaseExtensionType):
        return False
    chunks = array.chunks if isinstance(array, pyarrow.ChunkedArray) else [array]
    if pyarrow.types.is_struct(kind):
        if {field.name for field in kind} == {"bytes", "path"}:  # an image, one of which is always null
            return True
        # Without the rows that have no value at all: their nulls are in every field.
        fields = [field for chunk in chunks for field in chunk.drop_null().flatten()]
        return all(field.null_count == 0 and _is_exact(field, levels - 1) for field in fields)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return all(_is_exact(chunk.flatten(), levels - 1) for chunk in chunks)
    return True


def materialise(stream: IterableDataset, folder: Path) -> Path:
    """Writes a stream to `folder`/rows.arrow in constant memory; returns that file.

    Two passes: which columns there are is known only at the end of the stream.

    Raises:
        UserError: there are no rows.
    """
    spool = folder / "rows.jsonl"
    columns: dict[str, None] = {}
    padded = stream.features is not None  # from an Arrow table, whose mappings have all keys
    with spool.open("w", encoding="utf-8") as file:
        for index, row in enumerate(stream):
            if padded:
                row = {name: without_nulls(value) for name, value in row.items()}
            columns.update(dict.fromkeys(row))
            file.write(_dumps(encoded_row(row, index)) + "\n")
    if not columns:
        raise UserError("The streaming data set has no rows.")
    features = Features({name: {JSON_KEY: Value("large_string")} for name in columns})
    target = folder / "rows.arrow"
    with ArrowWriter(features=features, path=str(target)) as writer, spool.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            writer.write({name: {JSON_KEY: _dumps(row[name]) if name in row else None} for name in columns})
        writer.finalize()
    spool.unlink()
    return target


def undecoded(dataset: Dataset) -> Dataset:
    """The data set with its images as they are stored, {"bytes", "path"}, instead of decoded at every access."""
    features = Features({name: _undecoded(feature) for name, feature in dataset.features.items()})
    return dataset if features == dataset.features else dataset.cast(features)


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, Image):
        return {"bytes": Value("binary"), "path": Value("string")}
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    return feature


def parquet_schema(files: Sequence[Path]) -> pyarrow.Schema | None:
    """The columns that the files have in common; None if one is not a Parquet file, if they differ, or if `datasets`
    has no type for one (maps, UUIDs), so that the files are read row by row.

    Raises:
        UserError: a file that is not readable as what its name says.
    """
    if not files or any(file.suffix.lower() != ".parquet" for file in files):
        return None
    try:
        schemas = [pyarrow.parquet.read_schema(file).remove_metadata() for file in files]
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise UserError(f"{', '.join(map(str, files))}: not a readable Parquet file: {error}") from None
    try:
        Features.from_arrow_schema(schemas[0])
    except ValueError:
        return None
    return schemas[0] if all(schema.equals(schemas[0]) for schema in schemas) else None


def save_parquet(files: Sequence[Path], schema: pyarrow.Schema, target: Path) -> None:
    """Writes the rows of Parquet files of one schema to the Arrow file `target`, in constant memory: files with images
    may be larger than it. Values keep their Arrow types, which one file cannot mix.

    Raises:
        UserError: there are no rows.
    """
    own = [pyarrow.field(SOURCE_COLUMN, pyarrow.string()), pyarrow.field(ROW_COLUMN, pyarrow.int64())]
    whole, rows = pyarrow.schema([*schema, *own]), 0
    with pyarrow.OSFile(str(target), "wb") as sink, pyarrow.ipc.new_stream(sink, whole) as writer:
        for file in files:
            number = 1
            # buffer_size: pages are read one after another, and not a row group's columns as a whole.
            with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20) as table:
                for batch in _joined(table.iter_batches(batch_size=PARQUET_BATCH)):
                    count = batch.num_rows
                    places = [pyarrow.array([str(file)] * count), pyarrow.array(range(number, number + count))]
                    writer.write_table(pyarrow.table([*batch.columns, *places], schema=whole))
                    number, rows = number + count, rows + count
    if not rows:
        raise UserError(f"{', '.join(map(str, files))}: no rows in it.")


def _joined(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.Table]:
    """The batches, joined up to PARQUET_BYTES: opening an Arrow file maps 64 KiB of each of its batches."""
    waiting: list[pyarrow.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(table.nbytes for table in waiting) >= PARQUET_BYTES:
            yield pyarrow.Table.from_batches(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield pyarrow.Table.from_batches(waiting).combine_chunks()


def arrow_bytes(dataset: Dataset) -> Iterator[bytes]:
    """The rows as Arrow messages of one size, whatever batches the data set is stored in."""
    for table in dataset.with_format("arrow").iter(batch_size=BATCH):
        for batch in table.combine_chunks().to_batches():
            yield batch.serialize()


def _encoded(value: Any) -> Any:
    """The value as Python's own types, with its PIL images and pixel arrays encoded."""
    if value is None or isinstance(value, str | int | float):
        return value.item() if isinstance(value, numpy.generic) else value
    if isinstance(value, Mapping):
        return {str(key): _encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    picture = stored_in_memory(value)
    if picture is not None:
        return picture
    if isinstance(value, numpy.ndarray | numpy.generic):  # records of a DataFrame that came from Parquet
        return _encoded(value.tolist())
    return value


def _dumps(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=_in_json)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(value, default=_in_json)
    return text


def _in_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"data:;base64,{base64.b64encode(value).decode()}"
    picture = stored_in_memory(value)
    return repr(value) if picture is None else picture  # repr: dates and the like
