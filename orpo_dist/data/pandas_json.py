"""A JSON object as pandas' `to_json` writes a table -> its rows, for every `orient` that keeps the columns' names.

https://pandas.pydata.org/docs/reference/api/pandas.DataFrame.to_json.html
"""

from typing import Any

SPLIT_KEYS = {"columns", "index", "data"}
MESSAGE_KEYS = {"role", "from", "content", "value"}  # a row of single messages is no table of columns


def pandas_rows(content: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a table in orient `split`, `table`, `index` or `columns`; None where the object is none of them."""
    data = content.get("data")
    if isinstance(data, list) and isinstance(content.get("columns"), list) and content.keys() <= SPLIT_KEYS:
        return [dict(zip(content["columns"], cells, strict=True)) for cells in data]
    if isinstance(data, list) and isinstance(content.get("schema"), dict):
        keys = set(content["schema"].get("primaryKey", []))
        return [{name: value for name, value in row.items() if name not in keys} for row in data]
    tables = list(content.values())
    if not tables or not all(isinstance(table, dict) and table for table in tables):
        return None
    if all(_is_number(label) for label in content):
        return tables
    labels = tables[0].keys()
    of_columns = all(_is_number(label) for label in labels) or not labels & MESSAGE_KEYS
    if "chosen" in labels or not of_columns or any(table.keys() != labels for table in tables):
        return tables if "chosen" in labels else None
    return [{name: table[label] for name, table in content.items()} for label in labels]


def _is_number(label: str) -> bool:
    return label.lstrip("-").isdigit()
