"""Work of the first rank in one process; with several it is in tests/topologies and tests/survival."""

import pytest

from orpo_dist.distributed import ranks
from orpo_dist.errors import SaveError, UserError


def test_one_process_does_the_work_itself():
    assert ranks.on_first_rank(lambda: [1]) == [1]


@pytest.mark.parametrize("kind", [UserError, SaveError, ZeroDivisionError])
def test_its_error_is_the_callers(kind):
    def fail():
        raise kind("broken")

    with pytest.raises(kind, match="broken"):
        ranks.on_first_rank(fail)


def test_nothing_waits_without_a_process_group(monkeypatch):
    slept = []
    monkeypatch.setattr("orpo_dist.distributed.ranks.time.sleep", slept.append)
    ranks.let_gloo_finish()
    assert slept == []
    monkeypatch.setattr(ranks, "is_initialized", lambda: True)
    ranks.let_gloo_finish()
    assert slept and slept[0] > 0
