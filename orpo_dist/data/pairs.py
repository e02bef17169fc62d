"""Rows of any supported format -> canonical pair (prompt, chosen, rejected)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orpo_dist.data.chat_template import read_template_kwargs
from orpo_dist.data.media_columns import MediaColumns, check_messages, check_unread
from orpo_dist.data.messages import Message, decode, decode_optional, read_content, read_tools, text_of, visible
from orpo_dist.data.place_images import Columns, has_images, place_images, without_images
from orpo_dist.data.prompt_text import is_part_of, join_texts, read_history, without_repeat
from orpo_dist.data.rows import SOURCE_COLUMN
from orpo_dist.data.spelling import Strings
from orpo_dist.errors import BadRow
from orpo_dist.images.decode import StoredImage
from orpo_dist.images.source import ImageSource

LAST_REPLY_MARKERS = ("\n\nAssistant:", "\n\nASSISTANT:")  # whole dialogues as text, as in Anthropic's HH
# ms-swift's rows: a whole conversation with the chosen reply, and the rejected reply or conversation beside it.
# https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html
SWIFT_CHOSEN, SWIFT_REJECTED = "messages", ("rejected_messages", "rejected_response")


@dataclass(frozen=True)
class Pair:
    """One preference example: text in all three places, or lists of messages in all three places.

    As text, a completion is what follows the prompt, character for character. As messages, the prompt ends before
    the assistant's turn and each completion starts with one.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the chat template, of this row
    images: list[StoredImage] = field(default_factory=list)  # in the order of their places, see place_images
    notes: list[str] = field(default_factory=list)  # as in TokenizedPair


