"""Canonical pair -> text of prompt, chosen and rejected, through the chat template where it is made of messages."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orpo_dist.data.chat_template import resolve_chat_template
from orpo_dist.data.messages import Message, text_of
from orpo_dist.data.pairs import Pair, PairFormat, common_length
from orpo_dist.data.rendered import RenderedMarkers
from orpo_dist.data.rendering import REASONING, Piece, missing_pieces
from orpo_dist.data.text_turns import NOTE, user_turns
from orpo_dist.data.turns import TurnFinder
from orpo_dist.errors import BadRow, UserError
from orpo_dist.images.decode import StoredImage
from orpo_dist.options.data import PrepareOptions

HISTORY_NOTE = "the chat template leaves out the reasoning of earlier answers"


@dataclass(frozen=True)
class RenderedPair:
    """A pair as text. `generation_prompt` is the header of the assistant's turn at the end of `prompt`. `images` stand
    in the prompt, in this order.

    Attributes:
        templated: a chat template has written all of it, its beginning and end included.
        chosen_context, rejected_context: stretches of a completion that the model did not write.
        notes: as in `TokenizedPair`.
    """

    prompt: str
    chosen: str
    rejected: str
    generation_prompt: str = ""
    images: list[StoredImage] = field(default_factory=list)
    templated: bool = False
    chosen_context: list[tuple[int, int]] = field(default_factory=list)
    rejected_context: list[tuple[int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class PairRenderer:
    """Renders pairs of one format with the chat template of one tokenizer.

    Raises:
        UserError: a chat template that does not exist.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pair_format: PairFormat,
        options: PrepareOptions,
        chat_template: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.format = pair_format
        self.options = options
        self.chat_template = chat_template or resolve_chat_template(options.chat_template, tokenizer)
        self.tools_template = chat_template or resolve_chat_template(options.chat_template, tokenizer, tools=True)
        known = isinstance(
            tokenizer, PreTrainedTokenizer | PreTrainedTokenizerFast
        )  # mistral-common's has no such list
        self.marks = [token.content for token in tokenizer.added_tokens_decoder.values()] if known else []
        self.markers = RenderedMarkers(tokenizer, self.chat_template)

    def render(self, pair: Pair) -> RenderedPair:
        """The pair as text, through the chat template where it is made of messages.

        Raises:
            BadRow: the template refuses the row, or renders its prompt differently once an answer follows; an image.
            UserError: messages, and no chat template.
        """
        if pair.images:
            raise BadRow("images without a processor", self._image_column, "the row has an image, the model reads text")
        return self._render(pair)

    @property
    def _image_column(self) -> str:
        return self.format.image or self.format.prompt or self.format.chosen

    def _render(self, pair: Pair) -> RenderedPair:
        if isinstance(pair.prompt, str):
            assert isinstance(pair.chosen, str) and isinstance(pair.rejected, str)
            chosen = user_turns(pair.prompt, pair.chosen, self.format.chosen)
            rejected = user_turns(pair.prompt, pair.rejected, self.format.rejected)
            return RenderedPair(
                pair.prompt,
                pair.chosen,
                pair.rejected,
                chosen_context=chosen,
                rejected_context=rejected,
                notes=[NOTE] if chosen or rejected else [],
            )
        assert isinstance(pair.chosen, list) and isinstance(pair.rejected, list)
        if self.chat_template is None:
            raise UserError(
                "The rows are lists of messages, and the tokenizer has no chat template. Set chat_template=chatml (or "
                "zephyr, or a Jinja file)."
            )
        self._refuse_rendered_text(pair.prompt, pair.chosen, self.format.chosen)
        self._refuse_rendered_text(pair.prompt, pair.rejected, self.format.rejected)
        turns = TurnFinder(lambda messages, generation: self._apply(messages, pair, generation), self.marks)
        text = self._cut(pair, pair.prompt, [pair.prompt + pair.chosen, pair.prompt + pair.rejected], turns)
        return replace(
            text,
            notes=[*pair.notes, *self._check_rendering(pair, text)],
            chosen_context=self._context(turns, pair.prompt, pair.chosen, text.chosen, self.format.chosen),
            rejected_context=self._context(turns, pair.prompt, pair.rejected, text.rejected, self.format.rejected),
        )

    def _cut(self, pair: Pair, messages: list[Message], wholes: list[list[Message]], turns: TurnFinder) -> RenderedPair:
        prompt = self._apply(messages, pair, add_generation_prompt=True)
        texts = [self._apply(whole, pair) for whole in wholes]
        # Some templates write more after the generation prompt than an answer has there (DeepSeek-R1's <think>), so
        # the prompt is what all three share: TRL's apply_chat_template does the same.
        shared = common_length(prompt, *texts)
        # Common with the prompt, not equal to its start: Phi's templates end a conversation without header with EOS.
        header = common_length(prompt, self._apply(messages, pair))
        answers_at = [shared, shared]
        if shared < header:
            cut = turns.cut(messages, list(zip(wholes, texts, strict=True)))
            if cut is None:
                raise BadRow(
                    "template without a boundary",
                    self.format.prompt,
                    "the chat template renders the prompt differently once an answer follows, and its end is not found",
                )
            prompt, answers_at = cut.prompt, cut.answers_at
            shared, header = len(prompt), min(header, len(prompt))
        chosen, rejected = (text[at:] for text, at in zip(texts, answers_at, strict=True))
        return RenderedPair(prompt[:shared], chosen, rejected, prompt[header:shared], templated=True)

    def _context(
        self, turns: TurnFinder, prompt: list[Message], completion: list[Message], text: str, column: str
    ) -> list[tuple[int, int]]:
        """The stretches of `text`, the completion as it is rendered, that the model did not write."""
        if all(message["role"] == "assistant" for message in completion):
            return []
        whole = turns.render(prompt + completion, False)
        stretches, begins = turns.context(prompt + completion, len(prompt), whole), len(whole) - len(text)
        if stretches is None or any(start <= begins for start, _ in stretches):
            raise BadRow(
                "template without a boundary",
                column,
                "the completion has turns that the model did not write, and the chat template renders them so that "
                "they cannot be told from the answers",
            )
        return [(start - begins, stop - begins) for start, stop in stretches]

    def _check_rendering(self, pair: Pair, text: RenderedPair) -> list[str]:
        """Notes on what the template leaves out of a pair that is kept.

        Raises:
            BadRow: the template leaves out something that the row says, and allow_template_drops is off.
        """
        assert not isinstance(pair.prompt, str) and not isinstance(pair.chosen, str)
        assert not isinstance(pair.rejected, str)
        column = self.format.prompt or self.format.chosen
        lost: list[tuple[str, Piece]] = [
            (column, piece) for piece in missing_pieces(pair.prompt, pair.tools, text.prompt)
        ]
        # Of earlier answers, reasoning is left out on purpose: the model does not see it in its own history either.
        history = [piece for _, piece in lost if piece.field == REASONING]
        lost = [item for item in lost if item[1].field != REASONING]
        header = text.generation_prompt  # an answer may begin with what the header ends with: <think>
        for column, messages, completion in (
            (self.format.chosen, pair.chosen, text.chosen),
            (self.format.rejected, pair.rejected, text.rejected),
        ):
            lost += [(column, piece) for piece in missing_pieces(messages, None, header + completion)]
        notes = [HISTORY_NOTE] if history else []
        if lost and not self.options.allow_template_drops:
            column, piece = lost[0]
            raise BadRow("dropped by the template", column, f"the chat template drops {piece}")
        return notes + [f"the chat template drops {what}" for what in dict.fromkeys(p.what for _, p in lost)]

    def _apply(self, messages: list[Message], pair: Pair, add_generation_prompt: bool = False) -> str:
        try:
            try:
                return self._template(messages, pair, add_generation_prompt)
            except TypeError:
                # DeepSeek-V3's template adds the arguments of a call to text: it wants them as JSON.
                spelled = with_text_arguments(messages)
                if spelled == messages:
                    raise
                return self._template(spelled, pair, add_generation_prompt)
        except (TemplateError, TypeError, KeyError, ValueError, RecursionError) as error:
            column = self.format.prompt or self.format.chosen
            raise BadRow("chat template", column, f"the chat template refuses it: {error}") from None

    def _template(self, messages: list[Message], pair: Pair, add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=pair.tools,
            chat_template=self.tools_template if pair.tools else self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **pair.template_kwargs,
        )
        assert isinstance(text, str)
        return text

    def _refuse_rendered_text(self, prompt: list[Message], completion: list[Message], column: str) -> None:
        places = [(self.format.prompt or column, text_of(message["content"])) for message in prompt]
        places += [(column, text_of(message["content"])) for message in completion]
        question = places[len(prompt) - 1][1] if prompt else ""
        places.append((column, f"{question}\n{places[len(prompt)][1]}"))  # a marker in each of the two
        for place, text in places:
            if marker := self.markers.find(text):
                reason = f"the text contains `{marker}`, so a chat template has been applied to it before"
                raise BadRow("rendered already", place, reason)


def with_text_arguments(messages: list[Message]) -> list[Message]:
    """The messages with the arguments of their calls as JSON text."""

    def spelled(call: Any) -> Any:
        if isinstance(function := call.get("function"), dict):
            return {**call, "function": spelled(function)}
        if isinstance(arguments := call.get("arguments"), dict):
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return call

    return [
        {**message, "tool_calls": [spelled(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]
