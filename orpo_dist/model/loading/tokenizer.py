"""The tokenizer of a model: which backend reads it, and whether that one splits texts as its files say."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file, is_protobuf_available, is_sentencepiece_available

from orpo_dist.distributed.log import get_logger
from orpo_dist.errors import UserError

logger = get_logger(__name__)

# White space at the beginning, inside and in lines, whole words and words that have to be merged.
PROBES = ("   lead", "a  b", "Hello world", "def f():\n    return 1", "unbelievably")


def load_tokenizer(name: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """AutoTokenizer's choice, except where it takes mistral-common for a folder that has a tokenizer.json too: that one
    lacks chat templates and keywords of the tokenizers' call, and is chosen by what happens to be installed.

    A folder with a tokenizer.model and no tokenizer.json is converted by transformers, which orders the merges of a BPE
    by id, while sentencepiece goes by score: a difference is a warning that shows it.

    Raises:
        UserError: a tokenizer.model alone, and not the packages that read it.
    """
    source = {key: options[key] for key in ("revision", "token")}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (ImportError, ValueError):
        if _file(name, "tokenizer.model", source) and not _file(name, "tokenizer.json", source):
            readers = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
            if missing := [package for package, there in readers.items() if not there]:
                raise UserError(
                    f"{name} has a tokenizer.model and no tokenizer.json, and {' and '.join(missing)} to read it "
                    f"{'is' if len(missing) == 1 else 'are'} not installed: pip install {' '.join(missing)}."
                ) from None
        raise
    if _file(name, "tokenizer.json", source):
        known = isinstance(tokenizer, PreTrainedTokenizer | PreTrainedTokenizerFast)
        return tokenizer if known else PreTrainedTokenizerFast.from_pretrained(name, **options)
    model = _file(name, "tokenizer.model", source)
    if model and isinstance(tokenizer, PreTrainedTokenizerFast) and (difference := _difference(tokenizer, model)):
        logger.warning("%s has a tokenizer.model and no tokenizer.json. %s", name, difference)
    return tokenizer


def _file(name: str, file: str, source: dict[str, Any]) -> str | None:
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **source)


def _difference(tokenizer: PreTrainedTokenizerFast, model: str) -> str | None:
    """The first probe that the converted tokenizer splits otherwise than sentencepiece."""
    if not is_sentencepiece_available():
        return None
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=model)
    for text in PROBES:
        original = pieces.encode(text, out_type=str)
        converted = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
        if original != converted:
            return (
                f"As converted by transformers it splits {text!r} into {converted}, sentencepiece itself into "
                f"{original}. Use a tokenizer.json that was made from it, if the model's publisher has one."
            )
    return None
