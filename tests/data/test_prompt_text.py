"""Prompts that completions repeat in some rows, and prompts in Alpaca's columns."""

import pytest

from orpo_dist.data.detect import detect_format
from orpo_dist.data.prompt_text import read_history, without_repeat
from orpo_dist.errors import BadRow, UserError
from orpo_dist.options.data import PrepareOptions

DIALOGUE = "Human: What is 2 plus 2?\nAssistant:"
ALPACA = {
    "instruction": "In one word.",
    "input": "What is 2 plus 2?",
    "history": [["Hi", "Hello"]],
    "chosen": "4.",
    "rejected": "No.",
}


def read(rows, **options):
    pair_format = detect_format(list(rows[0]), rows, PrepareOptions(**options))
    return [pair_format.pair(row) for row in rows]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "usual", "expected"),
    [
        (DIALOGUE, DIALOGUE + " 4", DIALOGUE + " 5", False, (" 4", " 5")),
        (DIALOGUE, " 4", " 5", True, (" 4", " 5")),
        (DIALOGUE, DIALOGUE + " 4", " 5", True, (" 4", " 5")),
        (DIALOGUE + " ", DIALOGUE + "4", DIALOGUE + " 5", True, ("4", "5")),
        (DIALOGUE, " \n" + DIALOGUE + " 4", DIALOGUE + " 5", True, (" 4", " 5")),
        ("Hi", "Hi there", "Hi you", False, ("Hi there", "Hi you")),
        (DIALOGUE, DIALOGUE + " 4", " 5", False, (DIALOGUE + " 4", " 5")),
        ("", "a", "b", True, ("a", "b")),
    ],
)
def test_a_copy_of_the_prompt_is_taken_off(prompt, chosen, rejected, usual, expected):
    assert without_repeat(prompt, chosen, rejected, usual) == expected


@pytest.mark.parametrize("repeating", [29, 1])
def test_decided_row_by_row(repeating):
    row = {"prompt": DIALOGUE, "chosen": DIALOGUE + " 4", "rejected": DIALOGUE + " 5"}
    alone = {"prompt": DIALOGUE, "chosen": " 4", "rejected": " 5"}
    pairs = read([row] * repeating + [alone] * (30 - repeating))
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {(" 4", " 5")}


def test_one_answer_as_a_whole_conversation():
    user, good, bad = (
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
    )
    for chosen, rejected in (([user, good], [bad]), ([good], [user, bad])):
        (pair,) = read([{"prompt": "Q", "chosen": chosen, "rejected": rejected}])
        assert (pair.prompt, pair.chosen, pair.rejected) == ([user], [good], [bad])


def test_a_prompt_that_its_conversations_do_not_hold_is_noted():
    """UltraFeedback's `prompt` repeats the question; what is somewhere else only is not trained on."""
    user = {"role": "user", "content": "Q\n1"}
    good, bad = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
    row = {"prompt": "Q 1", "chosen": [user, good], "rejected": [user, bad]}
    (pair,) = read([row])
    assert pair.notes == []
    (pair,) = read([{**row, "prompt": "Answer in French."}])
    assert pair.notes == ["the text of `prompt` is not in the conversations, and these alone are read"]
    assert pair.prompt == [user]


def test_alpaca_is_joined():
    (pair,) = read([ALPACA], prompt_column="instruction", apply_chat_template=True)
    assert [message["content"] for message in pair.prompt] == ["Hi", "Hello", "In one word.\nWhat is 2 plus 2?"]
    (pair,) = read([{**ALPACA, "history": []}], prompt_column="input")
    assert pair.prompt == "In one word.\nWhat is 2 plus 2?"
    (pair,) = read([{**ALPACA, "history": None, "input": ""}], prompt_column="instruction")
    assert pair.prompt == "In one word."


def test_the_hint_says_what_is_joined():
    with pytest.raises(UserError, match=r"set prompt_column=instruction \(`input` is joined to it\)"):
        read([ALPACA])


def test_history():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for value in ([["Hi", "Hello"]], '[["Hi", "Hello"]]', turns, "[['Hi' 'Hello']]"):
        assert read_history(value, "history") == turns
    for value in (None, "", [], "[]", float("nan"), "nan"):
        assert read_history(value, "history") == []
    for value in (["Hi", "Hello"], "User: Hi", 7):
        with pytest.raises(BadRow, match="neither pairs of a question and its answer nor messages"):
            read_history(value, "history")


def test_a_prompt_in_the_column_history():
    """As in stanfordnlp/SHP."""
    turns = [{"role": "user", "content": "Hi"}]
    (pair,) = read([{"history": turns, "chosen": "a", "rejected": "b"}], prompt_column="history")
    assert pair.prompt == turns


@pytest.mark.parametrize("column", ["input", "system", "tools", "history", "images", "chat_template_kwargs"])
def test_an_empty_cell_of_pandas_is_no_value(column):
    row = {"instruction": "Q", "chosen": "a", "rejected": "b"}
    (pair,) = read([{**row, column: float("nan")}], prompt_column="instruction", apply_chat_template=True)
    assert pair == read([row], prompt_column="instruction", apply_chat_template=True)[0]
