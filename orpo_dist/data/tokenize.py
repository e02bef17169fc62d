"""Canonical pair -> token ids of prompt, chosen and rejected.

What the model sees is tokenised as a whole (prompt + completion), and then cut in two: a tokenizer may merge the last
characters of the prompt with the first of the completion, and a model that generates never sees such a prompt token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orpo_dist.data.pairs import Pair, PairFormat, common_length
from orpo_dist.data.render_pair import PairRenderer, RenderedPair
from orpo_dist.data.truncation import WrittenTokens, kept_places, tail_tokens, written_after_text
from orpo_dist.data.typed_tokens import TextTokenizer, TokenNotes
from orpo_dist.errors import BadRow, UserError
from orpo_dist.options.data import PrepareOptions

NO_EOS_NOTE = "add_eos_token adds nothing, since the tokenizer has no EOS token: these answers have no end"


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of a pair. The model sees prompt_ids + chosen_ids (P + C tokens) and prompt_ids + rejected_ids (P + R);
    BOS and EOS are in them. For an encoder-decoder model the completions are the decoder's labels.

    Attributes:
        chosen_context, rejected_context: the tokens of a completion that the model did not write (turns of the user or
            of a tool), as [start, stop, start, stop, ...]: the model sees them, the loss and the mean do not.
        notes: what is worth knowing of a pair that is trained on, as `PreparedPairs.notes` counts it.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    truncated_prompt: bool
    truncated_completions: int
    chosen_context: list[int] = field(default_factory=list, kw_only=True)
    rejected_context: list[int] = field(default_factory=list, kw_only=True)
    notes: list[str] = field(default_factory=list, kw_only=True)


@dataclass(frozen=True)
class SplitPair:
    """A pair as token ids, whole, BOS and EOS in them.

    Attributes:
        fixed: places in `prompt` that no cut may take away: the tokens of images.
        after_text: tokens at the end of `prompt` that are none of its text: a processor has written them.
        notes: what is to be said of the pair.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    fixed: frozenset[int] = frozenset()
    after_text: int = 0
    notes: tuple[str, ...] = ()


