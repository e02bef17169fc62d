"""What people hand over in Python -> rows: DataFrames, mappings of columns, records with numpy's values, generators."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy
from datasets import Dataset, IterableDataset

from orpo_dist.data.calls import short
from orpo_dist.errors import UserError


def rows_of(given: Any, name: str) -> Dataset | IterableDataset | list[dict[str, Any]]:
    """A data set, without a format that would change its values, or a list of rows.

    Raises:
        UserError: data sets by split, or what holds no rows.
    """
    if isinstance(given, Dataset):
        return given if given.format["type"] is None else given.with_format(None)
    if isinstance(given, IterableDataset):
        return given
    pandas = sys.modules.get("pandas")  # who has a DataFrame has imported it
    if pandas is not None and isinstance(given, pandas.DataFrame):
        return _checked(given.to_dict("records"), name)
    if isinstance(given, Mapping):
        return _rows_of_mapping(given, name)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise UserError(
            f"{name}: {short(given)} is no data set: give a `datasets` object, a DataFrame or a list of rows."
        )
    return _checked(list(given), name)


def _rows_of_mapping(given: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    if any(isinstance(value, Dataset | IterableDataset) for value in given.values()):
        splits = ", ".join(map(str, given))
        raise UserError(f"{name}: a {type(given).__name__} with the splits {splits}: choose one of them.")
    columns = {key: list(value) for key, value in given.items() if isinstance(value, list | tuple | numpy.ndarray)}
    if len(columns) < len(given) or not columns:
        raise UserError(f"{name}: {short(dict(given))}: a mapping must hold one list per column.")
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"`{key}` {len(values)}" for key, values in columns.items())
        raise UserError(f"{name}: its columns have different lengths: {lengths}.")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _checked(rows: list[Any], name: str) -> list[dict[str, Any]]:
    """The rows as mappings. Nulls inside of them are taken for Arrow's padding: rows in Python are mostly those of a
    table (`list(dataset)`, `pandas.read_parquet`)."""
    checked = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"{name}, row {index}: {short(row)} is not a mapping with named columns.")
        try:
            checked.append({key: _unpadded(value) for key, value in row.items()})
        except RecursionError:
            raise UserError(f"{name}, row {index}: a value is nested too deeply. Take the row out.") from None
    return checked


def _unpadded(value: Any) -> Any:
    if isinstance(value, numpy.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_unpadded(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _unpadded(item) for key, item in value.items() if item is not None}
    return value
