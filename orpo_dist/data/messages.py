"""Values of a row -> text or a list of messages, whatever spelling they came in.

A message's `content` is text; where it holds images, a list of parts: {"type": "text", "text": ...}, {"type": "image"}
for the next image of the image column, {"type": "image", "index": 1} for the second one, and
{"type": "image", "image": ...} for one that the message carries itself.
"""

import json
import math
import re
from typing import Any

from orpo_dist.data.calls import call_of_text, read_calls, read_old_call, read_schemas, short
from orpo_dist.data.spelling import Strings, decoded, looks_like_messages, spelled_messages
from orpo_dist.errors import BadRow
from orpo_dist.images.source import embedded_image

Message = dict[str, Any]
JSON_KEY = "__json__"  # rows.py stores what an Arrow column cannot hold without loss as {JSON_KEY: text}

IMAGE_PARTS = ("image", "image_url", "input_image")  # transformers and TRL, OpenAI's chat, OpenAI's responses
TEXT_PARTS = ("text", "input_text", "output_text")

# Who speaks, in the words of ShareGPT, LLaMA-Factory, OpenAssistant, ms-swift and Gemma, in lower case.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
    # Spelled as the templates that know them spell them: OpenAI, Llama 3, Functionary, Granite.
    "developer": "developer",
    "ipython": "ipython",
    "function": "function",
    "document": "document",
    "documents": "documents",
    "available_tools": "available_tools",
}
# What templates render of a message. Keys of a data set's own (ids, names, dates) differ between copies of one message.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_details")
TOOL_FIELDS = ("tools", "functions")
VISIBLE = ("role", "content", "tool_calls", *REASONING_FIELDS, *TOOL_FIELDS)
_SURROGATE = re.compile("[\ud800-\udfff]")


def decode(value: Any) -> Any:
    """Undoes the storage of rows.py. What is wrapped as JSON is exact, nulls included; in a plain Arrow column every
    mapping has the keys of all others, and those that are None are taken out."""
    if isinstance(value, dict) and value.keys() == {JSON_KEY}:
        return None if value[JSON_KEY] is None else json.loads(value[JSON_KEY])
    return without_nulls(value) if isinstance(value, dict | list) else value


def decode_optional(value: Any) -> Any:
    """As `decode`, for a column that a row need not have a value in: NaN is pandas' word for none."""
    value = decode(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def read_content(value: Any, column: str, strings: Strings = "messages") -> str | list[Message]:
    """A prompt or completion as text or as messages with `role` and `content`.

    Accepted: text, a whole number (text that a reader took for one), a message, a list of messages, messages stored
    column by column, and, unless `strings` is "text", text that spells out messages.

    Args:
        strings: what the strings of this column are (spelling.strings_of).

    Raises:
        BadRow: a missing value, NaN, another type, half a character, or a malformed message.
    """
    if isinstance(value, str) and strings == "spelled":
        value = spelled_messages(value, column) if value.strip() else None
    elif isinstance(value, str) and strings == "messages" and looks_like_messages(value):
        spelled = decoded(value.strip())
        value = value if spelled is None else spelled
    if value is None:
        raise BadRow("missing value", column, "no value")
    if isinstance(value, float) and math.isnan(value):
        raise BadRow("NaN", column, "NaN where text or messages are expected")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return _whole(value, column)
    if isinstance(value, dict):
        value = _by_column(value, column)
    if isinstance(value, list):
        if value and all(isinstance(item, str | list) for item in value):
            raise BadRow(
                "wrong type", column, f"{short(value)} is a list of texts: which of them is whose turn is not said"
            )
        return [read_message(message, column) for message in value]
    raise BadRow("wrong type", column, f"{short(value)} is neither text nor a list of messages")


def _by_column(value: Message, column: str) -> list[Any]:
    """One message, or messages stored as {"role": [...], "content": [...]} (a `datasets` sequence of mappings)."""
    lists = {key: items for key, items in value.items() if isinstance(items, list)}
    if not isinstance(value.get("role", value.get("from")), list):
        return [value]
    if len(lists) < len(value) or len({len(items) for items in lists.values()}) > 1:
        raise BadRow("bad message", column, f"messages stored column by column, of different lengths: {short(value)}")
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def read_message(value: Any, column: str) -> Message:
    """One message in either spelling (`role`/`content`, `from`/`value`) as `role`/`content`.

    Raises:
        BadRow: no role, an unknown one, or content that is not text.
    """
    if not isinstance(value, dict):
        raise BadRow("wrong type", column, f"{short(value)} in a list of messages is not a message")
    message = {key: item for key, item in value.items() if item is not None}
    sharegpt = "role" not in message and "from" in message
    role = _role(message, sharegpt, column)
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    if sharegpt:
        del message["from"]
    if role == "function_call":
        calls = call_of_text(_text(message.get("content"), message, column), column)
        return {**message, "role": "assistant", "content": "", "tool_calls": calls}
    message["role"] = role
    old_call = message.pop("function_call", None)  # OpenAI's spelling of 2023
    if calls_given := read_calls(message.pop("tool_calls", None), column) or read_old_call(old_call, column):
        message["tool_calls"] = calls_given
    content = message.get("content", "" if message.get("tool_calls") else None)
    return {**message, "content": _content(content, message, column)}


def _role(message: Message, sharegpt: bool, column: str) -> str:
    given = message.get("from" if sharegpt else "role")
    if sharegpt and isinstance(given, str) and given.strip().lower() in ROLES:
        return ROLES[given.strip().lower()]
    if sharegpt:
        raise BadRow("bad message", column, f"unknown speaker {given!r}; known: {', '.join(ROLES)}")
    if not isinstance(given, str) or not given:
        raise BadRow("bad message", column, f"the message {short(message)} has no `role`")
    role = ROLES.get(given) or ROLES.get(given.strip().lower())
    if role is None:
        raise BadRow("bad message", column, f"unknown role {given!r}; known: {', '.join(ROLES)}")
    return role


def visible(messages: list[Message]) -> list[Message]:
    """The messages with what templates render of them, for comparisons: keys of a data set's own play no part, nor do
    the ids of calls."""
    return [
        message
        if message.keys() == {"role", "content"}
        else {key: _seen(key, message) for key in VISIBLE if key in message}
        for message in messages
    ]


def _seen(key: str, message: Message) -> Any:
    if key != "tool_calls":
        return message[key]
    return [{name: item for name, item in call.items() if name not in ("id", "index")} for call in message[key]]


def text_of(content: str | list[dict[str, Any]]) -> str:
    """The text of a message's content, without its images."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content if "text" in part)


def read_tools(value: Any, column: str) -> list[Any] | None:
    """The tools of a row: a list of JSON schemas or its JSON text; None where there are none.

    Raises:
        BadRow: neither of the two.
    """
    return read_schemas(decode_optional(value), column)


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
        return _whole(content, column)
    if isinstance(content, int) and not isinstance(content, bool):
        return str(content)
    if content is not None:
        kind = "an object" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise BadRow("bad message", column, f"the content of {short(message)} is {kind}: write it as text")
    raise BadRow("bad message", column, f"the message {short(message)} has no text")


def _whole(text: str, column: str) -> str:
    # Half of a UTF-16 pair, as JSON's \ud83d of a text that was cut: no tokenizer takes it.
    if not text.isascii() and (half := _SURROGATE.search(text)):
        raise BadRow(
            "broken text", column, f"character {half.start() + 1} is half of a surrogate pair (U+{ord(half[0]):04X})"
        )
    return text


def without_nulls(value: Any) -> Any:
    """The value without the keys that are None in its mappings: Arrow gives each mapping the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
