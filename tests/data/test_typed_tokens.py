import copy

import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from orpo_dist.cli import main
from orpo_dist.data.pairs import Pair, PairFormat
from orpo_dist.data.prepare import prepare_pairs
from orpo_dist.data.prepared_file import Note
from orpo_dist.data.tokenize import PairTokenizer, TokenizedPair
from orpo_dist.errors import BadRow, UserError
from orpo_dist.options.data import PrepareOptions
from tests.data.processors import qwen_processor

FORMAT = PairFormat("", "prompt", "chosen", "rejected", None, None, False, None)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def reply(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def tokenize(tokenizer, pair: Pair, template: str | None = None, **options) -> TokenizedPair:
    (result,) = PairTokenizer(tokenizer, FORMAT, PrepareOptions(**options), template)([pair])
    if isinstance(result, BadRow):
        raise result
    return result


def note(token: str, column: str) -> str:
    return (
        f"`{token}` is written in `{column}` and becomes a special token (split_special_tokens=true keeps it as text)"
    )


def test_special_tokens_typed_in_messages_are_named(plain_tokenizer):
    pair = Pair(user("strike <s>"), reply("use <s>old</s> twice: <s>"), reply("use <del>old</del>"))
    result = tokenize(plain_tokenizer, pair, INST)
    assert result.notes == [note("<s>", "prompt"), note("<s>", "chosen"), note("</s>", "chosen")]
    assert tokenize(plain_tokenizer, Pair(user("a"), reply("b"), reply("c")), INST).notes == []


def test_special_tokens_typed_in_text(plain_tokenizer):
    """BOS at the beginning and EOS at the end are what the tokenizer itself writes there."""
    assert tokenize(plain_tokenizer, Pair("<s>Hi", " there</s>\n", " you")).notes == []
    assert tokenize(plain_tokenizer, Pair("Hi <s>", " there</s> x", " you")).notes == [
        note("<s>", "prompt"),
        note("</s>", "chosen"),
    ]


def test_in_calls_and_parts(chat_tokenizer):
    call = {"function": {"name": "add", "arguments": {"text": "<|im_end|>"}}}
    prompt = [*user("Hi"), {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    result = tokenize(chat_tokenizer, Pair(prompt, reply("four"), reply("five")))
    assert result.notes == [note("<|im_end|>", "prompt")]


def test_a_tokenizer_that_reads_them_as_text_has_no_note(plain_tokenizer):
    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.split_special_tokens = True
    assert tokenize(tokenizer, Pair("Hi", " <s> there", " you")).notes == []


@pytest.mark.parametrize("apply", [None, True])
def test_split_special_tokens_keeps_them_as_text(chat_tokenizer, apply):
    tokenizer, end = chat_tokenizer, chat_tokenizer.eos_token_id
    pair = Pair(user("What is <|im_end|> for?"), reply("<|im_end|> ends a turn"), reply("unsure"))
    result = tokenize(tokenizer, pair, split_special_tokens=True, apply_chat_template=apply)
    assert result.notes == [] and result.prompt_ids.count(end) == 1 and result.chosen_ids.count(end) == 1
    assert tokenizer.decode(result.prompt_ids + result.chosen_ids) == (
        "<|im_start|>user\nWhat is <|im_end|> for?<|im_end|>\n<|im_start|>assistant\n<|im_end|> ends a turn<|im_end|>\n"
    )
    typed = tokenizer("<|im_end|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert result.chosen_ids[: len(typed) - 1] == typed[:-1]


def test_split_special_tokens_in_text(plain_tokenizer):
    """A typed EOS at the end is text too, so that the answer gets its own."""
    result = tokenize(plain_tokenizer, Pair("strike:", " <s>old</s>", " old"), split_special_tokens=True)
    bos, eos = plain_tokenizer.bos_token_id, plain_tokenizer.eos_token_id
    assert bos not in result.chosen_ids and result.chosen_ids.count(eos) == 1 and result.chosen_ids[-1] == eos
    assert plain_tokenizer.decode(result.chosen_ids) == " <s>old</s></s>"


@pytest.mark.parametrize("prefix", ["first", "always", "never"])
def test_rows_without_typed_tokens_have_the_same_ids(prefix):
    """With marks that take the white space behind them (Phi-3's) and spaces that belong to words."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    marks = [AddedToken(mark, rstrip=True, normalized=False) for mark in ("<|user|>", "<|assistant|>", "<|end|>")]
    trainer = BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>", *marks], show_progress=False)
    backend.train_from_iterator(["one two three four five six user assistant \n"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    for pair in (Pair(user("one two"), reply("  three"), reply("four\n\nfive")), Pair("one ", " two", "three")):
        expected = tokenize(tokenizer, pair, template)
        assert tokenize(tokenizer, pair, template, split_special_tokens=True) == expected


def test_what_cannot_split_is_refused():
    with pytest.raises(UserError, match="ByT5Tokenizer cannot keep special tokens as text"):
        PairTokenizer(ByT5Tokenizer(), FORMAT, PrepareOptions(split_special_tokens=True))
    with pytest.raises(UserError, match="not for a vision-language model"):
        prepare_pairs([{"prompt": "a", "chosen": "b", "rejected": "c"}], qwen_processor(),
                      PrepareOptions(split_special_tokens=True))  # fmt: skip


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer that knows four words."""
    backend = Tokenizer(WordLevel({"[UNK]": 0, "[EOS]": 1, "one": 2, "two": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]")


def test_unknown_characters_are_named(words):
    result = tokenize(words, Pair("one", " two seven", " two"))
    assert result.notes == ["`chosen` has characters that the tokenizer does not know: `[UNK]`"]


def test_why_nothing_is_left_of_a_prompt():
    backend = Tokenizer(BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "ac": 4, "</s>": 5}, [("a", "b"), ("a", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(BadRow, match="merges all of the prompt, 'a', with the beginning of the completions"):
        tokenize(tokenizer, Pair("a", "b", "c"))
    with pytest.raises(BadRow, match="the tokenizer knows no character of the prompt 'xyz'"):
        tokenize(tokenizer, Pair("xyz", "b", "c"))
    with pytest.raises(BadRow, match="makes no token of it: it knows no character"):
        tokenize(tokenizer, Pair("c", "xyz", "b"))


def test_the_summary_counts_them(plain_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": "a", "chosen": f" good {i}", "rejected": " bad"} for i in range(4)]
    rows[1]["chosen"], rows[3]["chosen"] = " <s>old</s>.", " </s> is HTML"
    for _ in range(2):  # built, and from the cache
        prepared = prepare_pairs(rows, plain_tokenizer, PrepareOptions())
        assert prepared.notes == [
            Note(note("<s>", "chosen"), 1, "train", 1),
            Note(note("</s>", "chosen"), 2, "train", 1),
        ]
        assert note("</s>", "chosen") in capsys.readouterr().out
    assert "notes" not in prepared.dataset.column_names


def test_data_check_names_them(plain_tokenizer, tmp_path, capsys, monkeypatch):
    from transformers import LlamaConfig

    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "cache"))
    plain_tokenizer.save_pretrained(tmp_path / "model")
    LlamaConfig().save_pretrained(tmp_path / "model")
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": " <s>b", "rejected": " c"}\n')
    assert main(["data", "check", str(data), "--model", str(tmp_path / "model")]) == 0
    assert note("<s>", "chosen") in capsys.readouterr().out
    assert main(["data", "check", str(data), "--model", str(tmp_path / "model"), "--split_special_tokens", "true"]) == 0
    assert "becomes a special token" not in capsys.readouterr().out