@dataclass(frozen=True)
class PairFormat:
    """Where the pair lies in a row.

    Attributes:
        repeats_prompt: most rows' completions as text start with the prompt, which is taken off where they do.
        strings: what the strings of the columns of prompt, chosen and rejected are.
        joined: the columns whose texts make the prompt, where it is more than one.
        history: column of the turns before the prompt.
        image: column of the images; "" takes them out of the messages too.
        media: columns of media that is not read.
        has_images: one of the first rows has an image.
        template_kwargs: column of variables for the chat template, as in TRL.
    """

    description: str
    prompt: str | None
    chosen: str
    rejected: str
    system: str | None
    tools: str | None
    repeats_prompt: bool
    apply_chat_template: bool | None
    image: str | None = None
    media: MediaColumns = field(default_factory=lambda: MediaColumns(None))
    image_source: ImageSource = field(default_factory=ImageSource)
    has_images: bool = False
    strings: dict[str, Strings] = field(default_factory=dict)
    joined: tuple[str, ...] = ()
    history: str | None = None
    template_kwargs: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        names = (
            self.prompt,
            *self.joined,
            self.history,
            self.chosen,
            self.rejected,
            self.system,
            self.tools,
            self.image,
            *self.media.unread,
            self.template_kwargs,
        )
        return list(dict.fromkeys(name for name in names if name))

    def pair(self, row: dict[str, Any]) -> Pair:
        """The audited pair of `row`.

        Raises:
            BadRow: anything about the row that makes it unfit for training and needs no tokenizer to see.
        """
        pair = self._pair(row)
        if self.template_kwargs is not None:
            pair = self._with_template_kwargs(pair, decode_optional(row[self.template_kwargs]))
        if self.image == "":
            prompt, chosen, rejected = map(without_images, (pair.prompt, pair.chosen, pair.rejected))
            return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)
        check_unread(row, self.media.unread)
        check_messages(pair.prompt, self.prompt or self.chosen, bool(self.image))
        for column, side in ((self.chosen, pair.chosen), (self.rejected, pair.rejected)):
            check_messages(side, column, False)
            if has_images(side):
                raise BadRow("image in a completion", column, "an image after the prompt")
        file = decode(row.get(SOURCE_COLUMN))
        given = self.image_source.stored(decode_optional(row[self.image]), self.image, file) if self.image else []
        columns = Columns(self.image, self.prompt or self.chosen)
        placed = place_images(pair.prompt, given, self.image_source, file, columns)
        return replace(pair, prompt=placed.prompt, images=placed.images)

    def _pair(self, row: dict[str, Any]) -> Pair:
        prompt = self._prompt(row)
        chosen = self._content(row, self.chosen)
        rejected = self._content(row, self.rejected)
        if self.rejected in SWIFT_REJECTED and isinstance(rejected, str) and isinstance(chosen, list):
            rejected = [*chosen[:-1], *_assistant(rejected)]
        if isinstance(chosen, str) != isinstance(rejected, str):
            kinds = {True: "text", False: "a list of messages"}
            raise BadRow(
                "wrong type",
                self.rejected,
                f"{kinds[isinstance(rejected, str)]}, where `{self.chosen}` is {kinds[isinstance(chosen, str)]}",
            )
        system = self._system(row)
        history = [] if self.history is None else read_history(row[self.history], self.history)
        if history:
            prompt = self._after(history, prompt, isinstance(chosen, str))
        tools = None if self.tools is None else read_tools(row[self.tools], self.tools)
        if isinstance(chosen, str) and isinstance(rejected, str):
            if not isinstance(prompt, list):
                return self._text_pair(prompt, chosen, rejected, system, tools)
            return self._message_pair(prompt, _assistant(chosen), _assistant(rejected), system, tools)
        assert isinstance(chosen, list) and isinstance(rejected, list)
        return self._message_pair(prompt, chosen, rejected, system, tools)

    def _content(self, row: dict[str, Any], column: str) -> str | list[Message]:
        return read_content(decode(row[column]), column, self.strings.get(column, "messages"))

    def _prompt(self, row: dict[str, Any]) -> str | list[Message] | None:
        if self.joined:
            return join_texts(row, self.joined)
        return None if self.prompt is None else self._content(row, self.prompt)

    def _after(self, history: list[Message], prompt: str | list[Message] | None, text: bool) -> list[Message]:
        if isinstance(prompt, list):
            return [*history, *prompt]
        if text and not self.apply_chat_template:
            raise BadRow("needs a template", self.history, "only a chat template can render earlier turns before text")
        return [*history, {"role": "user", "content": prompt or ""}]

    def _with_template_kwargs(self, pair: Pair, value: Any) -> Pair:
        given = read_template_kwargs(value, self.template_kwargs)
        if given and isinstance(pair.prompt, str):
            raise BadRow(
                "needs a template", self.template_kwargs, "only a chat template reads it, and text is used as it is"
            )
        return replace(pair, template_kwargs=given)

    def _system(self, row: dict[str, Any]) -> str | None:
        if self.system is None:
            return None
        value = decode_optional(row[self.system])
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise BadRow("wrong type", self.system, f"{value!r} is not text")
        return value

    def _text_pair(
        self, prompt: str | None, chosen: str, rejected: str, system: str | None, tools: list[Any] | None
    ) -> Pair:
        if prompt is None:
            if chosen == rejected and chosen.strip():
                raise BadRow("identical pair", self.rejected, f"the same text as `{self.chosen}`")
            prompt = common_text_prompt(chosen, rejected)
            if not prompt and chosen and rejected:
                raise BadRow(
                    "no common prompt",
                    self.chosen,
                    f"there is no prompt column, and `{self.chosen}` and `{self.rejected}` have no common start",
                )
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        else:
            chosen, rejected = without_repeat(prompt, chosen, rejected, self.repeats_prompt)
        for column, text in ((self.chosen, chosen), (self.rejected, rejected)):
            if not text.strip():
                raise BadRow("empty completion", column, "no text" if not text else "nothing but white space")
        if chosen == rejected:
            raise BadRow("identical pair", self.rejected, f"the same text as `{self.chosen}`")
        if self.apply_chat_template:
            messages = _with_system([{"role": "user", "content": prompt}], system, self.system)
            return Pair(messages, _assistant(chosen), _assistant(rejected), tools)
        for unused, given in ((self.system, system), (self.tools, tools)):
            if given is not None:
                raise BadRow(
                    "needs a template", unused, "only a chat template can render it, and text is used as it is"
                )
        return Pair(prompt, chosen, rejected)

    def _message_pair(
        self,
        prompt: str | list[Message] | None,
        chosen: list[Message],
        rejected: list[Message],
        system: str | None,
        tools: list[Any] | None,
    ) -> Pair:
        notes: list[str] = []
        copy = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str):
            # Either the replies alone, or (UltraFeedback) whole conversations beside a copy of the question.
            reply_alone = any(side and side[0]["role"] == "assistant" for side in (chosen, rejected))
            prompt = [{"role": "user", "content": prompt}] if reply_alone else None
        if prompt is None:
            shared = chosen[: common_length(visible(chosen), visible(rejected))]
            if not shared and chosen and rejected:
                raise BadRow(
                    "no common prompt",
                    self.chosen,
                    f"`{self.chosen}` and `{self.rejected}` have no first message in common",
                )
            prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
            if copy and not is_part_of(copy, [text_of(message["content"]) for message in shared]):
                notes = [f"the text of `{self.prompt}` is not in the conversations, and these alone are read"]
            if not chosen and not rejected:
                raise BadRow("identical pair", self.rejected, f"the same conversation as `{self.chosen}`")
        else:
            chosen, rejected = _without_prompt(prompt, chosen), _without_prompt(prompt, rejected)
        for column, side in ((self.chosen, chosen), (self.rejected, rejected)):
            self._check_completion(column, side)
        if visible(chosen) == visible(rejected):
            raise BadRow("identical pair", self.rejected, f"the same messages as `{self.chosen}`")
        prompt_column = self.prompt or self.chosen
        if not prompt:
            raise BadRow("bad message", prompt_column, "the prompt has no messages")
        if prompt[-1]["role"] == "assistant":
            raise BadRow("bad message", prompt_column, "the prompt ends with an assistant's message: nothing to answer")
        return Pair(_with_system(prompt, system, self.system), chosen, rejected, tools, notes=notes)

    def _check_completion(self, column: str, messages: list[Message]) -> None:
        if not messages:
            raise BadRow("empty completion", column, "no message after the prompt")
        for message in (messages[0], messages[-1]):
            if message["role"] != "assistant":
                raise BadRow(
                    "bad message", column, f"a completion is the assistant's, this one has role `{message['role']}`"
                )
        for message in messages[:-1]:  # axolotl's, OpenAI's and ms-swift's keys
            key = next((key for key in ("train", "weight", "loss") if message.get(key) in (False, 0)), None)
            if key is not None and message["role"] == "assistant":
                raise BadRow(
                    "bad message", column, f"`{key}` takes a turn out of training, and all answers are trained"
                )
        if not any(text_of(message["content"]).strip() or message.get("tool_calls") for message in messages):
            raise BadRow("empty completion", column, "the assistant's message has no text")


