"""The words for splits."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets.data_files import SPLIT_KEYWORDS

WORDS: dict[str, list[str]] = {str(name): list(words) for name, words in SPLIT_KEYWORDS.items()}


def names_a_split(word: str) -> bool:
    """Whether `datasets` knows the word as one for a split."""
    return any(word in words for words in WORDS.values())


def split_called(split: str, splits: Mapping[str, Iterable[Path]]) -> str | None:
    """The name that `split` has among `splits`: itself, or the one that is another word for it; None: there is none.

    `datasets` counts files named `eval` to the split `test`; who asks for `eval` means them, else `validation`.
    """
    if split in splits:
        return split
    group = next((others for others in WORDS.values() if split in others), None)
    if group is None:
        return None
    if split in ("eval", "evaluation"):
        evaluated = any(re.search(r"(^|[^a-z])eval", path.name) for path in splits.get("test", ()))
        groups = [["eval", "evaluation"], *([["test"]] if evaluated else []), WORDS["validation"], WORDS["test"]]
    else:
        groups = [[name for name in group if name not in ("eval", "evaluation")]]
    named = next((found for group in groups if (found := [name for name in splits if name in group])), [])
    return named[0] if len(named) == 1 else None
