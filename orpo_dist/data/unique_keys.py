"""JSON in which no object has a key twice with two values: Python's json keeps the last one in silence."""

import json
from typing import Any


class RepeatedKey(ValueError):
    """An object has a key twice, with two values."""


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        for key, value in items:
            if value != found[key]:
                raise RepeatedKey(f"the key `{key}` is in one object twice, with two values. Remove one of them.")
    return found


# 5.1 microseconds instead of 3.3 for a row of 1.4 KB.
DECODER = json.JSONDecoder(object_pairs_hook=_object)
