"""Rows as Python objects or as a stream -> `datasets.Dataset`, without changing a value.

Arrow columns have one type. Where that would change a value ("42" beside 42, a tool call's arguments, which would get
the keys of all other calls) the column holds {"__json__": text}; messages.decode undoes it. Images in memory become
{"bytes": PNG, "path": None}, and inside of JSON a data URL.
"""

import base64
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets.arrow_writer import ArrowWriter

from orpo_dist.data.cache import digest
from orpo_dist.data.messages import JSON_KEY
from orpo_dist.errors import UserError
from orpo_dist.images.decode import stored_in_memory

SOURCE_COLUMN = "_source"  # the file a row came from
ROW_COLUMN = "_row"  # its number there
BATCH = 1000
PARQUET_BATCH = 100  # rows with images are large


def dataset_from_rows(rows: Sequence[dict[str, Any]]) -> Dataset:
    """The rows as a data set whose columns are the union of their keys; a missing key is None."""
    columns = dict.fromkeys(key for row in rows for key in row)
    table = {name: _column([_encoded(row.get(name)) for row in rows]) for name in columns}
    return Dataset(pyarrow.table(table))


def _column(values: list[Any]) -> pyarrow.Array | pyarrow.ChunkedArray:
    try:
        array = pyarrow.array(values)
        if array.to_pylist() == values and not any(isinstance(value, float) for value in values):
            return array if array.type != pyarrow.null() else array.cast(pyarrow.string())
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError, OverflowError):
        pass  # also a column of images with more than 2 GiB
    return pyarrow.array([None if value is None else {JSON_KEY: _dumps(value)} for value in values])


def materialise(stream: IterableDataset, folder: Path) -> Path:
    """Writes a stream to `folder`/rows.arrow in constant memory; returns that file.

    Two passes: which columns there are is known only at the end of the stream.

    Raises:
        UserError: there are no rows.
    """
    spool = folder / "rows.jsonl"
    columns: dict[str, None] = {}
    with spool.open("w", encoding="utf-8") as file:
        for row in stream:
            columns.update(dict.fromkeys(row))
            file.write(_dumps(row) + "\n")
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


def save(dataset: Dataset, folder: Path) -> None:
    """`save_to_disk` without its progress bar, which says nothing to somebody who waits for a tokenisation."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        dataset.save_to_disk(str(folder))
    finally:
        if shown:
            enable_progress_bars()


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
    """The columns that the files have in common; None where one is no Parquet file, or they differ.

    Raises:
        UserError: a file that is not readable as what its name says.
    """
    if not files or any(file.suffix.lower() != ".parquet" for file in files):
        return None
    try:
        schemas = [pyarrow.parquet.read_schema(file).remove_metadata() for file in files]
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise UserError(f"{', '.join(map(str, files))}: not a readable Parquet file: {error}") from None
    return schemas[0] if all(schema.equals(schemas[0]) for schema in schemas) else None


def save_parquet(files: Sequence[Path], schema: pyarrow.Schema, folder: Path) -> None:
    """Writes the rows of Parquet files of one schema to `folder`, as `save` does, in constant memory: files with images
    may be larger than it. Values keep their Arrow types, which one file cannot mix.

    Raises:
        UserError: there are no rows.
    """
    own = [pyarrow.field(SOURCE_COLUMN, pyarrow.string()), pyarrow.field(ROW_COLUMN, pyarrow.int64())]
    whole, rows = pyarrow.schema([*schema, *own]), 0
    with tempfile.TemporaryDirectory(prefix=".parquet.", dir=folder.parent) as temporary:
        target = Path(temporary) / "rows.arrow"
        with pyarrow.OSFile(str(target), "wb") as sink, pyarrow.ipc.new_stream(sink, whole) as writer:
            for file in files:
                number = 1
                with pyarrow.parquet.ParquetFile(file) as table:
                    for batch in table.iter_batches(batch_size=PARQUET_BATCH):
                        count = batch.num_rows
                        places = [pyarrow.array([str(file)] * count), pyarrow.array(range(number, number + count))]
                        writer.write_batch(pyarrow.record_batch([*batch.columns, *places], schema=whole))
                        number, rows = number + count, rows + count
        if not rows:
            raise UserError(f"{', '.join(map(str, files))}: no rows in it.")
        save(Dataset.from_file(str(target)), folder)


def content_digest(dataset: Dataset) -> str:
    """A name for the rows of `dataset`: equal content, equal name, whatever file or fingerprint it has."""
    return digest(_parts(dataset))


def _parts(dataset: Dataset) -> Iterable[bytes]:
    yield str(dataset.features).encode()
    for table in dataset.with_format("arrow").iter(batch_size=BATCH):
        for batch in table.combine_chunks().to_batches():
            yield batch.serialize()


def _encoded(value: Any) -> Any:
    """The value with its PIL images and pixel arrays encoded."""
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    picture = stored_in_memory(value)
    return value if picture is None else picture


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_in_json)


def _in_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"data:;base64,{base64.b64encode(value).decode()}"
    picture = stored_in_memory(value)
    return repr(value) if picture is None else picture  # repr: dates and the like
