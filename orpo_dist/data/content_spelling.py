"""Whether a chat template takes a message's content as text or as a list of parts, for each role by itself.

Templates of vision-language models differ by role: LLaVA's take lists alone, Pixtral's a list from the user and text
from the assistant, and others print a list given to the system message in Python's spelling. So every role is tried
out, and text is rewritten into a list only where that has been seen to work and the text has not: Gemma 4's template
takes both, and writes a space after each part.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

from orpo_dist.data.messages import Message
from orpo_dist.data.pairs import common_length

WORDS = ("Alpha", "Beta", "Gamma", "Delta")  # of the probes
PARTS, TEXT = "parts", "text"
_BEFORE_THE_USER = ("system", "developer")


class ContentSpelling:
    """The spelling of each role's content for one template.

    render: messages to text by the template; None where there is none. placeholder: what stands for an image in a text.
    """

    def __init__(self, render: Callable[[list[Message]], str] | None, placeholder: str):
        self._render = render
        self.placeholder = placeholder
        self._images_are_parts, reply = self._find()
        self._roles = {"assistant": reply} if self._images_are_parts else {}

    def spelled(self, message: Message) -> Message:
        """The message as the template takes it."""
        content = message["content"]
        if not isinstance(content, str) and self._images_are_parts:
            return message
        if not isinstance(content, str):
            pieces = [self.placeholder if part["type"] == "image" else part["text"] for part in content]
            return {**message, "content": "".join(pieces)}
        return _as(message, self._of(message["role"]))

    def render(self, messages: Sequence[Message]) -> str:
        """The messages through the template."""
        assert self._render is not None
        return self._render([self.spelled(message) for message in messages])

    @cached_property
    def image_text(self) -> str:
        """What the template writes for an image in a message."""
        if self._render is None or not self._images_are_parts:
            return self.placeholder
        words = {"type": "text", "text": WORDS[0]}
        with_image = [{"role": "user", "content": [{"type": "image"}, words]}]
        without, text = self._render([{"role": "user", "content": [words]}]), self._render(with_image)
        start = common_length(text, without)
        end = common_length(text[start:][::-1], without[start:][::-1])
        found = text[start : len(text) - end]
        return found if found.count(self.placeholder) == 1 else self.placeholder

    def _find(self) -> tuple[bool, str]:
        """Whether images can be parts, and the spelling of the assistant's messages then."""
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": WORDS[0]}]}
        for reply in (TEXT, PARTS):
            if self._works([user, _as({"role": "assistant", "content": WORDS[1]}, reply)], images=1):
                return True, reply
        return False, TEXT

    def _of(self, role: str) -> str:
        if role not in self._roles:
            self._roles[role] = TEXT
            probes = ((spelling, self._conversation(role, spelling)) for spelling in (TEXT, PARTS))
            self._roles[role] = next((spelling for spelling, probe in probes if self._works(probe)), TEXT)
        return self._roles[role]

    def _conversation(self, role: str, spelling: str) -> list[Message]:
        tried = _as({"role": role, "content": WORDS[2]}, spelling)
        user, reply = {"role": "user", "content": WORDS[0]}, {"role": "assistant", "content": WORDS[1]}
        if role == "user":
            return [tried, self.spelled(reply)]
        if role == "assistant":
            return [self.spelled(user), tried]
        if role in _BEFORE_THE_USER:
            return [tried, self.spelled(user), self.spelled(reply)]
        return [self.spelled(user), self.spelled(reply), tried, self.spelled({**reply, "content": WORDS[3]})]

    def _works(self, messages: list[Message], images: int = 0) -> bool:
        if self._render is None:
            return False
        try:
            text = self._render(messages)
        except Exception:  # a template is a program, which fails in any way on content that it does not expect
            return False
        words = [_text(message) for message in messages]
        return (
            all(word in text for word in words) and not prints_parts(text) and (text.count(self.placeholder) == images)
        )


def prints_parts(text: str) -> bool:
    """Whether a rendering holds a list of parts as Python or JSON spells it."""
    return "'type'" in text or '"type"' in text


def _as(message: Message, spelling: str) -> Message:
    if spelling == TEXT:
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
