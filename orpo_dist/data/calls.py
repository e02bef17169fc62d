"""Tool calls and tool schemas, in any spelling, as the values that a chat template reads.

OpenAI's API gives `arguments` as JSON text, and files give whole calls or schemas that way; templates written for
`arguments | tojson` would then print a quoted string (https://github.com/oumi-ai/oumi/issues/2599).
"""

import contextlib
import json
from typing import Any

from orpo_dist.data.spelling import NOTHING, decoded
from orpo_dist.errors import BadRow

# One of which names a tool: plain and OpenAI's schemas, those of OpenAI's own tools and Google's lists of functions.
_NAMES = {"name", "function", "type", "function_declarations"}
TEXT_LEVELS = 3  # JSON inside of JSON text; more than twice has not been seen in public data


def unquoted(value: Any) -> Any:
    """JSON text as its value, also where it was written as JSON several times; the empty text is None.

    Raises:
        ValueError: not JSON (RecursionError: nested too deeply).
    """
    for _ in range(TEXT_LEVELS):
        if not isinstance(value, str):
            break
        value = json.loads(value) if value.strip() else None
    return value


def read_calls(value: Any, column: str) -> list[Any] | None:
    """The `tool_calls` of a message with their arguments as values; None where there are none.

    Raises:
        BadRow: not a list of calls, or arguments that are neither an object nor the JSON text of one.
    """
    try:
        value = unquoted(value)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad message", column, f"`tool_calls` is not valid JSON ({error})") from None
    if isinstance(value, dict):
        value = [value]
    if not value:
        return None
    if not isinstance(value, list):
        raise BadRow("bad message", column, f"`tool_calls` is {short(value)}, not a list of calls")
    return [_read_call(call, column) for call in value]


def _read_call(call: Any, column: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        call = unquoted(call)
    if not isinstance(call, dict):
        raise BadRow("bad message", column, f"{short(call)} in `tool_calls` is not a call")
    call = {key: item for key, item in call.items() if item is not None}
    if isinstance(call.get("function"), dict):
        function = {key: item for key, item in call["function"].items() if item is not None or key == "arguments"}
        return {**call, "function": _with_arguments(function, column)}
    return _with_arguments(call, column)


def _with_arguments(function: dict[str, Any], column: str) -> dict[str, Any]:
    return (
        {**function, "arguments": read_arguments(function["arguments"], column)}
        if "arguments" in function
        else function
    )


def read_old_call(value: Any, column: str) -> list[Any] | None:
    """The `function_call` of a message, one function with its arguments, as a list of calls; None where there is none.

    Raises:
        BadRow: as `read_calls`.
    """
    calls = read_calls(value, column)
    return None if calls is None else [{"type": "function", "function": call} for call in calls]


def read_arguments(value: Any, column: str) -> dict[str, Any]:
    """The arguments of a call by name; {} for null, `"null"` and the empty text.

    Raises:
        BadRow: neither an object nor the JSON text of one.
    """
    try:
        arguments = unquoted(value)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad message", column, f"the arguments {short(value)} are not valid JSON ({error})") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise BadRow("bad message", column, f"the arguments {short(value)} are not an object with named values")
    return arguments


def call_of_text(text: str, column: str) -> list[dict[str, Any]]:
    """The calls in a ShareGPT `function_call`: the JSON text of one call or of several.

    Raises:
        BadRow: a call without name or arguments.
    """
    try:
        calls = unquoted(text)
        calls = calls if isinstance(calls, list) else [calls]
        named = [(call["name"], call["arguments"]) for call in calls]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise BadRow("bad message", column, f"the function_call {short(text)} has no name and arguments") from None
    functions = [{"name": name, "arguments": read_arguments(value, column)} for name, value in named]
    return [{"type": "function", "function": function} for function in functions]


def read_schemas(value: Any, column: str) -> list[Any] | None:
    """Tools as a list of JSON schemas, each of which, and their `parameters`, may be JSON text; None for no tools.

    Raises:
        BadRow: anything else.
    """
    try:
        value = _as_values(value)
        if not value:
            return None
        if isinstance(value, dict):
            value = _by_column(value, column)
        tools = [unquoted(tool) for tool in (value if isinstance(value, list) else [value])]
        tools = [_with_parameters(tool) for tool in tools]
    except (ValueError, RecursionError) as error:
        raise BadRow("bad tools", column, f"not valid JSON ({error})") from None
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("bad tools", column, f"{short(value)} is not a list of JSON schemas")
    if nameless := next((tool for tool in tools if not _NAMES & tool.keys()), None):
        raise BadRow("bad tools", column, f"the tool {short(nameless)} has no name")
    return tools


def _as_values(value: Any) -> Any:
    """As `unquoted`, also of what pandas and numpy write to CSV."""
    if isinstance(value, str) and value.strip() in NOTHING:
        return None
    try:
        return unquoted(value)
    except ValueError:
        if (spelled := decoded(value)) is None:
            raise
        return spelled


def _by_column(value: dict[str, Any], column: str) -> list[Any]:
    """One tool, or tools stored as {"name": [...], ...} (a `datasets` sequence of mappings)."""
    if not any(isinstance(value.get(key), list) for key in ("name", "function", "type")):
        return [value]
    if not all(isinstance(items, list) for items in value.values()) or len({*map(len, value.values())}) > 1:
        raise BadRow("bad tools", column, f"tools stored column by column, of different lengths: {short(value)}")
    rows = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return [{key: item for key, item in row.items() if item is not None} for row in rows]


def _with_parameters(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return tool
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": _with_parameters(tool["function"])}
    if not isinstance(tool.get("parameters"), str):
        return tool
    return {**tool, "parameters": unquoted(tool["parameters"]) or {}}


def short(value: Any) -> str:
    """The value for a message, in at most 80 characters."""
    try:
        text = repr(value[:80] if isinstance(value, bytes) else value)
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."
