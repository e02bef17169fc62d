import pytest

from orpo_dist.data.detect import detect_format
from orpo_dist.data.pairs import Pair, common_length, common_text_prompt
from orpo_dist.errors import BadRow, UserError
from orpo_dist.options.data import PrepareOptions

USER = {"role": "user", "content": "Two and two?"}
GOOD = {"role": "assistant", "content": "Four."}
BAD = {"role": "assistant", "content": "Five."}
SYSTEM = {"role": "system", "content": "Be brief."}
MESSAGES = Pair([USER], [GOOD], [BAD])


def read(row: dict, **options) -> Pair:
    return detect_format(list(row), [row], PrepareOptions(**options)).pair(row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": "Four.", "rejected": "Five."},
        {"prompt": "Two and two?", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Two and two?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "conversations": [{"from": "human", "value": "Two and two?"}],
            "chosen": {"from": "gpt", "value": "Four."},
            "rejected": {"from": "gpt", "value": "Five."},
        },
    ],
    ids=["explicit", "single", "string-replies", "string-prompt", "implicit", "ultrafeedback", "repeated", "sharegpt"],
)
def test_message_formats_give_the_same_pair(row):
    assert read(row) == MESSAGES


def test_ids_and_dates_of_messages_do_not_divide_a_conversation():
    row = {
        "chosen": [{**USER, "id": 1}, {**GOOD, "id": 2}],
        "rejected": [{**USER, "id": 3}, {**BAD, "id": 4}],
    }
    assert read(row) == Pair([{**USER, "id": 1}], [{**GOOD, "id": 2}], [{**BAD, "id": 4}])
    explicit = {"prompt": [{**USER, "id": 9}], **row}
    assert read(explicit).chosen == [{**GOOD, "id": 2}]
    with pytest.raises(BadRow, match="the same conversation"):
        read({"chosen": row["chosen"], "rejected": [{**USER, "id": 3}, {**GOOD, "id": 5}]})


def test_explicit_text():
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    assert read(row) == Pair("2+2=", "4", "5")
    assert read(row, apply_chat_template=True) == Pair(
        [{"role": "user", "content": "2+2="}],
        [{"role": "assistant", "content": "4"}],
        [{"role": "assistant", "content": "5"}],
    )


def test_text_that_repeats_the_prompt_loses_it_once():
    row = {"prompt": "2+2= ", "chosen": "2+2= 4", "rejected": "2+2= 5"}
    assert read(row) == Pair("2+2= ", "4", "5")
    assert "it is taken off" in detect_format(list(row), [row], PrepareOptions()).description


def test_one_row_that_starts_like_its_prompt_is_not_a_repeated_prompt():
    rows = [
        {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"},
        {"prompt": "2+2", "chosen": "4", "rejected": "5"},
    ]
    assert detect_format(list(rows[0]), rows, PrepareOptions()).pair(rows[0]) == Pair("Hi", "Hi there", "Hi you")


def test_implicit_text():
    row = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello, what is up?",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Hello, go away.",
    }
    assert read(row) == Pair("\n\nHuman: Hi\n\nAssistant:", " Hello, what is up?", " Hello, go away.")


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("Q: x\nA: yes", "Q: x\nA: no", "Q: x\nA:"),
        ("yes", "no", ""),
    ],
)
def test_common_text_prompt_ends_between_words(chosen, rejected, prompt):
    assert common_text_prompt(chosen, rejected) == prompt


def test_columns_by_name():
    row = {"q": "2+2=", "good": "4", "bad": "5", "prompt": "not this"}
    assert read(row, prompt_column="q", chosen_column="good", rejected_column="bad") == Pair("2+2=", "4", "5")
    dialogues = {"prompt": "id-7", "chosen": "a b", "rejected": "a c"}
    assert read(dialogues, prompt_column="") == Pair("a", " b", " c")


