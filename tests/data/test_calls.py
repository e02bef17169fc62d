"""Tool calls and schemas in the spellings of APIs and files."""

import json

import pytest

from orpo_dist.data.calls import call_of_text, read_arguments, read_calls, read_schemas
from orpo_dist.errors import BadRow

CITY = {"city": "Paris", "days": 1, "unit": None}
CALL = {"type": "function", "function": {"name": "weather", "arguments": CITY}}
SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"maximum": 1, "default": None}}}


@pytest.mark.parametrize(
    "value", [CITY, json.dumps(CITY), json.dumps(json.dumps(CITY))], ids=["value", "text", "twice"]
)
def test_arguments(value):
    read = read_arguments(value, "chosen")
    assert read == CITY and isinstance(read["days"], int)


@pytest.mark.parametrize("value", [None, "null", "", "{}", {}, '"null"'])
def test_no_arguments(value):
    assert read_arguments(value, "chosen") == {}


@pytest.mark.parametrize("value", ["{city", "[1]", 3, "9" * 5000, "[" * 100_000])
def test_arguments_that_are_none(value):
    with pytest.raises(BadRow, match=r"the arguments .* are not") as caught:
        read_arguments(value, "chosen")
    assert (caught.value.kind, caught.value.column) == ("bad message", "chosen")


def test_calls():
    as_text = {"id": None, **CALL, "function": {**CALL["function"], "arguments": json.dumps(CITY)}}
    for value in ([CALL], [as_text], json.dumps([as_text]), [json.dumps(as_text)], as_text):
        assert read_calls(value, "chosen") == [CALL]
    assert read_calls([{"name": "f", "arguments": "{}"}], "chosen") == [{"name": "f", "arguments": {}}]
    for value in (None, [], "[]", "null", ""):
        assert read_calls(value, "chosen") is None
    for value in ("[{", 3, ["f"]):
        with pytest.raises(BadRow, match="tool_calls"):
            read_calls(value, "chosen")


def test_sharegpt_calls():
    one = {"name": "weather", "arguments": json.dumps(CITY)}
    assert call_of_text(json.dumps(one), "c") == [CALL]
    assert call_of_text(json.dumps([one, one]), "c") == [CALL, CALL]


def test_schemas():
    in_text = {
        "type": "function",
        "function": {"name": "weather", "parameters": json.dumps({"maximum": 1, "default": None})},
    }
    values = ([SCHEMA], SCHEMA, json.dumps([SCHEMA]), json.dumps(json.dumps([SCHEMA])), [json.dumps(SCHEMA)], [in_text])
    for value in values:
        assert read_schemas(value, "tools") == [SCHEMA]
    assert read_schemas(repr([SCHEMA]), "tools") == [SCHEMA]
    for value in (None, "", [], "[]", "null", "{}", {}, "nan"):
        assert read_schemas(value, "tools") is None
    by_column = {"name": ["f", "g"], "description": ["F", None]}
    assert read_schemas(by_column, "tools") == [{"name": "f", "description": "F"}, {"name": "g"}]


@pytest.mark.parametrize("value", [{"f": {"description": "F"}}, [{"description": "F"}], {"name": ["f"], "type": []}])
def test_schemas_without_a_name(value):
    with pytest.raises(BadRow, match=r"has no name|of different lengths"):
        read_schemas(value, "tools")
