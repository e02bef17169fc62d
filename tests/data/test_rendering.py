import json

import pytest

from orpo_dist.data.rendering import missing_pieces
from tests.data.conversations import CALL, TOOLS, assistant, user


def names(messages, text, tools=None) -> list[str]:
    return [piece.what for piece in missing_pieces(messages, tools, text)]


def test_nothing_is_missing_up_to_white_space_and_escapes():
    messages = [user("  one\n two "), assistant('say "three" \n é')]
    assert names(messages, 'USER one two END BOT say "three" é') == []
    assert names(messages, r'{"user": "one\n two", "bot": "say \"three\" \n \u00e9"}') == []
    assert names([user("a < b & c")], "<p>a &lt; b &amp; c</p>") == []


def test_a_place_stands_for_one_message():
    """The answer quotes the tool's result, and the result itself is gone."""
    messages = [user("How warm?"), {"role": "tool", "content": "22"}, assistant("It is 22 degrees.")]
    assert names(messages, "How warm? It is 22 degrees.") == ["the content of tool messages"]
    assert names([user("Hi"), assistant("Hi")], "USER Hi") == ["the content of assistant messages"] or names(
        [user("Hi"), assistant("Hi")], "USER Hi"
    ) == ["the content of user messages"]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_reasoning_in_its_own_field(field):
    message = assistant("Four.", **{field: "Two and two."})
    assert names([message], "Four.") == ["the reasoning of assistant messages"]
    assert names([message], "<think>Two and two.</think>Four.") == []


def test_reasoning_in_parts():
    message = assistant("Four.", reasoning_details=[{"type": "reasoning.text", "text": "Two and two."}])
    assert names([message], "Four.") == ["the reasoning of assistant messages"]
    assert names([message], "<think>Two and two.</think>Four.") == []
    assert names([assistant("Four.", reasoning=["Two", "and two."])], "Two Four.") == [
        "the reasoning of assistant messages"
    ]


@pytest.mark.parametrize("value", [TOOLS, json.dumps(TOOLS)])
def test_tools_in_a_message(value):
    message = {"role": "system", "content": "Be brief.", "tools": value}
    assert "tools of the row" in names([message], "Be brief.")
    assert names([message], "Be brief. " + json.dumps(TOOLS)) == []


def test_reasoning_inside_the_content():
    message = assistant("<think>\nTwo and two.\n</think>\n\nFour.")
    assert names([message], "<think>\nTwo and two.\n</think>\n\nFour.") == []
    assert names([message], "analysis: Two and two. final: Four.") == []
    (lost,) = missing_pieces([message], None, "Four.")
    assert str(lost) == "the reasoning of an assistant message ('Two and two.')"


def test_calls():
    assert names([CALL], '{"name": "get_weather", "arguments": {"city": "Pa\\"ris", "days": 3}}') == []
    assert names([CALL], "get_weather(city='Pa\"ris', days=3)") == []
    assert names([CALL], "get_weather()") == ["the tool call of assistant messages"] * 4
    as_text = assistant("", tool_calls=[{"function": {"name": "add", "arguments": '{"to": [1, true]}'}}])
    assert names([as_text], "add(to=[1, True])") == []


def test_tools():
    assert names([user("Hi")], "get_weather: Weather of a city (city, days) Hi", TOOLS) == []
    assert set(names([user("Hi")], "Hi", TOOLS)) == {"tools of the row"}
