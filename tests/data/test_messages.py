import json

import pytest

from orpo_dist.data.messages import decode, read_content, read_message, read_tools, visible
from orpo_dist.errors import BadRow


@pytest.mark.parametrize(
    "value, expected", [("hello", "hello"), (42, "42"), ("42", "42"), ("[1, 2]", "[1, 2]"), ("", "")]
)
def test_text_stays_text(value, expected):
    assert read_content(value, "chosen") == expected


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": "Hi"}],
        {"role": "user", "content": "Hi"},
        [{"from": "human", "value": "Hi"}],
        [{"role": "user", "content": "Hi", "name": None, "tool_calls": None}],
        [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}],
        '[{"role": "user", "content": "Hi"}]',
        "[{'from': 'human', 'value': 'Hi'}]",
    ],
    ids=["messages", "one", "sharegpt", "arrow-none", "parts", "json-text", "python-text"],
)
def test_every_spelling_of_a_message_list(value):
    assert read_content(value, "prompt") == [{"role": "user", "content": "Hi"}]


def test_text_that_only_looks_like_messages_stays_text():
    for text in ('[{"a": 1}]', "[{broken", "[x]"):
        assert read_content(text, "chosen") == text


def test_sharegpt_speakers():
    roles = {"system": "system", "human": "user", "gpt": "assistant", "observation": "tool"}
    for speaker, role in roles.items():
        assert read_message({"from": speaker, "value": "x"}, "c") == {"role": role, "content": "x"}


def test_sharegpt_function_call_becomes_a_tool_call():
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    message = read_message({"from": "function_call", "value": json.dumps(call)}, "conversations")
    assert message["role"] == "assistant"
    assert message["tool_calls"] == [{"type": "function", "function": call}]


def test_sharegpt_messages_keep_their_other_fields():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    given = {"from": "gpt", "value": "x", "reasoning_content": "why", "tool_calls": [call]}
    fields = {"reasoning_content": "why", "tool_calls": [call]}
    assert read_message(given, "c") == {"role": "assistant", "content": "x", **fields}
    given = {"from": "function_call", "value": json.dumps(call["function"]), "thinking": "why"}
    assert read_message(given, "c")["thinking"] == "why"


@pytest.mark.parametrize("content", ["", None, "Let me see."])
def test_the_function_call_of_old_apis_is_a_tool_call(content):
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    read = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    message = read_message({"role": "assistant", "content": content, "function_call": call}, "c")
    assert message == {"role": "assistant", "content": content or "", "tool_calls": [read]}


@pytest.mark.parametrize(
    "value, kind",
    [
        (None, "missing value"),
        (float("nan"), "NaN"),
        (4.5, "wrong type"),
        (True, "wrong type"),
        (b"bytes", "wrong type"),
        (["text"], "wrong type"),
        ([{"content": "x"}], "bad message"),
        ([{"role": "user"}], "bad message"),
        ([{"role": "alien", "content": "x"}], "bad message"),
        (["Hi", "Hello"], "wrong type"),
        ([["Hi", "Hello"]], "wrong type"),
        ({"role": ["user", "assistant"], "content": ["x"]}, "bad message"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}, "bad message"),
        ("cut off \ud83d", "broken text"),
        ([{"role": "user", "content": "cut off \ud83d"}], "broken text"),
        ([{"from": "alien", "value": "x"}], "bad message"),
        ([{"from": "function_call", "value": "not json"}], "bad message"),
        ([{"role": "user", "content": [{"type": "video"}]}], "wrong type"),
    ],
)
def test_unreadable_values_name_the_column(value, kind):
    with pytest.raises(BadRow) as caught:
        read_content(value, "chosen")
    assert (caught.value.kind, caught.value.column) == (kind, "chosen")


def test_an_assistant_message_may_hold_only_a_tool_call():
    message = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    assert read_message(message, "chosen") == {**message, "content": ""}


def test_tools_as_list_or_json_text():
    schema = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    for value in (json.dumps([schema]), {"__json__": json.dumps([schema])}):
        assert read_tools(value, "tools") == [schema]  # a null of a file stays
    padded = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for value in ([schema], schema):
        assert read_tools(value, "tools") == [padded]  # one of an Arrow column may be a key of another row
    for value in (None, "", [], "[]"):
        assert not read_tools(value, "tools")
    for value in ("{broken", 3, ["f"]):
        with pytest.raises(BadRow, match="tools"):
            read_tools(value, "tools")


@pytest.mark.parametrize(
    ("given", "role"),
    [("human", "user"), ("User", "user"), ("GPT", "assistant"), ("model", "assistant"), ("observation", "tool"),
     ("prompter", "user"), ("developer", "developer"), ("ipython", "ipython")],
)  # fmt: skip
def test_roles_in_other_words(given, role):
    assert read_message({"role": given, "content": "x"}, "chosen") == {"role": role, "content": "x"}
    assert read_message({"from": given, "value": "x"}, "chosen") == {"role": role, "content": "x"}


@pytest.mark.parametrize(
    "value",
    [
        {"role": ["user", "assistant"], "content": ["Hi", "Hello"]},
        {"from": ["human", "gpt"], "value": ["Hi", "Hello"]},
        [{"role": "user", "value": "Hi"}, {"from": "gpt", "content": "Hello"}],
    ],
)
def test_messages_column_by_column_and_in_mixed_words(value):
    expected = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert read_content(value, "chosen") == expected


def test_nulls_of_a_file_stay_and_those_of_arrow_go():
    arguments = {"unit": None}
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
    }
    (exact,) = read_content(decode({"__json__": json.dumps([message])}), "chosen")
    assert exact["tool_calls"][0]["function"]["arguments"] == arguments and exact["content"] == ""
    (padded,) = read_content(decode([message]), "chosen")
    assert padded["tool_calls"][0]["function"]["arguments"] == {}


def test_keys_of_a_data_set_play_no_part_in_comparisons():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    first = [{"role": "assistant", "content": "x", "id": 1, "tool_calls": [{"id": "a", **call}]}]
    second = [{"role": "assistant", "content": "x", "date": "today", "tool_calls": [{"id": "b", **call}]}]
    assert visible(first) == visible(second)
    assert visible(first) != visible([{**first[0], "reasoning_content": "hm"}])


def test_decode():
    assert decode({"__json__": '"42"'}) == "42"
    assert decode({"__json__": None}) is None
    assert decode({"__json__": "1", "other": 2}) == {"__json__": "1", "other": 2}
