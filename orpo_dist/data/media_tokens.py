"""The special tokens of a vision-language model that stand for images, videos and sounds.

Typed into a text they become the same ids, and the model looks for features that are not there: it stops in its
forward, or trains on the embedding of an image's place.
"""

import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from orpo_dist.data.messages import Message
from orpo_dist.errors import BadRow


class MediaTokens:
    """processor: its own token names and ids. written: ids that it writes for a drawn image. turns: ids of a rendered
    conversation without images, which are not of media. image_text: what a template writes for an image."""

    def __init__(self, processor: ProcessorMixin, written: Iterable[int], turns: Iterable[int], image_text: str):
        tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        added = {int(token): str(entry) for token, entry in tokenizer.added_tokens_decoder.items()}
        declared = processor.image_token_ids + processor.video_token_ids + processor.audio_token_ids
        named = {str(value) for name, value in vars(processor).items() if name.endswith("_token")}
        text = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, *turns}
        found = [
            content
            for token, content in added.items()
            if token not in text and (token in declared or token in set(written) or content in named)
        ]
        self._all = _pattern(found)
        self._never_in_a_prompt = _pattern([content for content in found if content not in image_text])

    def check_text(self, prompt: str, completions: Sequence[tuple[str, str]], column: str, has_images: bool) -> None:
        """Rendered text: a prompt with images may hold what is written for an image, and nothing else of media.

        completions: (column, text).

        Raises:
            BadRow: "media token".
        """
        _refuse(self._never_in_a_prompt if has_images else self._all, prompt, column)
        for name, text in completions:
            _refuse(self._all, text, name)

    def check_messages(self, messages: Sequence[Message], column: str) -> None:
        """Messages before they are rendered: none of their text may hold such a token.

        Raises:
            BadRow: "media token".
        """
        for message in messages:
            content = message["content"]
            texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            for text in texts:
                _refuse(self._all, text, column)


def _pattern(tokens: Sequence[str]) -> re.Pattern[str] | None:
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _refuse(pattern: re.Pattern[str] | None, text: str, column: str) -> None:
    if pattern is not None and (found := pattern.search(text)):
        raise BadRow("media token", column, f"the text holds `{found[0]}`, a token that stands for media in this model")
