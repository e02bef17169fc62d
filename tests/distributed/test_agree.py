"""Agreement in one process; with two it is in tests/topologies/test_agreement.py."""

from orpo_dist.distributed.agree import as_on_first_rank, first_objection


def test_one_process_agrees_with_itself():
    assert first_objection("") == "" and first_objection("no") == "no"
    assert as_on_first_rank([1]) == [1]
