"""Steps that all ranks take together: none goes on before each has done its part, and a failure of one is that of all.

The training's own collectives belong to the main thread. Work in a thread beside it takes a group of its own
(`background_group`): collectives of one group must come in the same order on every rank.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

from orpo_dist.distributed.timeouts import BACKGROUND, START_SECONDS
from orpo_dist.errors import SaveError, UserError

Result = TypeVar("Result")


class Together:
    """group: that the ranks meet in; None for the training's own."""

    def __init__(self, group: Any = None):
        self._group = group

    def each(self, work: Callable[[], Result]) -> list[Result]:
        """Run `work` on every rank; the results of all of them, in order. A collective: every rank must call it.

        Raises:
            UserError, SaveError: on every rank, when `work` raised them on one.
            RuntimeError: on the other ranks, when `work` failed in another way.
        """
        result: Any = None
        own: Exception | None = None
        try:
            result = work()
        except Exception as error:
            own = error
        outcomes = self._gather((result, _portable(own)))
        if own is not None:
            raise own
        for rank, (_, failure) in enumerate(outcomes):
            if isinstance(failure, Exception):
                raise failure
            if failure is not None:  # not all exceptions can be pickled
                raise RuntimeError(f"Rank {rank} failed: {failure}")
        return [value for value, _ in outcomes]

    def first(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0 alone; its result on every rank. A collective: see `each`."""
        return self.each(lambda: work() if not _has_peers() or distributed.get_rank() == 0 else None)[0]  # type: ignore

    def _gather(self, outcome: tuple[Any, Any]) -> list[tuple[Any, Any]]:
        if not _has_peers():
            return [outcome]
        outcomes: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(outcomes, outcome, group=self._group)
        return outcomes


def background_group(seconds: float = START_SECONDS) -> Any:
    """A group of all ranks for a thread beside the training, which waits for `seconds`; None for one process. A
    collective: every rank must call it, from its main thread.

    It is on the CPU (gloo), and its timeout is not that of the training's collectives: the others wait while one rank
    writes its files.
    """
    if not _has_peers():
        return None
    return distributed.new_group(backend="gloo", timeout=timedelta(seconds=seconds), group_desc=BACKGROUND)


def _portable(error: Exception | None) -> Exception | str | None:
    if error is None or isinstance(error, UserError | SaveError):
        return error
    return f"{type(error).__name__}: {error}"


def _has_peers() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
