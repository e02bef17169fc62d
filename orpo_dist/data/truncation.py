"""Which tokens stay when a prompt or a completion is cut: those that a tokenizer or a template writes around texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from orpo_dist.data.messages import Message
from orpo_dist.data.pairs import common_length
from orpo_dist.errors import BadRow

# Two texts that share no beginning and no end, so that what two renderings share at their end is the template's.
_PROBES = ("First", "Other")


@dataclass(frozen=True)
class WrittenTokens:
    """What a tokenizer writes `before` and `after` every text: BART's `<s>` and `</s>`, NLLB's language and `</s>`,
    BERT's `[CLS]` and `[SEP]`, the `</s>` and language of mBART-cc25."""

    before: list[int]
    after: list[int]

    @classmethod
    def by(cls, tokenizer: PreTrainedTokenizerBase) -> "WrittenTokens":
        """Found by tokenising a text with and without special tokens."""
        bare, whole = (
            list(tokenizer("a b", add_special_tokens=added, verbose=False)["input_ids"]) for added in (False, True)
        )
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return cls(whole[:start], whole[start + len(bare) :])
        return cls([], [])

    def around(self, ids: list[int]) -> tuple[int, int]:
        """How many tokens at the beginning and at the end of `ids` were written around a text."""
        begins = ids[: len(self.before)] == self.before
        ends = bool(self.after) and ids[-len(self.after) :] == self.after
        return len(self.before) if begins else 0, len(self.after) if ends else 0

    def is_empty(self, ids: list[int]) -> bool:
        """Whether there is no token of a text in `ids`."""
        return ids == [*self.before, *self.after]

    def ends_with(self, ids: list[int], eos: int) -> bool:
        """Whether `eos` is among what was written at the end of `ids`: also where a language follows it."""
        return eos in self.after and self.around(ids)[1] > 0

    def cut(self, ids: list[int], room: int, eos: int | None) -> list[int]:
        """`ids` cut to `room` tokens as the tokenizer's own truncation does, which TRL uses: at the end of the text,
        before what is written after it. An EOS that was added by hand counts as written."""
        head, tail = self.around(ids)
        if not tail and ids[-1] == eos:
            tail = 1 + self.around(ids[:-1])[1]
        if head + tail >= room:  # no token of the text is left
            return [*ids[:head], *ids[len(ids) - tail :]][:room]
        return [*ids[: room - tail], *ids[len(ids) - tail :]]


def kept_places(
    length: int, limit: int, side: str, head: int, tail: int, fixed: frozenset[int] = frozenset()
) -> list[int] | None:
    """Places of `length` tokens that stay when they are cut to `limit` on one side; None where that is impossible.

    Args:
        head, tail: tokens at the beginning and at the end that stay.
        fixed: other places that stay: the tokens of images.
    """
    free = [place for place in range(head, length - tail) if place not in fixed]
    excess = length - limit
    if len(free) < excess:
        return None
    gone = set(free[:excess] if side == "left" else free[len(free) - excess :])
    return [place for place in range(length) if place not in gone]


def written_after_text(render: Callable[[list[Message]], str], messages: list[Message], prompt: str) -> str | None:
    """What the template writes at the end of `prompt`, after the text of the last message: `[/INST]`, or `<|im_end|>`
    and the header of the assistant's turn. None where it cannot be told.

    Found by rendering twice with other texts: templates write it as a turn's end, as the header or as both.

    Args:
        render: messages -> text, with the header of the assistant's turn.
        messages: those of the prompt.
        prompt: their rendering, or the beginning of it that is shared with the completions.
    """
    try:
        first, second = (render([*messages[:-1], _with_text(messages[-1], probe)]) for probe in _PROBES)
        whole = render(messages)
    except BadRow:  # the template has an opinion on texts
        return None
    ending = common_length(first[::-1], second[::-1])
    tail = first[len(first) - ending :]
    if first == second or not whole.endswith(tail):  # the template drops the text, or looks at it
        return None
    if whole.startswith(prompt):
        return tail[: max(0, len(tail) - (len(whole) - len(prompt)))]
    return tail if prompt.endswith(tail) else None


def tail_tokens(tokenize: Callable[[Sequence[str]], list[list[int]]], prompt: str, tail: str) -> int:
    """How many tokens at the end of `prompt` hold characters of its end `tail`, counted in place: by themselves these
    characters may be other tokens."""
    if not tail:
        return 0
    without, whole = tokenize([prompt[: len(prompt) - len(tail)], prompt])
    return len(whole) - common_length(without, whole)


def _with_text(message: Message, text: str) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": text}
    places = [place for place, part in enumerate(content) if part["type"] == "text"]
    if not places:
        return {**message, "content": [*content, {"type": "text", "text": text}]}
    return {**message, "content": [*content[: places[-1]], {"type": "text", "text": text}, *content[places[-1] + 1 :]]}
