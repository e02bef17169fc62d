"""Token ids of tokenised rows against the vocabulary of a model."""

from typing import Any

import pyarrow.compute as pc

from orpo_dist.packing.lengths import TOKEN_COLUMNS


def inside(token: int | None, vocabulary: int) -> int | None:
    """`token` if the model has it, else None."""
    return token if token is not None and 0 <= token < vocabulary else None


def largest_token(rows: Any) -> int:
    """The largest token id of all rows, a list or a datasets.Dataset; -1 without rows."""
    if isinstance(rows, list):
        return max((max(row[column], default=-1) for row in rows for column in TOKEN_COLUMNS), default=-1)
    largest = -1
    for batch in rows.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(10_000):
        found = [pc.max(batch[column].combine_chunks().flatten()).as_py() for column in TOKEN_COLUMNS]
        largest = max([largest, *(token for token in found if token is not None)])
    return largest


def first_unknown(rows: Any, vocabulary: int, known: set[int]) -> tuple[int, str, int] | None:
    """Row, column and id of the first token that is neither below `vocabulary` nor in `known`."""
    for index in range(len(rows)):
        row = rows[index]
        for column in TOKEN_COLUMNS:
            for token in row[column]:
                if token >= vocabulary and token not in known:
                    return index, column, token
    return None