def test_system_and_tools():
    tool = {"type": "function", "function": {"name": "f"}}
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "system": "Be brief.", "tools": [tool]}
    assert read(row) == Pair([SYSTEM, USER], [GOOD], [BAD], [tool])
    assert read({**row, "prompt": [SYSTEM, USER]}) == read(row)
    assert read(row, system_column="", tools_column="") == MESSAGES
    assert read({"s": "Be brief.", "prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."},
                system_column="s", apply_chat_template=True) == Pair([SYSTEM, USER], [GOOD], [BAD])  # fmt: skip
    with pytest.raises(BadRow, match="another system message"):
        read({**row, "system": "Be long.", "prompt": [SYSTEM, USER]})


def test_system_message_in_the_conversation_is_kept():
    row = {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    assert read(row).prompt == [SYSTEM, USER]


def test_completions_of_several_messages():
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    result = {"role": "tool", "content": "4"}
    row = {"prompt": [USER], "chosen": [call, result, GOOD], "rejected": [BAD]}
    assert read(row).chosen == [call, result, GOOD]


@pytest.mark.parametrize("key, value", [("train", False), ("weight", 0), ("weight", 0.0), ("loss", False)])
def test_a_turn_that_is_not_to_be_trained_is_not_trained_in_silence(key, value):
    row = {"prompt": [USER], "chosen": [{**GOOD, key: value}, USER, GOOD], "rejected": [BAD]}
    with pytest.raises(BadRow, match=f"`{key}` takes a turn out of training"):
        read(row)
    assert read({**row, "chosen": [{**GOOD, key: 1}, USER, GOOD]}).rejected == [BAD]
    assert read({**row, "chosen": [GOOD], "rejected": [{**BAD, key: value}]}).chosen == [GOOD]


@pytest.mark.parametrize(
    "row, kind, column",
    [
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty completion", "chosen"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "empty completion", "rejected"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "empty completion", "chosen"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "empty completion", "chosen"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical pair", "rejected"),
        ({"chosen": "a b", "rejected": "a b"}, "identical pair", "rejected"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "identical pair", "rejected"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "identical pair", "rejected"),
        ({"chosen": "yes", "rejected": "no"}, "no common prompt", "chosen"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "no common prompt", "chosen"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "empty completion", "chosen"),
        ({"prompt": [USER], "chosen": [SYSTEM, GOOD], "rejected": [BAD]}, "bad message", "chosen"),
        ({"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "bad message", "prompt"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "bad message", "prompt"),
        ({"prompt": "p", "chosen": "a", "rejected": [BAD]}, "wrong type", "rejected"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "system": "s"}, "needs a template", "system"),
    ],
)
def test_bad_rows(row, kind, column):
    with pytest.raises(BadRow) as caught:
        read(row)
    assert (caught.value.kind, caught.value.column) == (kind, column)


@pytest.mark.parametrize(
    "columns, options, message",
    [
        (["prompt", "chosen"], {}, "No column `rejected`. The columns are `prompt`, `chosen`"),
        (["prompt", "chosen", "rejected"], {"chosen_column": "good"}, "chosen_column=good: no such column"),
        (["chosen", "rejected"], {"rejected_column": "chosen"}, "are both `chosen`"),
        (["question", "chosen", "rejected"], {}, "set prompt_column=question"),
        (["chosen", "rejected"], {"apply_chat_template": True}, "where the prompt ends"),
    ],
)
def test_unusable_columns(columns, options, message):
    with pytest.raises(UserError, match=message):
        detect_format(columns, [dict.fromkeys(columns, "text")], PrepareOptions(**options))


def test_messages_without_template_are_refused():
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    with pytest.raises(UserError, match="apply_chat_template is false"):
        detect_format(list(row), [row], PrepareOptions(apply_chat_template=False))


def test_the_format_is_detected_behind_unreadable_rows():
    rows = [
        {"prompt": None, "chosen": None, "rejected": None},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    ]
    assert "messages" in detect_format(list(rows[0]), rows, PrepareOptions()).description


@pytest.mark.parametrize(
    "sequences, length",
    [
        (("", "abc"), 0),
        (("abc", "abc"), 3),
        (("abc", "abd", "ab"), 2),
        (("xbc", "abc"), 0),
        (([1, 2, 3], [1, 2, 4]), 2),
    ],
)
def test_common_length(sequences, length):
    assert common_length(*sequences) == length
