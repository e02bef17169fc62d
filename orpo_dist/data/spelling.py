"""Text that spells out messages, as a CSV cell does: recognised per column, decoded per cell.

Spellings seen: JSON, JSON written twice, Python's repr (pandas.to_csv), and numpy's repr, whose lists have no commas
(`datasets.to_csv`, DataFrames read from Parquet).
"""

import ast
import json
import re
from collections.abc import Iterable
from typing import Any, Literal

from orpo_dist.errors import BadRow

# What the strings of a column are. "text": text. "messages": a column of message lists, where a string is one turn
# unless it spells messages. "spelled": every string spells messages, and one that does not is a bad row.
Strings = Literal["text", "messages", "spelled"]

SCAN = 4000  # characters of a cell in which a message's two keys are looked for
_START = re.compile(r"""\s*["']?\s*(?:array\()?[\[(]?\s*\{""")
_SPEAKER = re.compile(r"""\\?["'](?:role|from)\\?["']\s*:""")
_CONTENT = re.compile(r"""\\?["'](?:content|value|tool_calls)\\?["']\s*:""")
_QUOTED = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")""", re.DOTALL)
_NAMES = {"null": "None", "nan": "None", "NaN": "None", "NaT": "None", "true": "True", "false": "False"}
NOTHING = ("null", "None", "nan", "NaN", "<NA>")


def looks_like_messages(text: str) -> bool:
    """Whether text begins as messages that are spelled out, well or badly."""
    if not _START.match(text):
        return False
    head = text[:SCAN]
    return bool(_SPEAKER.search(head) and _CONTENT.search(head))


def strings_of(values: Iterable[Any]) -> Strings:
    """What the strings of a column are, from its first values: what more than half of them are, so that neither one
    answer that is a JSON list nor one broken cell decides."""
    structured = spelled = texts = 0
    for value in values:
        if isinstance(value, dict | list | tuple):
            structured += 1
        elif isinstance(value, str) and value.strip() not in ("", "[]", *NOTHING):
            if looks_like_messages(value):
                spelled += 1
            else:
                texts += 1
        elif isinstance(value, int):
            texts += 1
    if structured + spelled <= texts:
        return "text"
    return "messages" if structured else "spelled"


def spelled_messages(text: str, column: str) -> Any:
    """What a cell of a column of messages spells out; None for `null` and its like.

    Raises:
        BadRow: it cannot be decoded.
    """
    stripped = text.strip()
    if stripped in NOTHING:
        return None
    value = decoded(stripped)
    if isinstance(value, dict | list):
        return value
    raise BadRow("bad message", column, f"{_short(text)} cannot be decoded, and the column holds messages as text")


def decoded(text: str) -> Any:
    """The list or mapping that text spells out; None where it spells none."""
    value: Any = text
    for _ in range(3):
        if not isinstance(value, str):
            break
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = _python_value(value)
    return value if isinstance(value, dict | list) else None


def _python_value(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
        # ['a' 'b'] is a list of two to numpy and of one to Python.
        if "'" not in text or not re.search(r"""['"]\s+['"]""", text):
            return value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    try:
        return ast.literal_eval(_with_commas(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def _with_commas(text: str) -> str:
    """numpy's and pandas' repr as a Python literal: commas between items, `array(x, dtype=object)` as (x)."""
    pieces = _QUOTED.split(text)
    for place in range(0, len(pieces), 2):  # what is outside of quotes
        piece = pieces[place]
        if 0 < place < len(pieces) - 1 and piece and not piece.strip():
            pieces[place] = ", "
            continue
        piece = re.sub(r",\s*dtype=[\w.]+", "", piece)
        piece = re.sub(r"[A-Za-z_][\w.]*\(", "(", piece)
        piece = re.sub(r"\b(?:null|nan|NaN|NaT|true|false)\b", lambda name: _NAMES[name[0]], piece)
        piece = re.sub(r"(?<=[\w\]})])\s+(?=[\w\[{(-])", ", ", piece)
        piece = re.sub(r"(?<=[\]})])\s+$", ", ", piece) if place < len(pieces) - 1 else piece
        pieces[place] = re.sub(r"^\s+(?=[\[{(\d-])", ", ", piece) if place else piece
    return "".join(pieces)


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
