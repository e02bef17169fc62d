"""A key twice in an object, at any depth; the same value twice loses nothing."""

import pytest

from orpo_dist.data.unique_keys import DECODER, RepeatedKey


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": [{"a": "x", "c": 0, "a": "y"}]}]'])
def test_two_values_are_an_error(text):
    with pytest.raises(RepeatedKey, match="the key `a` is in one object twice"):
        DECODER.decode(text)


def test_one_value_twice_is_read():
    assert DECODER.decode('{"a": [1], "b": 2, "a": [1]}') == {"a": [1], "b": 2}
