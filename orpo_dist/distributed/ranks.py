"""Ranks that act as one: work that the first one does for all, and the end of the processes."""

import time
from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed import is_initialized

from orpo_dist.errors import SaveError, UserError

Result = TypeVar("Result")
_GLOO_SECONDS = 0.3


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

    A rank that left while another still writes would be aborted now and then: see `let_gloo_finish`.
    """
    state = PartialState()
    state.wait_for_everyone()
    let_gloo_finish()
    state.destroy_process_group()


def let_gloo_finish() -> None:
    """Wait, without holding the GIL, until gloo's threads have freed the tensors of the last collectives.

    A thread of gloo drops them after the call has returned, and needs the GIL for it. In an interpreter that is going
    away it gets none and aborts the process (exit code -6 after a finished run): 2 of 14 ZeRO-3 runs without a barrier
    at their end, 1 of 44 with one, since gloo's barrier keeps the works before it alive.
    https://github.com/pytorch/pytorch/pull/179291
    """
    if is_initialized():
        time.sleep(_GLOO_SECONDS)
