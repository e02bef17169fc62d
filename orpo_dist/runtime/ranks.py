"""Ranks that act as one: work that the first one does for all, and the end of the processes."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from orpo_dist.errors import SaveError, UserError

Result = TypeVar("Result")


def on_first_rank(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 and return its result on every rank. Every rank must call it; it is a collective.

    Raises:
        UserError, SaveError: on every rank, when `work` raised them.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work()
    outcome: list = [None, None]
    if state.is_main_process:
        try:
            outcome = [work(), None]
        except (UserError, SaveError) as error:
            outcome = [None, error]
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def leave_together() -> None:
    """End the process group, the last thing a rank does. Every rank must call it; it is a collective.

    Without the barrier a rank that exits while another still writes is aborted now and then (exit code -6): gloo's
    thread frees the tensors of its last all-gather, which takes the GIL of an interpreter that is going away. Two of
    14 ZeRO-3 runs whose first rank left 1.5 s later ended so, none of 14 with it.
    https://github.com/pytorch/pytorch/pull/179291
    """
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
