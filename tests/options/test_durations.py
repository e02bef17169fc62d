"""Durations as a recipe writes them."""

import pytest

from orpo_dist.errors import UserError
from orpo_dist.options.durations import seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        (5400, 5400),
        ("1h30m", 5400),
        ("90m", 5400),
        ("1.5h", 5400),
        ("2d1s", 172801),
        ("01:30:00", 5400),
        ("30:00", 1800),
        ("1-00:00:10", 86410),
        (" 45S ", 45),
    ],
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1h30", "0", "-5", "1:2:3:4", "h"])
def test_what_is_no_duration(text):
    with pytest.raises(UserError, match="max_runtime="):
        seconds_of(text)
