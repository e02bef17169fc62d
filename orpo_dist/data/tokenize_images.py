"""Canonical pair with images -> token ids, through the model's processor.

The processor replaces each image's placeholder in the prompt by the image's tokens. What follows the last image is
tokenised as text (data/tokenize.py), so the pixels of a pair are processed once, not once per completion.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from transformers import AddedToken, ProcessorMixin

from orpo_dist.data.chat_template import resolve_chat_template
from orpo_dist.data.content_spelling import WORDS, ContentSpelling
from orpo_dist.data.media_tokens import MediaTokens
from orpo_dist.data.messages import Message
from orpo_dist.data.pairs import Pair, PairFormat, common_length
from orpo_dist.data.place_images import PLACEHOLDER
from orpo_dist.data.render_pair import RenderedPair
from orpo_dist.data.tokenize import PairTokenizer, SplitPair, TokenizedPair
from orpo_dist.data.typed_tokens import TokenNotes
from orpo_dist.errors import BadRow, UserError
from orpo_dist.images.decode import StoredImage, has_more_frames, open_image, short
from orpo_dist.images.source import fetch_all, is_url
from orpo_dist.options.data import PrepareOptions

if TYPE_CHECKING:
    from PIL.Image import Image

FRAMES_NOTE = "an image has several frames (an animation, pages): the first is used"
ADDED = -1  # place of a token that the processor does not write: BOS


@dataclass(frozen=True)
class TokenizedImagePair(TokenizedPair):
    """Token ids of a pair whose prompt may have images; their tokens are in `prompt_ids`.

    Attributes:
        images: in the order of the prompt.
        prompt_text: what the processor makes `prompt_ids` of, with one placeholder per image:
            `processor(text=[prompt_text], images=[images], add_special_tokens=False)`.
        prompt_places: for each of `prompt_ids` its place in what the processor makes, or ADDED; empty where both are
            the same. They differ by BOS, by a cut, and by a last token that belongs to the completions.
        image_sizes: width and height of each image, in pixels.
        image_tokens: tokens that the images take.
    """

    images: list[StoredImage]
    prompt_text: str
    prompt_places: list[int]
    image_sizes: list[list[int]]
    image_tokens: int


@dataclass(frozen=True)
class SplitImagePair(SplitPair):
    """`places`: of the prompt's tokens in what the processor makes, or ADDED. The rest as in TokenizedImagePair."""

    places: tuple[int, ...] = ()
    processed_tokens: int = 0
    image_sizes: tuple[tuple[int, int], ...] = ()


