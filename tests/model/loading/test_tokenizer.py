"""A folder with a tokenizer.model alone."""

import random

import pytest
from sentencepiece import SentencePieceTrainer
from transformers import LlamaConfig

from orpo_dist.errors import UserError
from orpo_dist.model.loading import tokenizer as loading
from orpo_dist.model.loading.processor import load_processing_class

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "def", "return", "lead", "hello", "world"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BPE whose runs of spaces have the lowest scores and the first ids, as those of Llama 2 and Mistral."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    drawn = random.Random(0)
    lines = ["   " + " ".join(drawn.choice(WORDS) for _ in range(8)) for _ in range(300)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=120,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    LlamaConfig().save_pretrained(folder)
    return folder


def test_a_conversion_that_splits_texts_otherwise_is_named(folder, caplog):
    with caplog.at_level("WARNING"):
        load_processing_class(str(folder))
    (record,) = [record for record in caplog.records if "no tokenizer.json" in record.getMessage()]
    assert "it splits '   lead' into" in record.getMessage() and "sentencepiece itself into" in record.getMessage()


def test_a_tokenizer_json_is_what_is_used(folder, tmp_path, caplog):
    tokenizer = load_processing_class(str(folder))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    caplog.clear()
    again = load_processing_class(str(tmp_path))
    assert again("one two")["input_ids"] == tokenizer("one two")["input_ids"]
    assert "no tokenizer.json" not in caplog.text


def test_the_packages_that_read_it_are_named(folder, monkeypatch):
    monkeypatch.setattr(loading, "is_protobuf_available", lambda: False)

    def unreadable(name, **options):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", unreadable)
    with pytest.raises(UserError, match=r"no tokenizer.json, and protobuf to read it is not installed: pip install"):
        load_processing_class(str(folder))
