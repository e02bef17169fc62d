import json

import pytest

from orpo_dist.data.messages import decode, read_content, read_message, read_tools
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
    stored = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for value in ([schema], json.dumps([schema]), schema, {"__json__": json.dumps([schema])}):
        assert read_tools(value, "tools") == [stored]
    for value in (None, "", [], "[]"):
        assert not read_tools(value, "tools")
    for value in ("{broken", 3, ["f"]):
        with pytest.raises(BadRow, match="tools"):
            read_tools(value, "tools")


def test_decode():
    assert decode({"__json__": '"42"'}) == "42"
    assert decode({"__json__": None}) is None
    assert decode({"__json__": "1", "other": 2}) == {"__json__": "1", "other": 2}
