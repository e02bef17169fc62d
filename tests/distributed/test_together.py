"""Steps of all ranks, with one; with two: tests/topologies/test_agreement.py."""

import pytest

from orpo_dist.distributed.together import Together, background_group
from orpo_dist.errors import SaveError


def test_one_process_goes_through_them_alone():
    ranks = Together(background_group())
    assert ranks.each(lambda: 3) == [3] and ranks.first(lambda: "a") == "a"


@pytest.mark.parametrize("error", [SaveError("full"), ZeroDivisionError("a bug")])
def test_its_error_is_its_own(error):
    def fail():
        raise error

    for call in (Together().each, Together().first):
        with pytest.raises(type(error)) as told:
            call(fail)
        assert told.value is error
