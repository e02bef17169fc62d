"""What a chat template leaves out of a conversation: found by looking for every message, call and tool in the text.

A template is free to drop what it has no place for: DeepSeek-R1's drops the reasoning of every answer, Llama 3's drops
tool calls. A run on such rows trains on something else than the rows say.
"""

import contextlib
import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_dist.data.messages import REASONING_FIELDS, TOOL_FIELDS, Message

_BESIDE_CONTENT = ("tool_calls", *REASONING_FIELDS, *TOOL_FIELDS)
_THOUGHT = re.compile(r"^\s*<think>(.*?)</think>(.*)$", re.DOTALL)
_WHITE_SPACE = re.compile(r"\s+")
CONTENT, REASONING, CALL, TOOL = "content", "reasoning", "tool call", "tool"


@dataclass(frozen=True)
class Piece:
    """A text that the rendering must contain.

    Attributes:
        role: of the message, or "" for a tool.
        field: CONTENT, REASONING, CALL or TOOL.
        spellings: the ways in which a template may write it; one of them must be there.
    """

    role: str
    field: str
    spellings: tuple[str, ...]

    @property
    def what(self) -> str:
        """The field and the role, without the text."""
        return "tools of the row" if self.field == TOOL else f"the {self.field} of {self.role} messages"

    def __str__(self) -> str:
        text = _WHITE_SPACE.sub(" ", self.spellings[0]).strip()
        text = text if len(text) <= 40 else text[:37] + "..."
        if self.field == TOOL:
            return f"part of a tool of the row ({text!r})"
        article = "an" if self.role[:1] in "aeiou" else "a"
        return f"the {self.field} of {article} {self.role} message ({text!r})"


def missing_pieces(messages: Sequence[Message], tools: Sequence[Any] | None, text: str) -> list[Piece]:
    """The pieces of `messages` and `tools` that are not in `text`, up to white space and escapes.

    Each place of `text` stands for one piece only, so that an answer which quotes a tool's result does not hide that
    the result itself was dropped.
    """
    if not tools and _all_in_order(messages, text):
        return []
    pieces = [piece for message in messages for piece in _message_pieces(message)]
    pieces += [piece for tool in tools or () for piece in _tool_pieces(tool)]
    squeezed = _squeeze(text)
    # A thought inside the content may be rendered apart from the answer, so it is looked for as a whole first.
    missing: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.spellings[0])):
        rest = _take(piece, squeezed)
        if rest is not None:
            squeezed = rest
            continue
        parts = _thought_and_answer(piece)
        if not parts:
            missing.append(piece)
        for part in parts:
            rest = _take(part, squeezed)
            if rest is None:
                missing.append(part)
            else:
                squeezed = rest
    return missing


def _all_in_order(messages: Sequence[Message], text: str) -> bool:
    """Whether plain messages stand in `text` word for word, in their order: nearly every row, at the cost of a find."""
    place = 0
    for message in messages:
        content = message["content"]
        if not isinstance(content, str) or (len(message) > 2 and any(map(message.get, _BESIDE_CONTENT))):
            return False
        content = content.strip()
        found = text.find(content, place)
        if found < 0:
            return False
        place = found + len(content)
    return True


def _message_pieces(message: Message) -> Iterator[Piece]:
    role, content = message["role"], message["content"]
    texts = [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
    yield from (Piece(role, CONTENT, (text,)) for text in texts if text.strip())
    # Data sets repeat the same reasoning under two names.
    thoughts = {text.strip() for name in REASONING_FIELDS for text in _thoughts(message.get(name))}
    inside = "".join(texts)
    yield from (Piece(role, REASONING, (text,)) for text in sorted(thoughts) if text and text not in inside)
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(name := function.get("name"), str):
            yield Piece(role, CALL, (name,))
        yield from (Piece(role, CALL, spellings) for spellings in _leaves(function.get("arguments")))
    for tools in map(message.get, TOOL_FIELDS):
        for tool in _listed(tools):
            yield from _tool_pieces(tool)


def _thoughts(value: Any) -> Iterator[str]:
    """The texts of reasoning: one, a list, or OpenRouter's and Anthropic's parts with a text in them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _thoughts(item)
    elif isinstance(value, dict):
        yield from (text for name in ("text", "thinking", "summary") if isinstance(text := value.get(name), str))


def _listed(tools: Any) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):
            tools = json.loads(tools)
    return [tool for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []


def _tool_pieces(tool: dict[str, Any]) -> Iterator[Piece]:
    function = tool.get("function", tool)
    texts = [function.get("name"), function.get("description")]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    texts += list(properties) if isinstance(properties, dict) else []
    yield from (Piece("", TOOL, (text,)) for text in texts if isinstance(text, str) and text.strip())


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """The keys and values of a call's arguments, each in the spellings of JSON and of Python."""
    if isinstance(value, str):
        try:
            decoded = json.loads(value)
        except ValueError:
            decoded = None
        if isinstance(decoded, dict):
            value = decoded
    if isinstance(value, dict):
        for key, item in value.items():
            if item is not None:
                yield (str(key),)
                yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        if value.strip():
            yield (value,)
    elif value is not None:
        yield tuple(dict.fromkeys([json.dumps(value), str(value)]))


def _thought_and_answer(piece: Piece) -> list[Piece]:
    found = _THOUGHT.match(piece.spellings[0]) if piece.field == CONTENT else None
    if found is None:
        return []
    parts = ((REASONING, found[1]), (CONTENT, found[2]))
    return [Piece(piece.role, field, (text,)) for field, text in parts if text.strip()]


def _take(piece: Piece, squeezed: str) -> str | None:
    """`squeezed` without one occurrence of the piece; None where there is none."""
    for text in piece.spellings:
        for spelling in _escaped(text):
            wanted = _squeeze(spelling)
            place = squeezed.find(wanted)
            if place >= 0:
                return f"{squeezed[:place]}\0{squeezed[place + len(wanted) :]}"
    return None


def _escaped(text: str) -> Iterator[str]:
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]  # templates that print a dict
    yield html.escape(text)
    yield json.dumps(html.escape(text), ensure_ascii=False)[1:-1]


def _squeeze(text: str) -> str:
    return _WHITE_SPACE.sub("", text)
