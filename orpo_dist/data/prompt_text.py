"""The prompt of a row as text: joined from Alpaca's columns, and taken off completions that repeat it."""

from collections.abc import Sequence
from typing import Any

from orpo_dist.data.calls import short
from orpo_dist.data.messages import Message, decode, decode_optional, read_content
from orpo_dist.data.spelling import NOTHING, decoded
from orpo_dist.errors import BadRow

# A shorter prompt may well be how an answer begins ("Hi" and "Hi there"); so long a one that both answers begin with is
# a copy.
SURE_COPY = 20  # characters


def repeats(prompt: str, text: str) -> bool:
    """Whether a completion starts with the prompt, whatever white space is around the prompt."""
    return bool(prompt.strip()) and text.lstrip().startswith(prompt.strip())


def without_repeat(prompt: str, chosen: str, rejected: str, usual: bool) -> tuple[str, str]:
    """Both completions without a copy of the prompt before them.

    Args:
        usual: most rows of the data set repeat their prompt. Where they do not, it takes a prompt of some length, and
            both completions, to tell a copy from an answer that begins in the same words.
    """
    copies = [repeats(prompt, text) for text in (chosen, rejected)]
    if not usual and not (all(copies) and len(prompt.strip()) >= SURE_COPY):
        return chosen, rejected
    return (_rest(prompt, chosen) if copies[0] else chosen), (_rest(prompt, rejected) if copies[1] else rejected)


def _rest(prompt: str, text: str) -> str:
    if text.startswith(prompt):
        return text[len(prompt) :]
    # The white space at the prompt's end is the prompt's: a copy may have less of it.
    end, rest = prompt[len(prompt.rstrip()) :], text.lstrip()[len(prompt.strip()) :]
    shared = 0
    while shared < min(len(end), len(rest)) and end[shared] == rest[shared]:
        shared += 1
    return rest[shared:]


def is_part_of(prompt: str, texts: Sequence[str]) -> bool:
    """Whether the texts of a conversation hold the prompt, up to white space."""
    return "".join(prompt.split()) in "".join("".join(texts).split())


def join_texts(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    """Instruction and input as one text, with a line break between, as LLaMA-Factory joins them.

    Raises:
        BadRow: one of them is not text, or the first is missing.
    """
    texts = []
    for place, column in enumerate(columns):
        value = decode_optional(row[column]) if place else decode(row[column])
        if place and value is None:
            continue
        text = read_content(value, column, "text")
        if not isinstance(text, str):
            raise BadRow("wrong type", column, "messages, where text is joined to a prompt")
        texts.append(text)
    return "\n".join(text for text in texts if text)


def read_history(value: Any, column: str) -> list[Message]:
    """Earlier turns: pairs of a user's text and its answer, or messages; none for null, an empty text or list.

    Raises:
        BadRow: neither of the two.
    """
    value = decode_optional(value)
    if isinstance(value, str):
        text = value.strip()
        spelled = [] if text in ("", *NOTHING) else decoded(text)
        value = text if spelled is None else spelled
    if not value:
        return []
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        roles = ("user", "assistant")
        turns = [{"role": role, "content": text} for turn in value for role, text in zip(roles, turn, strict=True)]
        return [message for message in turns if message["content"] is not None]
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        messages = read_content(value, column)
        assert isinstance(messages, list)
        return messages
    raise BadRow("bad message", column, f"{short(value)} is neither pairs of a question and its answer nor messages")
