import copy

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from orpo_dist.data.prepare import prepare_pairs
from orpo_dist.data.tokenizer_identity import tokenizer_digest
from orpo_dist.options.data import PrepareOptions


def test_tokenizer_digest(chat_tokenizer, plain_tokenizer, tmp_path):
    digest = tokenizer_digest(chat_tokenizer)
    assert digest != tokenizer_digest(plain_tokenizer)
    chat_tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    reloaded(["a", "b c"], padding=True, truncation=True, max_length=7)
    assert tokenizer_digest(reloaded) == digest
    reloaded.add_tokens(AddedToken("<new>"))
    assert tokenizer_digest(reloaded) != digest


@pytest.mark.parametrize("saved", [False, True])
def test_split_special_tokens_set_after_loading(plain_tokenizer, saved, tmp_path):
    """Saved or not: what changes ids changes the name."""
    tokenizer = copy.deepcopy(plain_tokenizer)
    digest = tokenizer_digest(tokenizer)
    tokenizer.split_special_tokens = True
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        tokenizer.split_special_tokens = True
    assert tokenizer_digest(tokenizer) != digest


def test_the_cache_gives_no_tokens_of_another_setting(plain_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path))
    tokenizer = copy.deepcopy(plain_tokenizer)
    rows = [{"prompt": "strike old:", "chosen": " <s>old</s>.", "rejected": " old"}]
    typed = prepare_pairs(rows, tokenizer, PrepareOptions()).dataset["chosen_ids"][0]
    tokenizer.split_special_tokens = True
    as_text = prepare_pairs(rows, tokenizer, PrepareOptions()).dataset["chosen_ids"][0]
    assert tokenizer.bos_token_id in typed and tokenizer.bos_token_id not in as_text


def test_several_templates_in_one_tokenizer(chat_tokenizer):
    """They are saved in a folder of their own."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = {"default": chat_tokenizer.chat_template, "tool_use": "{{ tools }}"}
    digest = tokenizer_digest(tokenizer)
    tokenizer.chat_template = {"default": chat_tokenizer.chat_template, "tool_use": "{{ tools[0] }}"}
    assert tokenizer_digest(tokenizer) != digest
