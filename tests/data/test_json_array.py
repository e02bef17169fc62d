"""Objects of a JSON array, read in pieces of every size."""

import io
import json

import pytest

from orpo_dist.data import json_array
from orpo_dist.data.json_array import IrregularJson, array_of_objects

ROWS = [{"a": 'x"]}\\é', "b": [1, -2.5e10, True, None, float("-inf")]}, {}, {"c": {"d": "\ud83d\ude00 [{,"}}]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("indent", [None, 1])
def test_pieces_of_every_size(size, indent, monkeypatch):
    monkeypatch.setattr(json_array, "CHARACTERS", size)
    for ascii_only in (True, False):
        text = " \n" + json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only) + "\n "
        assert list(array_of_objects(io.StringIO(text))) == json.loads(text)
    assert list(array_of_objects(io.StringIO("[ ]"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "3",
        "[",
        "[]]",
        '[{"a": 1}',
        '[{"a": 1},]',
        '[{"a": 1} {"b": 2}]',
        '[{"a": 1}, 3]',
        '[{"a" 1}]',
        "[[1]]",
        '[{"a": 1}] x',
        '[{"a": "b',
        '[{"a": tru}]',
        "[" + '{"a":' * 100_000,
        '[{"a": ' + "9" * 5000 + "}]",
    ],
)
@pytest.mark.parametrize("pieces", [100, 1])
def test_anything_else(text, pieces, monkeypatch):
    monkeypatch.setattr(json_array, "CHARACTERS", max(1, len(text) // pieces))
    with pytest.raises(IrregularJson):
        list(array_of_objects(io.StringIO(text)))


def test_a_large_object_is_not_read_again_for_each_piece(monkeypatch):
    monkeypatch.setattr(json_array, "CHARACTERS", 10)
    file = io.StringIO(json.dumps([{"a": "x" * 100_000}]))
    reads = []
    original = file.read
    monkeypatch.setattr(file, "read", lambda size: reads.append(size) or original(size))
    assert len(next(array_of_objects(file))["a"]) == 100_000
    assert len(reads) < 30
