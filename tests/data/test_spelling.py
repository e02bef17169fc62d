"""Columns of text that spell out messages, and columns of text that only look so in one row."""

import csv
import json

import numpy
import pandas
import pytest
from datasets import Dataset

from orpo_dist.data.detect import column_strings, detect_format
from orpo_dist.data.sources import load_rows
from orpo_dist.data.spelling import decoded, looks_like_messages, spelled_messages, strings_of
from orpo_dist.errors import BadRow
from orpo_dist.options.data import PrepareOptions

MESSAGES = [{"role": "user", "content": 'It\'s 2\n"two"'}, {"role": "assistant", "content": "ok [] {} null"}]
AS_JSON, AS_PYTHON = json.dumps(MESSAGES), repr(MESSAGES)


@pytest.mark.parametrize(
    "text",
    [
        AS_JSON,
        json.dumps(AS_JSON),
        AS_PYTHON,
        str(numpy.array(MESSAGES, dtype=object)),
        repr(numpy.array(MESSAGES, dtype=object)),
        AS_PYTHON.replace("}, {", "}\n {"),
    ],
    ids=["json", "json twice", "python", "numpy str", "numpy repr", "lines"],
)
def test_spellings_of_a_list(text):
    assert looks_like_messages(text)
    assert decoded(text) == MESSAGES


def test_values_that_only_python_or_numpy_write():
    text = "{'role': 'user', 'content': 'a', 'tool_calls': None, 'n': array(['a', 'b'], dtype=object), 'x': nan}"
    assert decoded(text) == {"role": "user", "content": "a", "tool_calls": None, "n": ["a", "b"], "x": None}
    assert decoded("['a' 'b']") == ["a", "b"]
    assert decoded("[{'n': np.int64(1), 'l': [1 2 3], 't': true}]") == [{"n": 1, "l": [1, 2, 3], "t": True}]


def test_cells():
    assert spelled_messages(AS_PYTHON, "chosen") == MESSAGES
    assert spelled_messages("null", "chosen") is None and spelled_messages("None", "chosen") is None
    for text in ("plain text", AS_PYTHON[:-9], "[" * 100_000, "42"):
        with pytest.raises(BadRow, match="cannot be decoded, and the column holds messages as text") as caught:
            spelled_messages(text, "chosen")
        assert len(caught.value.reason) < 200


def test_a_column_is_what_most_of_it_is():
    assert strings_of(["a", AS_JSON, "b"]) == "text"
    assert strings_of(["a", AS_JSON]) == "text"
    assert strings_of([AS_JSON, AS_PYTHON, "broken", "", None, "null"]) == "spelled"
    assert strings_of([AS_JSON[:-5]] * 3) == "spelled"  # that no cell can be decoded must not make it text
    assert strings_of([MESSAGES, MESSAGES, "Hi"]) == "messages"
    assert strings_of([]) == strings_of([42, "x"]) == "text"


def test_json_that_is_no_message():
    for text in ('[{"from": "Paris", "to": "Rome"}]', '[{"role": "lead", "name": "Ann"}]', "[1]", "{}", "[{broken"):
        assert not looks_like_messages(text)


def test_both_answers_spell_messages_or_none():
    row = {"prompt": "Write a chat", "chosen": AS_JSON, "rejected": "I cannot."}
    assert set(column_strings([row], "prompt", "chosen", "rejected").values()) == {"text"}
    swift = {"messages": AS_JSON, "rejected_response": "No."}
    assert column_strings([swift], None, "messages", "rejected_response")["messages"] == "spelled"


def test_an_answer_that_is_a_json_list_stays_text():
    rows = [{"prompt": "p", "chosen": text, "rejected": "no"} for text in ("plain", AS_JSON, "[]")]
    pair_format = detect_format(list(rows[0]), rows, PrepareOptions())
    assert [pair_format.pair(row).chosen for row in rows] == ["plain", AS_JSON, "[]"]


def prompts(path) -> list:
    rows = list(load_rows(str(path)))
    pair_format = detect_format(list(rows[0]), rows, PrepareOptions())
    assert "messages decoded from the text of" in pair_format.description
    return [pair_format.pair(row).prompt for row in rows]


@pytest.mark.parametrize("writer", ["pandas", "datasets", "json"])
def test_columns_of_messages_through_csv(tmp_path, writer):
    first, second = {"from": "gpt", "value": "?"}, {"from": "human", "value": "It"}
    turns = [[{"from": "human", "value": f"What's {n}?"}, first, second] for n in range(3)]
    rows = [
        {"conversations": turn, "chosen": {"from": "gpt", "value": "Yes"}, "rejected": {"from": "gpt", "value": "No"}}
        for turn in turns
    ]
    path = tmp_path / "a.csv"
    if writer == "pandas":
        pandas.DataFrame(rows).to_csv(path, index=False)
    elif writer == "datasets":
        Dataset.from_list(rows).to_csv(str(path))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows({name: json.dumps(value) for name, value in row.items()} for row in rows)
    roles = {"human": "user", "gpt": "assistant"}
    assert prompts(path) == [[{"role": roles[t["from"]], "content": t["value"]} for t in turn] for turn in turns]
