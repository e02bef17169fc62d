"""The objects of a JSON array, one after another: a file of them need not fit into memory."""

import json
from collections.abc import Iterator
from typing import IO, Any

from orpo_dist.data.unique_keys import DECODER

CHARACTERS = 1 << 20  # read at a time
LONGEST_WORD = 12  # -Infinity, or an escaped surrogate: what may be cut in two without being a string


class IrregularJson(Exception):
    """The text is not one array of objects up to its end."""


def array_of_objects(file: IO[str]) -> Iterator[dict[str, Any]]:
    """The objects of the array that is the text of `file`.

    Raises:
        IrregularJson: something else in it or after it; `json.loads` of the whole text says what, and where.
    """
    text = _Text(file)
    text.expect("[")
    if text.next() != "]":
        yield text.object()
    while text.next() == ",":
        text.expect(",")
        yield text.object()
    text.expect("]")
    text.expect("")


class _Text:
    def __init__(self, file: IO[str]):
        self.file = file
        self.text = ""
        self.place = 0
        self.decode = DECODER.raw_decode

    def next(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self.place < len(self.text):
                if self.text[self.place] not in " \t\n\r":
                    return self.text[self.place]
                self.place += 1
            if not self._more(CHARACTERS):
                return ""

    def expect(self, character: str) -> None:
        if self.next() != character:
            raise IrregularJson
        self.place += 1

    def object(self) -> dict[str, Any]:
        if self.next() != "{":
            raise IrregularJson
        while True:
            try:
                value, self.place = self.decode(self.text, self.place)
                return value  # type: ignore[no-any-return]
            except json.JSONDecodeError as error:
                # Wrong, or cut by the end of what was read. A string without an end is reported at its start.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LONGEST_WORD
            except (ValueError, RecursionError):  # a number of too many digits, too deep, or a key twice
                cut = False
            if not (cut and self._more(max(CHARACTERS, len(self.text) - self.place))):
                raise IrregularJson

    def _more(self, characters: int) -> bool:
        try:
            more = self.file.read(characters)
        except UnicodeDecodeError:
            raise IrregularJson from None
        self.text, self.place = self.text[self.place :] + more, 0
        return bool(more)