class ImagePairTokenizer(PairTokenizer):
    """Tokenises pairs with and without images with one processor.

    Raises:
        UserError: a contradiction between the format, the processor and the options, at construction.
    """

    def __init__(self, processor: ProcessorMixin, pair_format: PairFormat, options: PrepareOptions):
        if options.split_special_tokens:
            raise UserError(
                "split_special_tokens=true: not for a vision-language model, whose processor reads the special tokens "
                "of its images in the text."
            )
        template = resolve_chat_template(options.chat_template, processor)
        super().__init__(processor.tokenizer, pair_format, options, template)
        self.tools_template = resolve_chat_template(options.chat_template, processor, tools=True)
        self.processor = processor
        placeholder = vars(processor).get("image_token")
        placeholder = str(placeholder) if isinstance(placeholder, AddedToken) else placeholder  # BLIP-2's
        if not isinstance(placeholder, str):
            raise UserError(f"{type(processor).__name__} has no image_token: this model's images cannot be placed.")
        self.placeholder = placeholder
        self.placeholder_id = int(self.tokenizer.convert_tokens_to_ids(placeholder))  # type: ignore[arg-type]
        self._spelling = ContentSpelling(self._probe if self.chat_template else None, placeholder)
        if pair_format.has_images:
            self._check_placement()

    def __call__(self, pairs: Sequence[Pair]) -> list[TokenizedPair | BadRow]:
        fetched = fetch_all([image for pair in pairs for image in pair.images], self._image_column)
        outcomes = [_with_fetched(pair, fetched) for pair in pairs]
        results = iter(super().__call__([outcome for outcome in outcomes if isinstance(outcome, Pair)]))
        return [next(results) if isinstance(outcome, Pair) else outcome for outcome in outcomes]

    @cached_property
    def _token_notes(self) -> TokenNotes:
        return TokenNotes(self.tokenizer, ignored=(self.placeholder, PLACEHOLDER))

    # -- text --

    def render(self, pair: Pair) -> RenderedPair:
        """As `PairTokenizer.render`, with a placeholder in the prompt for each image.

        Raises:
            BadRow: also where placeholders and images do not match, or a completion holds a placeholder.
        """
        typed = pair
        if isinstance(pair.prompt, str):
            pair = replace(pair, prompt=self._in_text(pair.prompt, len(pair.images)))
        rendered = replace(self._render(pair), images=pair.images)
        for column, text in ((self.format.chosen, rendered.chosen), (self.format.rejected, rendered.rejected)):
            if self.placeholder in text:
                raise BadRow(
                    "image in a completion", column, f"it holds `{self.placeholder}`, which stands for an image"
                )
        places = rendered.prompt.count(self.placeholder)
        if places != len(pair.images):
            raise BadRow(
                "image count",
                self._image_column,
                f"the row has {len(pair.images)} images, and its prompt as text {places} times `{self.placeholder}`",
            )
        self._check_media_tokens(typed, rendered)
        return rendered

    def _check_media_tokens(self, typed: Pair, rendered: RenderedPair) -> None:
        sides = ((self.format.chosen, typed.chosen), (self.format.rejected, typed.rejected))
        prompt_column = self.format.prompt or self.format.chosen
        for column, side in ((prompt_column, typed.prompt), *sides):
            if not isinstance(side, str):
                self._media_tokens.check_messages(side, column)
        completions = ((self.format.chosen, rendered.chosen), (self.format.rejected, rendered.rejected))
        self._media_tokens.check_text(rendered.prompt, completions, prompt_column, bool(typed.images))

    def _in_text(self, prompt: str, images: int) -> str:
        if not images or prompt.count(self.placeholder) == images:
            return prompt
        if PLACEHOLDER in prompt:
            return prompt.replace(PLACEHOLDER, self._spelling.image_text)
        return self._spelling.image_text * images + prompt

    def _apply(self, messages: list[Message], pair: Pair, add_generation_prompt: bool = False) -> str:
        text = super()._apply([self._spelling.spelled(message) for message in messages], pair, add_generation_prompt)
        if "{'type': '" in text and "{'type': '" not in str([message["content"] for message in messages]):
            raise BadRow(
                "chat template", self.format.prompt, "the chat template prints the parts of a message as a Python list"
            )
        return text

    def _probe(self, messages: list[Message]) -> str:
        text = self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, tokenize=False)
        assert isinstance(text, str)
        return text

    def _tail(self, source: Pair, text: RenderedPair) -> str:
        # Up to the last image it stays anyway, and has another number of tokens than its text.
        return super()._tail(source, text).rpartition(self.placeholder)[2]

    # -- tokens --

    def _split(
        self, text: RenderedPair, prompt: list[int], with_chosen: list[int], with_rejected: list[int]
    ) -> SplitPair:
        if not text.images:
            return super()._split(text, prompt, with_chosen, with_rejected)
        opened = [open_image(image, self._image_column) for image in text.images]
        processed = self._processed(text.prompt, opened)
        # Up to the last image the processor has the word; after it, it must have left the text as it is.
        tail = prompt[len(prompt) - prompt[::-1].index(self.placeholder_id) :]
        length = common_length(prompt, with_chosen, with_rejected)
        head = len(processed) - len(tail)
        if processed[head:] == tail and (tail or processed[-1] in self._added) and length >= len(prompt) - len(tail):
            whole = processed[:head] + tail[: len(tail) - (len(prompt) - length)]
            chosen, rejected = with_chosen[length:], with_rejected[length:]
        elif self._ends_prompts:
            whole, (chosen, rejected) = processed, self._ids([text.chosen, text.rejected])
        else:
            both = [self._processed(text.prompt + side, opened) for side in (text.chosen, text.rejected)]
            length = common_length(processed, *both)
            whole, chosen, rejected = processed[:length], both[0][length:], both[1][length:]
        fixed = self._image_places(whole, prompt)
        places = tuple(range(len(whole)))
        begun = self._written.before
        if begun and not text.templated and not set(begun) & set(whole):
            whole, places = [*begun, *whole], (*(ADDED for _ in begun), *places)
            fixed = {place + len(begun) for place in fixed}
        return SplitImagePair(
            prompt=whole,
            chosen=chosen,
            rejected=rejected,
            fixed=frozenset(fixed),
            after_text=int(self._ends_prompts),
            places=places,
            processed_tokens=len(processed),
            image_sizes=tuple(image.size for image in opened),
            notes=(FRAMES_NOTE,) if any(has_more_frames(image) for image in opened) else (),
        )

    def _result(
        self, text: RenderedPair, pair: SplitPair, kept: list[int], chosen: list[int], rejected: list[int], cut: int
    ) -> TokenizedPair:
        images = pair if isinstance(pair, SplitImagePair) else SplitImagePair([], [], [])
        places = [images.places[place] for place in kept] if text.images else []
        if places == list(range(images.processed_tokens)):
            places = []
        return TokenizedImagePair(
            **vars(super()._result(text, pair, kept, chosen, rejected, cut)),
            images=text.images,
            prompt_text=text.prompt,
            prompt_places=places,
            image_sizes=[list(size) for size in images.image_sizes],
            image_tokens=len(pair.fixed),
        )

    def _begun(self, text: RenderedPair, alone: list[int], prompt: list[int]) -> list[int]:
        prompt, begins = super()._begun(text, alone, prompt), self._begins_texts
        return prompt if prompt[: len(begins)] == begins else [*begins, *prompt]

    @cached_property
    def _begins_texts(self) -> list[int]:
        """What the processor itself writes before a text without images (Molmo 2: BOS)."""
        word = self._ids([WORDS[0]])[0]
        try:
            written = self._processed(WORDS[0], [])
        except BadRow:  # PaliGemma's takes no text by itself
            return []
        return written[: -len(word)] if written[-len(word) :] == word else []

    def _processed(self, text: str, images: "list[Image]") -> list[int]:
        try:
            # As tensors: Ovis 2's and others' need them to place the images' tokens.
            given = {"images": [images]} if images else {}
            made = self.processor(text=[text], add_special_tokens=False, return_tensors="pt", **given)
        except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
            raise BadRow(
                "image processor", self._image_column, f"the processor refuses the images: {short(str(error), 300)}"
            ) from None
        return [int(token) for token in made["input_ids"][0]]

    def _image_places(self, processed: list[int], prompt: list[int]) -> set[int]:
        """Places of the tokens that images are made of: the placeholders, what the processor wrote in their place, the
        white space between parts of an image, and the marks around it that no text has."""
        before, after = Counter(prompt), Counter(processed)
        grown = {token for token in self._added & after.keys() if after[token] > before[token]}
        images = grown - {self.tokenizer.bos_token_id} | {self.placeholder_id}
        inside = {place for place, token in enumerate(processed) if token in images}
        if not inside:
            return inside
        ordered = sorted(inside)
        for left, right in pairwise(ordered):
            gap = range(left + 1, right)
            if all(processed[place] in self._marks or self._is_white_space(processed[place]) for place in gap):
                inside.update(gap)
        for step in (-1, 1):
            for place in sorted(inside)[::step]:
                following = place + step
                while 0 <= following < len(processed) and processed[following] in self._marks:
                    inside.add(following)
                    following += step
        return inside

    @cached_property
    def _added(self) -> set[int]:
        return set(self.tokenizer.added_tokens_decoder)

    @cached_property
    def _marks(self) -> set[int]:
        """Added tokens that stand at images only: not those that end or begin texts and turns."""
        tokenizer = self.tokenizer
        text = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        return self._added - text - self._turns

    @cached_property
    def _turns(self) -> set[int]:
        """Tokens of a conversation without images."""
        if not self.chat_template:
            return set()
        turns = [{"role": "user", "content": WORDS[0]}, {"role": "assistant", "content": WORDS[1]}]
        return set(self._ids([self._spelling.render(turns)])[0])

    @cached_property
    def _media_tokens(self) -> MediaTokens:
        written: list[int] = []
        with suppress(BadRow):  # a processor that refuses the drawing has at least declared its tokens
            written = self._drawn
        return MediaTokens(self.processor, written, self._turns, self._spelling.image_text)

    def _check_placement(self) -> None:
        """Refuse a processor that puts an image before the text by itself (BLIP-2, Fuyu): a placeholder is then one
        image token too many, or one image. PaliGemma's does so only where the text has no placeholder."""
        from PIL import Image

        drawing = Image.new("RGB", (64, 64), "red")

        def image_tokens(text: str) -> int:
            try:
                return self._processed(text, [drawing]).count(self.placeholder_id)
            except BadRow:
                return 0

        alone = image_tokens(WORDS[0])
        if alone and image_tokens(f"{self.placeholder}{WORDS[0]}") != alone:
            raise UserError(
                f"{type(self.processor).__name__} puts an image before the text by itself, wherever the prompt has it: "
                "not supported. Choose another vision-language model, or set image_column='' to train on text alone."
            )

    @cached_property
    def _drawn(self) -> list[int]:
        """What the processor makes of a drawn image and a word after it."""
        from PIL import Image

        return self._processed(f"{self._spelling.image_text}{WORDS[0]}", [Image.new("RGB", (64, 64), "red")])

    @cached_property
    def _ends_prompts(self) -> bool:
        """Whether the processor writes something after the prompt's text, as PaliGemma's line break. Completions are
        then tokenised by themselves, as its `suffix`."""
        return self._drawn[-1] != self._ids([WORDS[0]])[0][-1]


def _with_fetched(pair: Pair, fetched: dict[str, StoredImage | BadRow]) -> Pair | BadRow:
    images = []
    for image in pair.images:
        here = fetched[str(image["path"])] if is_url(image) else image
        if isinstance(here, BadRow):
            return here
        images.append(here)
    return replace(pair, images=images)
