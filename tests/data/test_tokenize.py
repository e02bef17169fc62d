import copy
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast

from orpo_dist.data.chat_template import resolve_chat_template
from orpo_dist.data.pairs import Pair, PairFormat
from orpo_dist.data.tokenize import NO_EOS_NOTE, PairTokenizer, TokenizedPair
from orpo_dist.errors import BadRow, UserError
from orpo_dist.options.data import PrepareOptions
from tests.tiny_tokenizers import beginning_with, train_bpe

FORMAT = PairFormat("", "prompt", "chosen", "rejected", None, None, False, None)
USER = {"role": "user", "content": "Two and two?"}


def reply(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def tokenize(tokenizer, pair: Pair, **options) -> TokenizedPair:
    (result,) = PairTokenizer(tokenizer, FORMAT, PrepareOptions(**options))([pair])
    if isinstance(result, BadRow):
        raise result
    return result


TEXTS = [
    Pair("What is the capital of France?", " Paris, of course.", " I am sorry."),
    Pair("the qui", "ck brown fox", "lt on the bed"),  # tokens that merge across the boundary
    Pair("the quick b", "rown", "rook"),
    Pair("a\n", "\nb", " c"),
    Pair("", "one", "two"),
    Pair("<s>already", " there", " too"),
]


@pytest.mark.parametrize("pair", TEXTS)
def test_the_model_sees_the_tokens_of_the_whole_text(plain_tokenizer, pair):
    result = tokenize(plain_tokenizer, pair)
    bos, eos = [plain_tokenizer.bos_token_id], [plain_tokenizer.eos_token_id]
    for completion, ids in ((pair.chosen, result.chosen_ids), (pair.rejected, result.rejected_ids)):
        whole = plain_tokenizer(pair.prompt + completion, add_special_tokens=False)["input_ids"]
        assert result.prompt_ids + ids == (whole if whole[:1] == bos else bos + whole) + eos


@pytest.mark.parametrize("pair", [TEXTS[0], *TEXTS[2:]])
def test_boundary_against_trl(plain_tokenizer, pair):
    """TRL cuts each branch where its own merge needs it; prefix sharing needs the earlier of the two for both.

    TEXTS[1] is left out: there the merge swallows two tokens, TRL takes back one.
    """
    from trl.experimental.orpo import ORPOTrainer

    result = tokenize(plain_tokenizer, pair)
    trainer = SimpleNamespace(processing_class=plain_tokenizer)
    lengths = [
        len(ORPOTrainer.build_tokenized_answer(trainer, pair.prompt, text)["prompt_input_ids"])
        for text in (pair.chosen, pair.rejected)
    ]
    bos_added = not pair.prompt.startswith("<s>")
    assert len(result.prompt_ids) == min(lengths) + bos_added


def test_a_merge_moves_the_last_prompt_token_into_the_completions(plain_tokenizer):
    result = tokenize(plain_tokenizer, TEXTS[1])
    assert plain_tokenizer.decode(result.prompt_ids) == "<s>the"
    assert plain_tokenizer.decode(result.chosen_ids) == " quick brown fox</s>"
    assert plain_tokenizer.decode(result.rejected_ids) == " quilt on the bed</s>"


def test_nothing_is_doubled(chat_tokenizer):
    result = tokenize(chat_tokenizer, Pair([USER], reply("Four."), reply("Five.")))
    assert chat_tokenizer.decode(result.prompt_ids) == (
        "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_tokenizer.decode(result.chosen_ids) == "Four.<|im_end|>\n"
    assert chat_tokenizer.decode(result.rejected_ids) == "Five.<|im_end|>\n"
    assert result.chosen_ids.count(chat_tokenizer.eos_token_id) == 1


def test_bos_written_by_the_template_is_not_doubled(chat_tokenizer):
    template = "{{ bos_token }}" + chat_tokenizer.chat_template
    result = tokenize(chat_tokenizer, Pair([USER], reply("Four."), reply("Five.")), chat_template=template)
    assert result.prompt_ids.count(chat_tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("text, ends", [("four", 1), ("four</s>", 1), ("four</s>\n \n", 1), ("four</s> x", 2)])
def test_eos_once(plain_tokenizer, text, ends):
    result = tokenize(plain_tokenizer, Pair("2+2=", text, "five"))
    assert result.chosen_ids.count(plain_tokenizer.eos_token_id) == ends


def test_add_eos_token_false(plain_tokenizer):
    result = tokenize(plain_tokenizer, Pair("2+2=", "four", "five"), add_eos_token=False)
    assert plain_tokenizer.decode(result.chosen_ids) == "four"


def test_system_and_tools_are_rendered(chat_tokenizer):
    tools = [{"type": "function", "function": {"name": "add"}}]
    pair = Pair([{"role": "system", "content": "Be brief."}, USER], reply("Four."), reply("Five."), tools)
    text = chat_tokenizer.decode(tokenize(chat_tokenizer, pair).prompt_ids)
    assert text.startswith('<|im_start|>system\nTools: [{"type": "function", "function": {"name": "add"}}]<|im_end|>')
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo and two?" in text


def test_a_header_longer_than_the_answers_is_cut_to_what_they_share(chat_tokenizer):
    """DeepSeek-R1 opens <think> in the generation prompt, which a finished answer does not have."""
    template = chat_tokenizer.chat_template.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    )
    result = tokenize(chat_tokenizer, Pair([USER], reply("Four."), reply("Five.")), chat_template=template)
    assert chat_tokenizer.decode(result.prompt_ids).endswith("<|im_start|>assistant\n")
    assert chat_tokenizer.decode(result.chosen_ids) == "Four.<|im_end|>\n"


def test_a_template_that_ends_conversations_with_eos(chat_tokenizer):
    """Phi's: a conversation without generation prompt gets EOS at its end."""
    template = chat_tokenizer.chat_template + "{% if not add_generation_prompt %}<|im_end|>{% endif %}"
    result = tokenize(chat_tokenizer, Pair([USER], reply("Four."), reply("Five.")), chat_template=template)
    assert chat_tokenizer.decode(result.chosen_ids) == "Four.<|im_end|>\n<|im_end|>"


def test_a_template_that_changes_the_prompt_is_cut_at_the_end_of_its_last_message(chat_tokenizer):
    template = "{{ messages | length }}" + chat_tokenizer.chat_template
    result = tokenize(chat_tokenizer, Pair([USER], reply("Four."), reply("Five.")), chat_template=template)
    assert chat_tokenizer.decode(result.prompt_ids).startswith("1<|im_start|>user\nTwo and two?")
    assert chat_tokenizer.decode(result.chosen_ids) == "Four.<|im_end|>\n"


def test_a_prompt_without_an_end_is_a_bad_row_and_the_template_is_blamed(chat_tokenizer):
    """Once an answer follows, this template forgets the question."""
    template = (
        "{% if messages[-1].role == 'assistant' %}{{ messages[-1].content }}"
        "{% else %}Q: {{ messages[0].content }}{% endif %}"
    )
    with pytest.raises(BadRow, match="renders the prompt differently once an answer follows") as caught:
        tokenize(chat_tokenizer, Pair([USER], reply("Four."), reply("Five.")), chat_template=template)
    assert caught.value.kind == "template without a boundary"


def test_a_template_that_refuses_a_row(chat_tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRow, match="roles must alternate"):
        tokenize(chat_tokenizer, Pair([USER], reply("a"), reply("b")), chat_template=template)


def test_messages_need_a_template(plain_tokenizer):
    with pytest.raises(UserError, match=r"no chat template\. Set chat_template=chatml"):
        tokenize(plain_tokenizer, Pair([USER], reply("a"), reply("b")))
    result = tokenize(plain_tokenizer, Pair([USER], reply("a"), reply("b")), chat_template="zephyr")
    assert plain_tokenizer.decode(result.chosen_ids) == "a</s>\n"


def test_text_that_is_rendered_already_is_not_rendered_again(chat_tokenizer):
    pair = Pair([{"role": "user", "content": "<|im_start|>user\nHi<|im_end|>"}], reply("a"), reply("b"))
    with pytest.raises(BadRow, match="has been applied to it before"):
        tokenize(chat_tokenizer, pair, apply_chat_template=True)


def test_a_prompt_of_no_tokens(plain_tokenizer):
    assert tokenize(plain_tokenizer, Pair("", "one", "two")).prompt_ids == [plain_tokenizer.bos_token_id]
    without_bos = PreTrainedTokenizerFast(tokenizer_object=train_bpe(["<pad>", "</s>"]), eos_token="</s>")
    with pytest.raises(BadRow, match="the prompt has no token"):
        tokenize(without_bos, Pair("", "one", "two"))


def test_text_begins_as_the_tokenizer_begins_it():
    """GPT-2's BOS separates documents: neither the tokenizer nor a template writes it before a text."""
    pair = Pair("What is the capital of France?", " Paris.", " Nice.")
    for vocabulary, begun in ((train_bpe(["<s>"]), []), (beginning_with(train_bpe(["<s>"]), "<s>"), [0])):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token="<s>", eos_token="<s>")
        prompt = tokenizer("What is the capital of France?", add_special_tokens=False)["input_ids"]
        assert tokenize(tokenizer, pair).prompt_ids == begun + prompt


def test_a_tokenizer_without_eos_is_a_note():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(["<s>"]), bos_token="<s>")
    assert tokenize(tokenizer, TEXTS[0]).notes == [NO_EOS_NOTE]
    assert tokenize(tokenizer, TEXTS[0], add_eos_token=False).notes == []