def common_length(first: Sequence[Any], *others: Sequence[Any]) -> int:
    """How many items (characters, messages, tokens) the sequences have in common at their start."""
    low, high = 0, min(len(first), *map(len, others))
    while low < high:  # halves compared as slices: texts have thousands of characters
        middle = (low + high + 1) // 2
        part = first[low:middle]
        if all(other[low:middle] == part for other in others):
            low = middle
        else:
            high = middle - 1
    return low


def common_text_prompt(chosen: str, rejected: str) -> str:
    """The prompt of two whole dialogues as text: their common beginning, up to and with the last reply marker, else
    back to the last white space (a word that both replies begin with half of is not part of the prompt)."""
    shared = chosen[: common_length(chosen, rejected)]
    ends = [shared.rfind(marker) + len(marker) for marker in LAST_REPLY_MARKERS if marker in shared]
    if ends:
        return shared[: max(ends)]
    if shared in (chosen, rejected):
        return shared
    while shared and not shared[-1].isspace():
        shared = shared[:-1]
    return shared.rstrip(" ")  # the space belongs to the first token of the reply


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _without_prompt(prompt: list[Message], completion: list[Message]) -> list[Message]:
    """The completion without a copy of the prompt before it: a completion never starts with the user's turn."""
    copied = len(prompt) <= len(completion) and visible(completion[: len(prompt)]) == visible(prompt)
    return completion[len(prompt) :] if prompt and copied else completion


def _with_system(prompt: list[Message], system: str | None, column: str | None) -> list[Message]:
    if system is None:
        return prompt
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"] == system:
            return prompt
        raise BadRow("bad message", column, "the conversation has another system message of its own")
    return [{"role": "system", "content": system}, *prompt]
