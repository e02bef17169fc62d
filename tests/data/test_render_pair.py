"""Pairs through templates that drop, move or refuse parts of them."""

import copy

import pytest

from orpo_dist.data.pairs import Pair
from orpo_dist.data.render_pair import HISTORY_NOTE, PairRenderer
from orpo_dist.errors import BadRow
from orpo_dist.options.data import PrepareOptions
from tests.data.conversations import CALL, FORMAT, HELLO, KENOBI, OTHER, RESULT, TOOLS, assistant, user

# DeepSeek-R1's: what stands before </think> is cut off; calls are written nowhere.
CUTS_THOUGHTS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THOUGHT = assistant("<think>He is bold.</think>General Kenobi")


def render(tokenizer, pair, template=None, **options):
    return PairRenderer(tokenizer, FORMAT, PrepareOptions(chat_template=template, **options)).render(pair)


@pytest.mark.parametrize(
    "pair, column, what",
    [
        (Pair([HELLO], [THOUGHT], OTHER), "chosen", "the reasoning of an assistant message ('He is bold.')"),
        (Pair([HELLO], OTHER, [THOUGHT]), "rejected", "the reasoning of an assistant message"),
        (Pair([user("Weather?")], [CALL], OTHER), "chosen", "the tool call of an assistant message"),
        (Pair([HELLO], [KENOBI], OTHER, TOOLS), "prompt", "part of a tool of the row"),
    ],
)
def test_what_the_template_drops_is_a_bad_row(chat_tokenizer, pair, column, what):
    with pytest.raises(BadRow) as caught:
        render(chat_tokenizer, pair, CUTS_THOUGHTS)
    assert (caught.value.kind, caught.value.column) == ("dropped by the template", column)
    assert what in caught.value.reason
    kept = render(chat_tokenizer, pair, CUTS_THOUGHTS, allow_template_drops=True)
    assert len(kept.notes) == 1 and kept.notes[0].startswith("the chat template drops")


def test_a_tool_result_that_is_dropped(chat_tokenizer):
    """The answer quotes the result."""
    template = "{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    pair = Pair([user("How warm?"), CALL, RESULT], [assistant("It is 22 degrees.")], OTHER)
    with pytest.raises(BadRow, match="the content of a tool message"):
        render(chat_tokenizer, pair, template)


def test_reasoning_of_earlier_answers_is_a_note(chat_tokenizer):
    pair = Pair([HELLO, THOUGHT, user("How now")], [assistant("Brown cow")], OTHER)
    assert render(chat_tokenizer, pair, CUTS_THOUGHTS).notes == [HISTORY_NOTE]
    assert render(chat_tokenizer, pair).notes == []


def test_named_templates(chat_tokenizer):
    """transformers: rows with tools take `tool_use`, others `default`."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = {"tool_use": chat_tokenizer.chat_template, "default": plain, "rag": "{{ 'rag' }}" + plain}
    assert render(tokenizer, Pair([HELLO], [KENOBI], OTHER)).prompt == "user: Hello there\n"
    assert "Tools: [{" in render(tokenizer, Pair([HELLO], [KENOBI], OTHER, TOOLS)).prompt
    assert render(tokenizer, Pair([HELLO], [KENOBI], OTHER), "rag").prompt.startswith("raguser")


def test_variables_of_the_row(chat_tokenizer):
    template = chat_tokenizer.chat_template + "{% if add_generation_prompt and brief %}Briefly: {% endif %}"
    pair = Pair([HELLO], [assistant("Briefly: yes")], [assistant("Briefly: no")], template_kwargs={"brief": True})
    assert render(chat_tokenizer, pair, template).prompt.endswith("assistant\nBriefly: ")


def test_arguments_as_text_where_a_template_wants_text(chat_tokenizer):
    """DeepSeek-V3's adds them to text."""
    template = (
        "{% for m in messages %}{{ m.content }}|"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    assert render(chat_tokenizer, Pair([HELLO], [CALL], OTHER), template).chosen == (
        '|get_weather {"city": "Pa\\"ris", "days": 3}'
    )


def test_turns_that_the_model_did_not_write(chat_tokenizer):
    rendered = render(chat_tokenizer, Pair([HELLO], [KENOBI, user("How now"), assistant("Brown cow")], OTHER))
    ((start, stop),) = rendered.chosen_context
    assert rendered.chosen[start:stop] == "<|im_start|>user\nHow now<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.rejected_context == []


def test_turns_that_cannot_be_told_apart_are_a_bad_row(chat_tokenizer):
    """Whoever speaks last is written first."""
    template = "{% for m in messages | reverse %}{{ m.content }} {% endfor %}"
    pair = Pair([HELLO], [KENOBI, user("How now"), assistant("Brown cow")], OTHER)
    with pytest.raises(BadRow) as caught:
        render(chat_tokenizer, pair, template, allow_template_drops=True)
    assert caught.value.kind == "template without a boundary"