@pytest.mark.parametrize("template", [None, "zephyr", "{% for m in messages %}{{ m.content }} {% endfor %}"])
def test_a_rendering_is_the_tokens_of_apply_chat_template(chat_tokenizer, template):
    pair = Pair([USER], reply("Four."), reply("Five."))
    result = tokenize(chat_tokenizer, pair, chat_template=template)
    text = chat_tokenizer.apply_chat_template(
        [USER, *reply("Four.")], chat_template=resolve_chat_template(template, chat_tokenizer), tokenize=False
    )
    assert result.prompt_ids + result.chosen_ids == chat_tokenizer(text, add_special_tokens=False)["input_ids"]


# -- lengths --

LONG = Pair("one two three four five six seven eight nine ten", " eleven" * 20, " twelve" * 30)


def whole(tokenizer) -> TokenizedPair:
    return tokenize(tokenizer, LONG, max_length=None)


@pytest.mark.parametrize("max_prompt_length", [1, 4, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_max_prompt_length(plain_tokenizer, max_prompt_length, side):
    full = whole(plain_tokenizer).prompt_ids
    result = tokenize(plain_tokenizer, LONG, max_prompt_length=max_prompt_length, truncation_side=side)
    kept = max_prompt_length - 1
    expected = full[:max_prompt_length] if side == "right" else full[:1] + full[len(full) - kept :]
    assert result.prompt_ids == expected and result.truncated_prompt


def test_a_right_cut_keeps_the_header_of_the_reply(chat_tokenizer):
    """And the end of the user's turn, without which the header would stand inside of it."""
    pair = Pair([{"role": "user", "content": LONG.prompt}], reply("Four."), reply("Five."))
    full = tokenize(chat_tokenizer, pair).prompt_ids
    tail = chat_tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    limit = len(tail) + 5
    result = tokenize(chat_tokenizer, pair, max_prompt_length=limit, truncation_side="right")
    assert result.prompt_ids == full[:5] + tail


def test_max_completion_length(plain_tokenizer):
    full = whole(plain_tokenizer)
    result = tokenize(plain_tokenizer, LONG, max_completion_length=5)
    assert result.chosen_ids == full.chosen_ids[:5] and result.rejected_ids == full.rejected_ids[:5]
    assert result.truncated_completions == 2 and result.prompt_ids == full.prompt_ids


@pytest.mark.parametrize("extra", [1, 5, 25])
def test_max_length_is_never_exceeded(plain_tokenizer, extra):
    full = whole(plain_tokenizer)
    limit = len(full.prompt_ids) + extra
    result = tokenize(plain_tokenizer, LONG, max_length=limit)
    assert result.prompt_ids == full.prompt_ids
    assert result.chosen_ids == full.chosen_ids[:extra] and result.rejected_ids == full.rejected_ids[:extra]


def test_a_prompt_without_room_is_a_bad_row_and_max_prompt_length_keeps_it(plain_tokenizer):
    length = len(whole(plain_tokenizer).prompt_ids)
    with pytest.raises(BadRow, match=f"the prompt has {length} tokens.*within max_length={length}"):
        tokenize(plain_tokenizer, LONG, max_length=length)
    result = tokenize(plain_tokenizer, LONG, max_length=length, max_prompt_length=length - 1)
    assert len(result.prompt_ids) == length - 1 and len(result.chosen_ids) == 1


def test_identical_after_truncation(plain_tokenizer):
    pair = Pair("2+2=", "one two three four", "one two three five")
    with pytest.raises(BadRow) as caught:
        tokenize(plain_tokenizer, pair, max_completion_length=2)
    assert caught.value.kind == "identical after truncation"


def test_bad_rows_do_not_shift_their_neighbours(plain_tokenizer):
    pairs = [TEXTS[0], Pair("x " * 200, "a", "b"), TEXTS[2]]
    results = PairTokenizer(plain_tokenizer, FORMAT, PrepareOptions(max_length=64))(pairs)
    assert [type(result) for result in results] == [TokenizedPair, BadRow, TokenizedPair]
    assert results[0] == tokenize(plain_tokenizer, TEXTS[0]) and results[2] == tokenize(plain_tokenizer, TEXTS[2])


# -- encoder-decoder --


@pytest.fixture(scope="module")
def t5_tokenizer(plain_tokenizer):
    """No BOS, EOS after every text, as T5's."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.bos_token = None
    eos = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[eos])
    return tokenizer


def test_encoder_decoder_as_trl(t5_tokenizer):
    result = tokenize(t5_tokenizer, LONG, is_encoder_decoder=True, max_completion_length=8)
    assert result.prompt_ids == t5_tokenizer(LONG.prompt)["input_ids"]
    for text, ids in ((LONG.chosen, result.chosen_ids), (LONG.rejected, result.rejected_ids)):
        assert ids == t5_tokenizer(text, truncation=True, max_length=8)["input_ids"]


def test_encoder_decoder_lengths(t5_tokenizer):
    full = t5_tokenizer(LONG.prompt)["input_ids"]
    with pytest.raises(BadRow, match="max_length=4"):
        tokenize(t5_tokenizer, LONG, is_encoder_decoder=True, max_length=4)
    left = tokenize(t5_tokenizer, LONG, is_encoder_decoder=True, max_prompt_length=4)
    right = tokenize(t5_tokenizer, LONG, is_encoder_decoder=True, max_prompt_length=4, truncation_side="right")
    assert left.prompt_ids == full[-4:] and right.prompt_ids == [*full[:3], t5_tokenizer.eos_token_id]
