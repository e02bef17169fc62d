import copy
import string

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import UnigramTrainer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from orpo_dist.data.pairs import Pair, PairFormat
from orpo_dist.data.tokenize import PairTokenizer, TokenizedPair
from orpo_dist.data.truncation import WrittenTokens, kept_places, written_after_text
from orpo_dist.errors import BadRow
from orpo_dist.options.data import PrepareOptions
from tests.tiny_tokenizers import CORPUS

FORMAT = PairFormat("", "prompt", "chosen", "rejected", None, None, False, None)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + ('<<SYS>>\\nBe kind.\\n<</SYS>>\\n'"
    " if loop.first else '') + m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DIALOGUE = (
    "{% for m in messages %}{{ m['role'].capitalize() + ': ' + m['content'] + ('\\n' if m['role'] == 'user' else "
    "eos_token) }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' "
    "+ m['content'] + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
RESULT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<result>' + (m['content'] | tojson) + '</result>\\n' }}"
    "{% else %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEMPLATES = {
    "mistral": (INST, " [/INST]"),
    "llama-2": (LLAMA_2, " [/INST]"),
    "phi-3": (PHI_3, "<|end|>\n<|assistant|>\n"),
    "dialogue": (DIALOGUE, "\nAssistant:"),
    "vicuna": (VICUNA, " ASSISTANT:"),
}
CONTENTS = [
    "one two three four five six seven eight",
    "def f(x):\n    return x * 2",
    "ends with a line\n\n",
    "Ist das so?",
]