class PairTokenizer(PairRenderer):
    """Tokenises pairs of one format with one tokenizer.

    Raises:
        UserError: a contradiction between the format, the tokenizer and the options (at construction or, for message
            lists without any chat template, at the first of them).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pair_format: PairFormat,
        options: PrepareOptions,
        chat_template: str | None = None,
    ):
        super().__init__(tokenizer, pair_format, options, chat_template)
        self._text_tokenizer = TextTokenizer(tokenizer) if options.split_special_tokens else None

    def __call__(self, pairs: Sequence[Pair]) -> list[TokenizedPair | BadRow]:
        """Tokenises the pairs in one call of the tokenizer; a pair that proves unfit comes back as its BadRow."""
        self._check_renderer(pairs)
        if self._text_tokenizer is not None:
            pairs = [self._text_tokenizer.hide(pair) for pair in pairs]
        rendered = [self._render_or_bad(pair) for pair in pairs]
        texts = [text for item in rendered if isinstance(item, RenderedPair) for text in self._texts(item)]
        ids = iter(self._ids(texts))
        result: list[TokenizedPair | BadRow] = []
        for source, item in zip(pairs, rendered, strict=True):
            if isinstance(item, BadRow):
                result.append(item)
                continue
            prompt, chosen, rejected = next(ids), next(ids), next(ids)
            try:
                result.append(self._noted(source, self._assemble(source, item, prompt, chosen, rejected)))
            except BadRow as bad:
                result.append(bad)
        return result

    def _check_renderer(self, pairs: Sequence[Pair]) -> None:
        """mistral-common renders messages to token ids by code of its own, and takes no chat template."""
        renders = isinstance(self.tokenizer, PreTrainedTokenizer | PreTrainedTokenizerFast)
        if not renders and not all(isinstance(pair.prompt, str) for pair in pairs):
            raise UserError(
                f"The rows are lists of messages, and {type(self.tokenizer).__name__} takes no chat template: the "
                "model has a tekken.json and no tokenizer.json, so that mistral-common reads it. Write a "
                "tokenizer.json beside it: convert_tekken_tokenizer('tekken.json').save_pretrained('.'), from "
                "transformers.integrations.mistral."
            )

    def _noted(self, source: Pair, result: TokenizedPair) -> TokenizedPair:
        ids = (result.prompt_ids, result.chosen_ids, result.rejected_ids)
        notes = self._token_notes.of(source, ids, self.format)
        return replace(result, notes=[*result.notes, *notes]) if notes else result

    @cached_property
    def _token_notes(self) -> TokenNotes:
        return TokenNotes(self.tokenizer, typed=self._text_tokenizer is None)

    # -- text --

    def _render_or_bad(self, pair: Pair) -> RenderedPair | BadRow:
        try:
            return self.render(pair)
        except BadRow as bad:
            return bad

    # -- tokens --

    def _texts(self, pair: RenderedPair) -> list[str]:
        if self.options.is_encoder_decoder:
            return [pair.prompt, pair.chosen, pair.rejected]
        return [pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._text_tokenizer is not None:
            return self._text_tokenizer.ids(texts, add_special_tokens=self.options.is_encoder_decoder)
        return self.tokenizer(
            list(texts),
            add_special_tokens=self.options.is_encoder_decoder,
            return_attention_mask=False,
            verbose=False,  # no warning about texts longer than the model: lengths are this module's job
        )["input_ids"]

    def _assemble(
        self,
        source: Pair,
        text: RenderedPair,
        prompt: list[int],
        with_chosen: list[int],
        with_rejected: list[int],
    ) -> TokenizedPair:
        options = self.options
        pair = self._split(text, prompt, with_chosen, with_rejected)
        for column, ids in ((self.format.chosen, pair.chosen), (self.format.rejected, pair.rejected)):
            if not ids or (options.is_encoder_decoder and self._written.is_empty(ids)):
                raise BadRow("empty completion", column, "the tokenizer makes no token of it: it knows no character")
        chosen, rejected = pair.chosen, pair.rejected
        if options.add_eos_token and not text.templated:
            chosen, rejected = self._with_eos(chosen), self._with_eos(rejected)
        no_eos = options.add_eos_token and not text.templated and self.tokenizer.eos_token_id is None

        kept = list(range(len(pair.prompt)))
        if options.max_prompt_length is not None and len(kept) > options.max_prompt_length:
            kept = self._kept(source, text, pair, options.max_prompt_length)
        room = self._room(len(kept), len(pair.fixed))
        cut_chosen, cut_rejected = self._cut_completion(chosen, room), self._cut_completion(rejected, room)
        if cut_chosen == cut_rejected:
            if chosen == rejected:
                raise BadRow("identical pair", self.format.rejected, f"the same tokens as `{self.format.chosen}`")
            raise BadRow(
                "identical after truncation",
                self.format.rejected,
                f"the completions differ only after their first {len(cut_chosen)} tokens, where they are cut",
            )
        cut = (len(cut_chosen) < len(chosen)) + (len(cut_rejected) < len(rejected))
        contexts = [
            self._context_tokens(stretches, text.prompt, completion, whole, cut)
            for stretches, completion, whole, cut in (
                (text.chosen_context, text.chosen, chosen, cut_chosen),
                (text.rejected_context, text.rejected, rejected, cut_rejected),
            )
        ]
        result = self._result(text, pair, kept, cut_chosen, cut_rejected, cut)
        return replace(
            result,
            chosen_context=contexts[0],
            rejected_context=contexts[1],
            notes=[*text.notes, *pair.notes, *([NO_EOS_NOTE] * no_eos)],
        )

    def _context_tokens(
        self, stretches: list[tuple[int, int]], prompt: str, completion: str, whole: list[int], cut: list[int]
    ) -> list[int]:
        """`TokenizedPair.chosen_context` of a completion of the ids `whole`, of which `cut` is kept."""
        if not stretches:
            return []
        prompt = "" if self.options.is_encoder_decoder else prompt
        texts = [prompt + completion[:place] for stretch in stretches for place in stretch]
        ids, *heads = self._ids([prompt + completion, *texts])
        # A token with both an answer and another's turn in it is scored as part of the answer that it begins.
        places = [min(common_length(ids, head) - (len(ids) - len(whole)), len(cut)) for head in heads]
        spans = zip(places[::2], places[1::2], strict=True)
        return [place for start, stop in spans if start < stop for place in (start, stop)]

    def _result(
        self, text: RenderedPair, pair: SplitPair, kept: list[int], chosen: list[int], rejected: list[int], cut: int
    ) -> TokenizedPair:
        prompt = [pair.prompt[place] for place in kept]
        return TokenizedPair(prompt, chosen, rejected, len(kept) < len(pair.prompt), cut)

    def _split(
        self, text: RenderedPair, prompt: list[int], with_chosen: list[int], with_rejected: list[int]
    ) -> SplitPair:
        if self.options.is_encoder_decoder:
            return SplitPair(prompt, with_chosen, with_rejected)
        length = common_length(prompt, with_chosen, with_rejected)
        return SplitPair(self._begun(text, prompt, with_chosen[:length]), with_chosen[length:], with_rejected[length:])

    def _begun(self, text: RenderedPair, alone: list[int], prompt: list[int]) -> list[int]:
        """The prompt as the model reads it: text as the tokenizer itself begins it, a rendering as it is.

        Args:
            alone: the ids of the prompt's text by itself.
        """
        beginning = self._written.before
        if not text.templated and prompt[: len(beginning)] != beginning:
            prompt = [*beginning, *prompt]
        if not prompt and self.tokenizer.bos_token_id is not None:
            prompt = [self.tokenizer.bos_token_id]  # a completion needs a token that predicts its first one
        if not prompt:
            raise self._empty_prompt(text, alone)
        return prompt

    def _empty_prompt(self, text: RenderedPair, prompt: list[int]) -> BadRow:
        """Why nothing is left of the prompt, for a tokenizer without BOS."""
        if prompt:
            reason = f"the tokenizer merges all of the prompt, {text.prompt!r}, with the beginning of the completions"
        elif text.prompt.strip():
            reason = f"the tokenizer knows no character of the prompt {text.prompt[:40]!r}"
        else:
            reason = "the prompt has no token"
        return BadRow("empty prompt", self.format.prompt, reason)

        return prompt

    def _with_eos(self, completion: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        if eos is None or (self.options.is_encoder_decoder and self._written.ends_with(completion, eos)):
            return completion
        end = len(completion)
        while end > 0 and completion[end - 1] != eos and self._is_white_space(completion[end - 1]):
            end -= 1
        # chatml ends a turn with EOS and a line break: a second EOS would teach the model to wait for one.
        return completion if end > 0 and completion[end - 1] == eos else [*completion, eos]

    def _is_white_space(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token])).strip()

    @cached_property
    def _written(self) -> WrittenTokens:
        return WrittenTokens.by(self.tokenizer)

    def _kept(self, source: Pair, text: RenderedPair, pair: SplitPair, limit: int) -> list[int]:
        """Places of the prompt's tokens that stay when it is cut to `limit` tokens. Images stay whole."""
        prompt, bos, side = pair.prompt, self.tokenizer.bos_token_id, self.options.truncation_side
        head, tail = int(side == "left" and prompt[0] == bos), 0
        if self.options.is_encoder_decoder:
            head, tail = self._written.around(prompt)
            if head + tail >= limit:
                raise BadRow(
                    "prompt too long",
                    self.format.prompt,
                    f"max_prompt_length={limit} leaves no room beside the {head + tail} tokens that the tokenizer "
                    "writes around every text",
                )
        elif side == "right":
            # A right cut would take away the header of the assistant's turn, and with it what makes the reply a reply.
            tail = tail_tokens(self._ids, text.prompt, self._tail(source, text)) + pair.after_text
            side, tail = ("right", tail) if tail < limit else ("left", 0)
        kept = kept_places(len(prompt), limit, side, head, tail, pair.fixed)
        if kept is None:
            raise BadRow(
                "images too long",
                self._image_column,
                f"the images take {len(pair.fixed)} tokens of the prompt, which are never cut: more than "
                f"max_prompt_length={limit} leaves",
            )
        # BOS may be what starts a turn, as SmolLM2's: no second one.
        return kept[1:] if head and len(kept) > 1 and prompt[0] == prompt[kept[1]] == bos else kept

    def _tail(self, source: Pair, text: RenderedPair) -> str:
        """What the template writes at the end of the prompt, after the text of its last message."""
        if isinstance(source.prompt, str) or not source.prompt:
            return text.generation_prompt
        tail = written_after_text(
            lambda messages: self._apply(messages, source, add_generation_prompt=True), source.prompt, text.prompt
        )
        return text.generation_prompt if tail is None else tail

    def _room(self, prompt_length: int, image_tokens: int) -> int | None:
        """Most tokens that a completion may have after a prompt of this length; None where nothing bounds it."""
        options = self.options
        bounds = [] if options.max_completion_length is None else [options.max_completion_length]
        if options.max_length is not None:
            # An encoder-decoder model reads and writes separate sequences, each of which max_length bounds.
            left = options.max_length - (0 if options.is_encoder_decoder else prompt_length)
            if left < 1 or prompt_length > options.max_length:
                images = f" ({image_tokens} of images)" if image_tokens else ""
                raise BadRow(
                    "prompt too long" if image_tokens < options.max_length else "images too long",
                    self.format.prompt,
                    f"the prompt has {prompt_length} tokens{images}, which leaves no room for a completion within "
                    f"max_length={options.max_length}",
                )
            bounds.append(left)
        return min(bounds) if bounds else None

    def _cut_completion(self, completion: list[int], room: int | None) -> list[int]:
        if room is None or len(completion) <= room:
            return completion
        if self.options.is_encoder_decoder:
            return self._written.cut(completion, room, self.tokenizer.eos_token_id)
        return completion[:room]
