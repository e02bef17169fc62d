"""Work that the first rank does for all: every rank gets its result, or its error."""

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
