"""The tokenizer of a folder with tekken.json alone: mistral-common's, with fewer keywords and no chat template."""

import pytest
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orpo_dist.data.prepare import prepare_pairs
from orpo_dist.errors import UserError
from orpo_dist.model.loading.processor import load_processing_class
from orpo_dist.options.data import PrepareOptions

TEXT = {"prompt": "2+2=", "chosen": " four </s>.", "rejected": " five"}
CHAT = {
    "prompt": [{"role": "user", "content": "Hi"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
}


class MistralCommonBackend(PreTrainedTokenizerBase):
    """The surface of transformers' class of this name: text is never special, BOS is written in front."""

    def __init__(self, inner: PreTrainedTokenizerFast):
        self.inner = inner
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")

    def __call__(self, text, add_special_tokens=True, return_attention_mask=None, verbose=True, **other):
        if other:
            raise ValueError(f"Kwargs {list(other)} are not supported by `MistralCommonBackend.__call__`.")
        texts = [text] if isinstance(text, str) else text
        ids = self.inner(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [[1, *of_text] if add_special_tokens else of_text for of_text in ids]
        return BatchEncoding({"input_ids": ids[0] if isinstance(text, str) else ids})

    def convert_tokens_to_ids(self, tokens):
        return self.inner.convert_tokens_to_ids(tokens)

    def decode(self, ids, **other):
        return self.inner.decode(ids)

    def save_pretrained(self, folder, **other):
        self.inner.save_pretrained(folder)

    def __len__(self):
        return len(self.inner)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def backend(plain_tokenizer):
    return MistralCommonBackend(plain_tokenizer)


def test_text_rows_are_tokenised_and_typed_tokens_are_text(backend, plain_tokenizer):
    prepared = prepare_pairs([TEXT], backend, PrepareOptions())
    ids, eos = prepared.dataset["chosen_ids"][0], plain_tokenizer.eos_token_id
    assert plain_tokenizer.decode(ids) == " four </s>.</s>" and ids.count(eos) == 1
    assert prepared.notes == []


@pytest.mark.parametrize("options", [{}, {"chat_template": "chatml"}])
def test_messages_say_the_cause(backend, options):
    with pytest.raises(
        UserError, match=r"MistralCommonBackend takes no chat template: the model has a tekken.json and"
    ):
        prepare_pairs([CHAT], backend, PrepareOptions(**options))


@pytest.mark.parametrize("has_json", [True, False])
def test_tokenizer_json_is_preferred(backend, plain_tokenizer, tmp_path, monkeypatch, has_json):
    if has_json:
        plain_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model").mkdir(exist_ok=True)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: backend)
    loaded = load_processing_class(str(tmp_path / "model"))
    assert isinstance(loaded, PreTrainedTokenizerFast) == has_json and (loaded is backend) != has_json