@pytest.fixture(scope="module")
def unigram() -> PreTrainedTokenizerFast:
    """Sentencepiece's way: a word begins with its space, so text has other tokens alone than in place."""
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "en_XX"]
    trainer = UnigramTrainer(
        vocab_size=200,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.fixture(params=["byte-level", "unigram", "phi-3's tokens"])
def tokenizer(request, chat_tokenizer, unigram):
    if request.param == "unigram":
        return unigram
    if request.param == "byte-level":
        return chat_tokenizer
    own = copy.deepcopy(unigram)
    marks = ["<|user|>", "<|assistant|>", "<|end|>"]
    own.add_tokens([AddedToken(mark, rstrip=True, normalized=False, special=True) for mark in marks])
    return own


def tokenize(tokenizer, pair: Pair, template: str | None = None, **options) -> TokenizedPair:
    (result,) = PairTokenizer(tokenizer, FORMAT, PrepareOptions(**options), template)([pair])
    if isinstance(result, BadRow):
        raise result
    return result


def reply(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_right_cut_keeps_what_follows_the_text(tokenizer, name, content):
    """Counted in place: every token that holds a character of the tail stays, at every limit that can hold it."""
    template, tail = TEMPLATES[name]
    pair = Pair([{"role": "user", "content": content}], reply("Four."), reply("Five."))
    text = PairTokenizer(tokenizer, FORMAT, PrepareOptions(), template).render(pair).prompt
    assert text.endswith(tail)
    full = tokenize(tokenizer, pair, template).prompt_ids
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    in_tail = sum(end > len(text) - len(tail.lstrip()) for _, end in places)
    for limit in range(in_tail + 3, len(full)):
        cut = tokenize(tokenizer, pair, template, max_prompt_length=limit, truncation_side="right").prompt_ids
        assert len(cut) == limit and cut[-in_tail:] == full[-in_tail:] and cut[:1] == full[:1]


def test_a_right_cut_after_a_tools_result(chat_tokenizer):
    call = {"role": "assistant", "content": "asks"}
    pair = Pair(
        [{"role": "user", "content": "Hi"}, call, {"role": "tool", "content": "nine " * 9}], reply("a"), reply("b")
    )
    full = tokenize(chat_tokenizer, pair, RESULT).prompt_ids
    cut = tokenize(chat_tokenizer, pair, RESULT, max_prompt_length=len(full) - 5, truncation_side="right")
    assert chat_tokenizer.decode(cut.prompt_ids).endswith('"</result>\nassistant:')


def test_a_right_cut_where_the_header_ends_before_the_generation_prompt(chat_tokenizer):
    """DeepSeek-R1's <think>, which an answer does not have."""
    template = chat_tokenizer.chat_template.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    pair = Pair([{"role": "user", "content": CONTENTS[0]}], reply("Four."), reply("Five."))
    full = tokenize(chat_tokenizer, pair, template).prompt_ids
    cut = tokenize(chat_tokenizer, pair, template, max_prompt_length=len(full) - 3, truncation_side="right").prompt_ids
    assert chat_tokenizer.decode(cut).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert cut[:4] == full[:4] and len(cut) == len(full) - 3


def test_the_tail_of_a_template_that_looks_at_the_text_is_unknown():
    def refuses(messages):
        if messages[-1]["content"] != "Hi":
            raise BadRow("chat template", "prompt", "only Hi")
        return "Hi."

    assert written_after_text(refuses, [{"role": "user", "content": "Hi"}], "Hi.") is None
    assert written_after_text(lambda messages: "drops it", [{"role": "user", "content": "Hi"}], "drops it") is None


def test_the_tail_after_parts():
    def render(messages):
        return "".join(part.get("text", "<image>") for part in messages[-1]["content"]) + " end"

    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    for content, tail in (([image, text], " end"), ([text, image], "<image> end"), ([image], " end")):
        messages = [{"role": "user", "content": content}]
        assert written_after_text(render, messages, render(messages)) == tail


def test_kept_places():
    assert kept_places(6, 4, "left", 1, 0) == [0, 3, 4, 5]
    assert kept_places(6, 4, "right", 0, 2) == [0, 1, 4, 5]
    assert kept_places(6, 4, "left", 0, 0, frozenset({0, 2})) == [0, 2, 4, 5]
    assert kept_places(6, 2, "left", 1, 0, frozenset({2, 4})) is None


# -- encoder-decoders --

ROW = Pair(
    "What is the capital of France of course", " the order of the account", "a refund delivery that is longer than it"
)


def written(unigram, single: str):
    tokenizer = copy.deepcopy(unigram)
    backend = tokenizer.backend_tokenizer
    names = [name for name in ("<s>", "</s>", "en_XX") if name in single.split()]
    special = [(name, backend.token_to_id(name)) for name in names]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


SHAPES = {
    "t5": "$A </s>",
    "bart": "<s> $A </s>",
    "mbart-cc25": "$A </s> en_XX",
    "nllb": "en_XX $A </s>",
    "bert": "<s> $A en_XX",
}


@pytest.fixture(params=[*SHAPES, "byt5"])
def two_sided(request, unigram):
    if request.param == "byt5":
        return ByT5Tokenizer()
    tokenizer = written(unigram, SHAPES[request.param])
    if request.param == "bert":
        tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize("limit", [None, 4, 5, 7])
def test_completions_as_the_tokenizers_own_truncation(two_sided, limit):
    result = tokenize(two_sided, ROW, is_encoder_decoder=True, max_completion_length=limit)
    for text, ids in ((ROW.chosen, result.chosen_ids), (ROW.rejected, result.rejected_ids)):
        assert ids == two_sided(text, truncation=limit is not None, max_length=limit)["input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_as_the_tokenizers_own_truncation(two_sided, side):
    own = copy.deepcopy(two_sided)
    own.truncation_side = side
    for limit in (4, 5, 7):
        cut = tokenize(two_sided, ROW, is_encoder_decoder=True, max_prompt_length=limit, truncation_side=side)
        assert cut.prompt_ids == own(ROW.prompt, truncation=True, max_length=limit)["input_ids"]


def test_a_limit_without_room_for_text(unigram):
    nllb = written(unigram, SHAPES["nllb"])
    with pytest.raises(
        BadRow, match="max_prompt_length=2 leaves no room beside the 2 tokens that the tokenizer writes"
    ):
        tokenize(nllb, ROW, is_encoder_decoder=True, max_prompt_length=2)
    with pytest.raises(BadRow, match="differ only after their first 2 tokens"):
        tokenize(nllb, ROW, is_encoder_decoder=True, max_completion_length=2)


def test_a_tokenizer_that_writes_no_eos_gets_one(unigram):
    """T5Gemma's writes BOS alone."""
    tokenizer = written(unigram, "<s> $A")
    eos = tokenizer.eos_token_id
    result = tokenize(tokenizer, ROW, is_encoder_decoder=True, max_completion_length=5)
    assert result.rejected_ids == [*tokenizer(ROW.rejected)["input_ids"][:4], eos]
    assert tokenize(tokenizer, ROW, is_encoder_decoder=True).chosen_ids == [*tokenizer(ROW.chosen)["input_ids"], eos]


def test_an_answer_without_tokens_is_empty_although_something_is_written_around_it(unigram):
    with pytest.raises(BadRow) as caught:
        tokenize(written(unigram, SHAPES["bart"]), Pair("What?", "", "one"), is_encoder_decoder=True)
    assert caught.value.kind == "empty completion"


def test_written_tokens(unigram):
    found = WrittenTokens.by(written(unigram, SHAPES["mbart-cc25"]))
    assert found == WrittenTokens([], [2, 4]) and found.ends_with([9, 2, 4], 2) and not found.ends_with([9, 4], 2)
    assert found.is_empty([2, 4]) and not found.is_empty([9, 2, 4])
