"""Values of a row -> text or a list of messages, whatever spelling they came in.

A message's `content` is text; where it holds images, a list of parts: {"type": "text", "text": ...}, {"type": "image"}
for the next image of the image column, {"type": "image", "index": 1} for the second one, and
{"type": "image", "image": ...} for one that the message carries itself.
"""

import ast
import json
import math
from typing import Any

from orpo_dist.errors import BadRow
from orpo_dist.images.source import embedded_image

Message = dict[str, Any]
JSON_KEY = "__json__"  # rows.py stores what an Arrow column cannot hold without loss as {JSON_KEY: text}

IMAGE_PARTS = ("image", "image_url", "input_image")  # transformers and TRL, OpenAI's chat, OpenAI's responses
TEXT_PARTS = ("text", "input_text", "output_text")

# ShareGPT's speakers, with the spellings found in public data sets.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_call": "function_call",
}


def decode(value: Any) -> Any:
    """Undoes the JSON wrapping of rows.py; every other value is returned as it is."""
    if isinstance(value, dict) and value.keys() == {JSON_KEY}:
        return None if value[JSON_KEY] is None else json.loads(value[JSON_KEY])
    return value


def read_content(value: Any, column: str) -> str | list[Message]:
    """A prompt or completion as text or as messages with `role` and `content`.

    Accepted: text, a whole number (text that a reader took for one), a message, a list of messages, and the JSON or
    Python text of a list of messages, which is what a CSV file can hold.

    Raises:
        BadRow: a missing value, NaN, another type, or a malformed message.
    """
    if value is None:
        raise BadRow("missing value", column, "no value")
    if isinstance(value, float) and math.isnan(value):
        raise BadRow("NaN", column, "NaN where text or messages are expected")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        messages = _messages_in_text(value)
        return value if messages is None else [read_message(message, column) for message in messages]
    if isinstance(value, dict):
        return [read_message(value, column)]
    if isinstance(value, list):
        return [read_message(message, column) for message in value]
    raise BadRow("wrong type", column, f"{_short(value)} is neither text nor a list of messages")


def read_message(value: Any, column: str) -> Message:
    """One message in either spelling (`role`/`content`, `from`/`value`) as `role`/`content`.

    Raises:
        BadRow: no role, an unknown speaker, or content that is not text.
    """
    if not isinstance(value, dict):
        raise BadRow("wrong type", column, f"{_short(value)} in a list of messages is not a message")
    message = _without_none(value)
    if "role" not in message and "from" in message:
        return _from_sharegpt(message, column)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise BadRow("bad message", column, f"the message {_short(message)} has no `role`")
    content = message.get("content", "" if message.get("tool_calls") else None)
    return {**message, "content": _content(content, message, column)}


def text_of(content: str | list[dict[str, Any]]) -> str:
    """The text of a message's content, without its images."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content if "text" in part)


def read_tools(value: Any, column: str) -> list[Any] | None:
    """The tools of a row: a list of JSON schemas or its JSON text; None where there are none.

    Raises:
        BadRow: neither of the two.
    """
    value = decode(value)
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow("bad tools", column, f"not valid JSON ({error})") from None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow("bad tools", column, f"{_short(value)} is not a list of JSON schemas")
    return [_without_none(tool) for tool in value] or None


def _from_sharegpt(message: Message, column: str) -> Message:
    speaker = message["from"]
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow("bad message", column, f"unknown speaker {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
    text = _text(message.get("value"), message, column)
    if role != "function_call":
        return {"role": role, "content": text}
    try:
        call = json.loads(text)
        function = {"name": call["name"], "arguments": call["arguments"]}
    except (json.JSONDecodeError, KeyError, TypeError):
        raise BadRow("bad message", column, f"the function_call {_short(text)} has no name and arguments") from None
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _content(content: Any, message: Message, column: str) -> str | list[dict[str, Any]]:
    if not (isinstance(content, list) and all(isinstance(part, dict) for part in content)):
        return _text(content, message, column)
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type")
        if kind in IMAGE_PARTS:
            image = embedded_image({key: value for key, value in part.items() if key not in ("type", "text")})
            # `index`: which image of the column, as in HuggingFaceH4/rlaif-v_formatted.
            place = {"type": "image"} if part.get("index") is None else {"type": "image", "index": part["index"]}
            parts.append(place if image is None else {"type": "image", "image": image})
        elif kind in TEXT_PARTS:
            if embedded_image({key: value for key, value in part.items() if key not in ("type", "text")}) is not None:
                raise BadRow("wrong type", column, f"a message holds an image in a part of type {kind}")
            parts.append({"type": "text", "text": _text(part.get("text"), message, column)})
        else:
            raise BadRow("wrong type", column, f"a message holds {kind}; text and images are supported here")
    return parts if any(part["type"] == "image" for part in parts) else text_of(parts)


def _text(content: Any, message: Message, column: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, int) and not isinstance(content, bool):
        return str(content)
    raise BadRow("bad message", column, f"the message {_short(message)} has no text")


def _messages_in_text(text: str) -> list[Any] | None:
    """The message list that `text` spells out, or None where it is ordinary text."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")) or stripped[1:].lstrip()[:1] != "{":
        return None
    value = None
    try:
        value = json.loads(stripped)
    except json.JSONDecodeError:
        try:
            value = ast.literal_eval(stripped)  # pandas writes lists to CSV in Python's spelling
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    if isinstance(value, list) and all(isinstance(m, dict) and m.keys() & {"role", "from"} for m in value):
        return value
    return None


def _without_none(value: Any) -> Any:
    # Arrow gives every message the keys of all messages, with None for those it lacks; templates would print them.
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _short(value: Any) -> str:
    text = repr(value[:80] if isinstance(value, bytes) else value)
    return text if len(text) <= 80 else text[:77] + "..."
