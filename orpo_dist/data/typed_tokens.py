"""Special tokens that people typed: `</s>` in an answer about HTML becomes the token that ends answers.

A tokenizer cannot tell them from those that a chat template writes. They are found in the row's own texts, before a
template renders them.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orpo_dist.data.pairs import Pair, PairFormat
from orpo_dist.errors import UserError

# Characters for private use, which no tokenizer knows: one stands for each special token.
_TYPED, _WRITTEN = 0xF0000, 0x100000


class TokenNotes:
    """Notes on pairs whose texts spell special tokens, or hold characters that the tokenizer does not know.

    Args:
        typed: whether spelled special tokens become special.
        ignored: tokens whose place in a text is another module's business: those of images.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, typed: bool = True, ignored: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self._pattern = _any_of([token for token in special_tokens(tokenizer) if token not in ignored and typed])
        self._becomes_special: dict[str, bool] = {}
        # GPT-2's unknown token is its EOS, and never stands for an unknown character.
        others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._unknown = None if tokenizer.unk_token_id in others else tokenizer.unk_token_id

    def of(self, pair: Pair, ids: tuple[list[int], list[int], list[int]], pair_format: PairFormat) -> list[str]:
        """One note for each such token and column. BOS at the beginning of a text prompt and EOS at the end of a text
        completion are where they belong.

        Args:
            ids: of prompt, chosen and rejected.
        """
        columns = (pair_format.prompt or pair_format.chosen, pair_format.chosen, pair_format.rejected)
        notes = []
        for column, part in zip(columns, (pair.prompt, pair.chosen, pair.rejected), strict=True):
            for token in self._typed_in(part):
                special = f"`{token}` is written in `{column}` and becomes a special token"
                notes.append(f"{special} (split_special_tokens=true keeps it as text)")
        if self._unknown is not None:
            notes += [
                f"`{column}` has characters that the tokenizer does not know: `{self.tokenizer.unk_token}`"
                for column, part in zip(columns, ids, strict=True)
                if self._unknown in part
            ]
        return list(dict.fromkeys(notes))

    def _typed_in(self, part: Any) -> Iterator[str]:
        if self._pattern is None:
            return
        for text in _texts(self._without_ends(part) if isinstance(part, str) else part):
            for token in self._pattern.findall(text):
                if self._is_special(token):
                    yield token

    def _without_ends(self, text: str) -> str:
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        text = text.removeprefix(str(bos)) if bos else text
        return text.rstrip().removesuffix(str(eos)) if eos else text

    def _is_special(self, token: str) -> bool:
        if token not in self._becomes_special:
            ids = self.tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
            self._becomes_special[token] = self.tokenizer.convert_tokens_to_ids(token) in ids
        return self._becomes_special[token]


class TextTokenizer:
    """Tokenises so that special tokens which a row spells stay text, and those which a template writes stay special.

    The tokenizers' own `split_special_tokens` makes no difference between the two. So a row's own are replaced by
    characters for private use before the template renders it (`hide`); a copy of the tokenizer then has further
    characters for what the template wrote, and reads everything else as text (`ids`).

    Raises:
        UserError: a tokenizer that is not of the tokenizers library.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(
                f"split_special_tokens=true: {type(tokenizer).__name__} cannot keep special tokens as text. Leave the "
                "option out, or take a tokenizer with a tokenizer.json."
            )
        tokens = special_tokens(tokenizer)
        self._pattern = _any_of(tokens)
        self._typed = {token: chr(_TYPED + place) for place, token in enumerate(tokens)}
        self._back = {ord(character): token for token, character in self._typed.items()}
        self._written = {token: chr(_WRITTEN + place) for place, token in enumerate(tokens)}
        self._copy = copy.deepcopy(tokenizer)
        flags = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        self._copy.add_tokens([self._stand_in(flags.get(token), self._written[token]) for token in tokens])
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
        self._ids = {self._copy.convert_tokens_to_ids(self._written[token]): ids[token] for token in tokens}

    def hide(self, pair: Pair) -> Pair:
        """The pair with a character in place of each special token that its texts spell."""
        return replace(
            pair,
            prompt=self._hidden(pair.prompt),
            chosen=self._hidden(pair.chosen),
            rejected=self._hidden(pair.rejected),
            tools=self._hidden(pair.tools),
        )

    def ids(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of rendered texts of hidden pairs."""
        made = self._copy(
            [self._replaced(text, self._written).translate(self._back) for text in texts],
            add_special_tokens=add_special_tokens,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return [[self._ids.get(token, token) for token in of_text] for of_text in made]

    def _hidden(self, value: Any) -> Any:
        return _mapped(value, lambda text: self._replaced(text, self._typed))

    def _replaced(self, text: str, by: dict[str, str]) -> str:
        return self._pattern.sub(lambda match: by[match[0]], text) if self._pattern else text

    @staticmethod
    def _stand_in(token: Any, character: str) -> AddedToken:
        """With the token's own appetite for white space (Phi-3's take what follows them); not special, so that it is
        read although special tokens are not."""
        lstrip, rstrip = (token.lstrip, token.rstrip) if token is not None else (False, False)
        return AddedToken(character, lstrip=lstrip, rstrip=rstrip, normalized=False, special=False)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All special tokens as text, the longest first."""
    tokens = set(tokenizer.all_special_tokens)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokens.update(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted((token for token in tokens if token), key=lambda token: (-len(token), token))


def _any_of(tokens: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value
