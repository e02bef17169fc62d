"""Canonical pair -> token ids of prompt, chosen and rejected.

What the model sees is tokenised as a whole (prompt + completion), and then cut in two: a tokenizer may merge the last
characters of the prompt with the first of the completion, and a model that generates never sees such a prompt token.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from orpo_dist.data.cache import digest
from orpo_dist.data.chat_template import ProcessingClass
from orpo_dist.data.pairs import Pair, common_length
from orpo_dist.data.render_pair import PairRenderer, RenderedPair
from orpo_dist.errors import BadRow

# What a saved tokenizer says of where it was loaded from, and of what its last call padded or truncated to.
TRANSIENT_SETTINGS = ("name_or_path", "is_local", "local_files_only", "padding", "truncation")

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
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    fixed: frozenset[int] = frozenset()
    after_text: int = 0


def tokenizer_digest(processing_class: ProcessingClass) -> str:
    """A name for what a tokenizer or processor does: equal vocabulary, merges, special tokens and image settings, equal
    name."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        processing_class.save_pretrained(folder)
        for file in sorted(file for file in Path(folder).rglob("*") if file.is_file()):
            content = file.read_bytes()
            if file.suffix == ".json":
                settings = json.loads(content)
                if isinstance(settings, dict):
                    settings = {key: value for key, value in settings.items() if key not in TRANSIENT_SETTINGS}
                content = json.dumps(settings, sort_keys=True).encode()
            parts += [file.relative_to(folder).as_posix().encode(), content]
    return digest(parts)


class PairTokenizer(PairRenderer):
    """Tokenises pairs of one format with one tokenizer.

    Raises:
        UserError: a contradiction between the format, the tokenizer and the options (at construction or, for message
            lists without any chat template, at the first of them).
    """

    def __call__(self, pairs: Sequence[Pair]) -> list[TokenizedPair | BadRow]:
        """Tokenises the pairs in one call of the tokenizer; a pair that proves unfit comes back as its BadRow."""
        rendered = [self._render_or_bad(pair) for pair in pairs]
        texts = [text for item in rendered if isinstance(item, RenderedPair) for text in self._texts(item)]
        ids = iter(self._ids(texts))
        result: list[TokenizedPair | BadRow] = []
        for item in rendered:
            if isinstance(item, BadRow):
                result.append(item)
                continue
            prompt, chosen, rejected = next(ids), next(ids), next(ids)
            try:
                result.append(self._assemble(item, prompt, chosen, rejected))
            except BadRow as bad:
                result.append(bad)
        return result

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

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=self.options.is_encoder_decoder,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about texts longer than the model: lengths are this module's job
        )["input_ids"]

    def _assemble(
        self, text: RenderedPair, prompt: list[int], with_chosen: list[int], with_rejected: list[int]
    ) -> TokenizedPair:
        options = self.options
        pair = self._split(text, prompt, with_chosen, with_rejected)
        for column, ids in ((self.format.chosen, pair.chosen), (self.format.rejected, pair.rejected)):
            if not ids:
                raise BadRow("empty completion", column, "the tokenizer makes no token of it")
        chosen, rejected = pair.chosen, pair.rejected
        if options.add_eos_token and not text.templated:
            chosen, rejected = self._with_eos(chosen), self._with_eos(rejected)
        no_eos = options.add_eos_token and not text.templated and self.tokenizer.eos_token_id is None

        kept = list(range(len(pair.prompt)))
        if options.max_prompt_length is not None and len(kept) > options.max_prompt_length:
            kept = self._kept(pair, text.generation_prompt, options.max_prompt_length)
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
            result, chosen_context=contexts[0], rejected_context=contexts[1], notes=text.notes + [NO_EOS_NOTE] * no_eos
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
        return SplitPair(self._begun(text, with_chosen[:length]), with_chosen[length:], with_rejected[length:])

    def _begun(self, text: RenderedPair, prompt: list[int]) -> list[int]:
        """The prompt as the model reads it: text as the tokenizer itself begins it, a rendering as it is."""
        if not text.templated and prompt[: len(self.beginning)] != self.beginning:
            prompt = [*self.beginning, *prompt]
        if not prompt and self.tokenizer.bos_token_id is not None:
            prompt = [self.tokenizer.bos_token_id]  # a completion needs a token that predicts its first one
        if not prompt:
            raise BadRow("empty prompt", self.format.prompt, "the prompt has no token")
        return prompt

    @cached_property
    def beginning(self) -> list[int]:
        """What the tokenizer writes before every text: BOS for Llama's, nothing for GPT-2's and Qwen's."""
        bare, whole = self._ids(["a"])[0], list(self.tokenizer("a", verbose=False)["input_ids"])
        places = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
        return whole[: places[0]] if places else []

    def _with_eos(self, completion: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            return completion
        end = len(completion)
        while end > 0 and completion[end - 1] != eos and self._is_white_space(completion[end - 1]):
            end -= 1
        # chatml ends a turn with EOS and a line break: a second EOS would teach the model to wait for one.
        return completion if end > 0 and completion[end - 1] == eos else [*completion, eos]

    def _is_white_space(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token])).strip()

    def _kept(self, pair: SplitPair, generation_prompt: str, limit: int) -> list[int]:
        """Places of the prompt's tokens that stay when it is cut to `limit` tokens. Images stay whole."""
        prompt, bos = pair.prompt, self.tokenizer.bos_token_id
        first, end, from_left = 0, len(prompt), self.options.truncation_side == "left"
        if from_left:
            first = int(prompt[0] == bos)
        else:
            # A right cut would take away the header of the assistant's turn, and with it what makes the reply a reply.
            tail = len(self._ids([generation_prompt])[0]) if generation_prompt else 0
            if self.options.is_encoder_decoder:
                tail = int(prompt[-1] == self.tokenizer.eos_token_id)
            tail += pair.after_text
            end, from_left = (end - tail, False) if tail < limit else (end, True)
        excess = len(prompt) - limit
        free = [place for place in range(first, end) if place not in pair.fixed]
        if len(free) < excess:
            raise BadRow(
                "images too long",
                self._image_column,
                f"the images take {len(pair.fixed)} tokens of the prompt, which are never cut: more than "
                f"max_prompt_length={limit} leaves",
            )
        gone = set(free[:excess] if from_left else free[len(free) - excess :])
        kept = [place for place in range(len(prompt)) if place not in gone]
        # BOS may be what starts a turn, as SmolLM2's: no second one.
        return kept[1:] if first and len(kept) > 1 and prompt[kept[1]] == bos else kept

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
        if self.options.is_encoder_decoder and completion[-1] == self.tokenizer.eos_token_id:
            return [*completion[: room - 1], completion[-1]]  # as the tokenizer's own truncation, which TRL uses
        return completion[:room]
