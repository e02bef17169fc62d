"""Where the turns of a rendered conversation begin and end, whatever the template writes around them.

A message is found in a rendering by rendering it again with another text: what both renderings end with lies behind
the message. So a turn is found too where a template changes its mind about what came before it (Mistral's writes the
system text into the last user message only, Qwen3's drops the reasoning of earlier answers).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_dist.data.messages import Message
from orpo_dist.data.pairs import common_length
from orpo_dist.errors import BadRow

Render = Callable[[list[Message], bool], str]  # messages, add_generation_prompt -> text


@dataclass(frozen=True)
class CutCompletions:
    """The prompt with the header of the assistant's turn, and what the template writes after it for each completion.

    `answers_at`: where the completion begins in the rendering of the whole, for each."""

    prompt: str
    answers_at: list[int]


class TurnFinder:
    """Finds turns in the renderings of one template.

    Args:
        render: raises BadRow where the template refuses the messages.
        marks: the tokenizer's added tokens, of which none is cut in two.
    """

    def __init__(self, render: Render, marks: Sequence[str]):
        self.render, self._marks = render, marks

    def cut(self, prompt: list[Message], wholes: Sequence[tuple[list[Message], str]]) -> CutCompletions | None:
        """The prompt as rendered with the generation prompt, and the completions as they are rendered after it; None
        where the last message of the prompt cannot be found in all of the renderings.

        wholes: per completion the messages of prompt and completion, and their rendering.
        """
        last = len(prompt) - 1
        text = self.render(prompt, True)
        place = self._behind(prompt, last, text, True)
        ends = [self._behind(messages, last, whole, False) for messages, whole in wholes]
        if place is None or any(end is None for end in ends):
            return None
        found = [end for end in ends if end is not None]
        tails = [whole[end:] for (_, whole), end in zip(wholes, found, strict=True)]
        shared = common_length(text[place:], *tails)
        shared = self._outside_marks(text, place + shared) - place
        if shared < 0 or not self._ends_turn(prompt, last, text[place : place + shared]):
            return None
        return CutCompletions(text[: place + shared], [end + shared for end in found])

    def context(self, messages: list[Message], first: int, text: str) -> list[tuple[int, int]] | None:
        """The stretches of `text`, the rendering of `messages`, that the model did not write after message number
        `first`: the turns of others, with the header of the assistant's next turn. None where one is not found.
        """
        stretches: list[tuple[int, int]] = []
        index = first
        while index < len(messages):
            if messages[index]["role"] == "assistant":
                index += 1
                continue
            last = index
            while last + 1 < len(messages) and messages[last + 1]["role"] != "assistant":
                last += 1
            start = self._end_in(text, messages, index - 1, False)
            stop = self._end_in(text, messages, last, True)
            if start is None or stop is None or not (stretches[-1][1] if stretches else 0) <= start < stop:
                return None
            stretches.append((start, stop))
            index = last + 1
        return stretches

    def _end_in(self, text: str, messages: list[Message], index: int, generation: bool) -> int | None:
        """Where the turn of message number `index` ends in `text`: behind the message stands what stands behind it in
        the rendering of the conversation up to it (with the generation prompt: up to the reply's first word)."""
        place = self._behind(messages, index, text, False)
        if place is None:
            return None
        head = messages[: index + 1]
        try:
            until = self.render(head, generation)
        except BadRow:
            return None
        end = self._behind(head, index, until, generation)
        if end is None:
            return None
        found = max(place, self._outside_marks(text, place + common_length(text[place:], until[end:])))
        if found == place and not generation:
            # gpt-oss ends an earlier answer with another token than the last one.
            found += max((len(mark) for mark in self._marks if mark and text.startswith(mark, place)), default=0)
        return found

    def _behind(self, messages: list[Message], index: int, text: str, generation: bool) -> int | None:
        """Where what stands behind message number `index` begins in `text`, the rendering of `messages`; None where
        the message leaves no trace in it."""
        changed = [*messages[:index], _changed(messages[index]), *messages[index + 1 :]]
        try:
            other = self.render(changed, generation)
        except BadRow:
            return None
        return None if other == text else len(text) - common_length(text[::-1], other[::-1])

    def _ends_turn(self, prompt: list[Message], last: int, header: str) -> bool:
        """Whether `header` holds all that ends the last turn of the prompt: that a reply follows changed none of it."""
        try:
            closed = self.render(prompt, False)
        except BadRow:
            return True
        end = self._behind(prompt, last, closed, False)
        with_reply = self.render(prompt, True)
        place = self._behind(prompt, last, with_reply, True)
        if end is None or place is None:
            return False
        return len(header) >= common_length(closed[end:], with_reply[place:])

    def _outside_marks(self, text: str, place: int) -> int:
        for mark in self._marks:
            start = text.find(mark, max(0, place - len(mark) + 1), place + len(mark) - 1)
            if 0 <= start < place < start + len(mark):
                place = start
        return place


def _changed(message: Message) -> Message:
    """The message with another end of its text and other names of its calls."""
    content: Any = message["content"]
    calls = message.get("tool_calls")
    changed = dict(message)
    if isinstance(content, str):
        if content.strip() or not calls:
            changed["content"] = _other(content)
    else:
        texts = [place for place, part in enumerate(content) if part.get("text")]
        parts = list(content)
        if texts:
            parts[texts[-1]] = {**parts[texts[-1]], "text": _other(parts[texts[-1]]["text"])}
        else:
            parts.append({"type": "text", "text": "x"})
        changed["content"] = parts
    if calls:
        changed["tool_calls"] = [_changed_call(call) for call in calls]
    return changed


def _changed_call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _changed_call(function)}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and arguments.rstrip().endswith("}"):
        arguments = arguments.rstrip()
        return {**call, "arguments": f'{arguments[:-1]}{", " if arguments.count(":") else ""}"x": 1}}'}
    if isinstance(arguments, dict) and arguments:
        last = list(arguments)[-1]
        return {**call, "arguments": {**arguments, last: _other(str(arguments[last]))}}
    # Templates write the name again at the tool's result (Gemma 4, gpt-oss), so only where there is nothing else.
    return {**call, "name": _other(str(call.get("name", "")))}


def _other(text: str) -> str:
    text = text.rstrip()
    return text + ("y" if text.endswith("x") else "x")
