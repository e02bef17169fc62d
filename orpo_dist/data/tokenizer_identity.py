"""A name for what a tokenizer or processor does: part of the cache's key (data/prepare.py)."""

import json
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from orpo_dist.data.cache import digest
from orpo_dist.data.chat_template import ProcessingClass

# What a saved tokenizer says of where it was loaded from, and of what its last call padded or truncated to.
TRANSIENT_SETTINGS = ("name_or_path", "is_local", "local_files_only", "padding", "truncation")
# White space, digits, letter case, accents and scripts: what normalizers and pre-tokenizers treat in their own way.
_WORDS = "  The DATA set's 2,048 rows:\n\n\tnaïve ﬁne cafe\u0301 ½ 日本語 🤖\u200b don't</w> "


def tokenizer_digest(processing_class: ProcessingClass) -> str:
    """Equal vocabulary, merges, special tokens, image settings and ids of a probe text, equal name."""
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
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    return digest([*parts, json.dumps(_probe_ids(tokenizer)).encode()])


def _probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of a text that holds every special token, with and without what the tokenizer writes around texts.

    What is set after loading and not saved is seen here alone: `split_special_tokens`, a backend that was replaced,
    a subclass in Python.
    """
    text = _WORDS + "".join(f"{token} a{token}b" for token in sorted(tokenizer.all_special_tokens)) + _WORDS
    return [
        list(tokenizer(part, add_special_tokens=added, verbose=False)["input_ids"])
        for part in (_WORDS, text)
        for added in (False, True)
    ]
