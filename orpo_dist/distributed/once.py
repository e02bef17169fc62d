"""Work that one rank does for all. The others wait on the key-value store of the process group, not in a collective: a
long tokenisation would exceed its timeout (10 minutes for NCCL)."""

import json
import os
import socket
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from orpo_dist.distributed.environment import is_launched_with_others, launched_rank
from orpo_dist.errors import UserError

POLL_SECONDS = 0.2
VISIBLE_SECONDS = 10  # time for a folder renamed on another node to appear on a shared file system
ERROR_SECONDS = 10  # time for the other ranks to read the error of rank 0 before it raises


_calls = count()  # ranks make the same calls in the same order, so the number names the call on all of them


def built_on_first_rank(work: Callable[[], Path]) -> Path:
    """Runs `work` on rank 0 and returns its path on every rank. A node that does not see the path runs `work` itself.

    Every rank of the process group must call this, in the same order. Without a process group it returns `work()`.

    Raises:
        UserError: on every rank, when `work` raised it on rank 0 (or on the first rank of the node).
        RuntimeError: on the waiting ranks, when `work` failed in another way.
    """
    from torch import distributed

    if not distributed.is_initialized() and is_launched_with_others():
        from accelerate import PartialState

        PartialState()  # starts the process group from the launcher's environment
    store = _store()
    if store is None:
        return work()
    call = next(_calls)
    everywhere = f"orpo_dist/data/{call}"
    here = f"{everywhere}/{_node()}"
    seen = f"{everywhere}/errors_seen"
    if distributed.get_rank() == 0:
        try:
            return _work_and_tell(work, store, [everywhere, here])
        except BaseException:
            _wait_for_readers(store, seen, distributed.get_world_size() - 1)
            raise
    launched = launched_rank()
    if launched is None or launched.local_rank is None:
        # The node has no first rank here. Two ranks may safely build the same folder.
        return _seen_or_own(_wait(store, everywhere, seen), work)
    if launched.local_rank == 0:
        return _work_and_tell(lambda: _seen_or_own(_wait(store, everywhere, seen), work), store, [here])
    return _wait(store, here, seen)


def done_by_first_rank(work: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> None:
    """Runs `work` on rank 0; the other ranks run `meanwhile`, their part of its collectives, and wait.

    For the last acts of a run, which may take longer than a collective may: a merge, an upload. Every rank must call
    it, in the same order.

    Raises:
        UserError: on every rank, when `work` raised it.
        RuntimeError: on the waiting ranks, when `work` failed in another way.
    """
    from torch import distributed

    store = _store()
    if store is None:
        work()
        return
    key = f"orpo_dist/done/{next(_calls)}"
    seen = f"{key}/errors_seen"
    if distributed.get_rank() != 0:
        meanwhile()
        _wait(store, key, seen)
        return
    try:
        _work_and_tell(lambda: (work(), Path())[1], store, [key])
    except BaseException:
        _wait_for_readers(store, seen, distributed.get_world_size() - 1)
        raise


def _store() -> Any:
    """The key-value store of the process group; None for one process."""
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    # torch has no public name for the store behind the default group.
    return distributed.distributed_c10d._get_default_store()


def is_first_rank() -> bool:
    """Whether this process prints and writes for all. True without a process group."""
    from torch import distributed

    return not distributed.is_initialized() or distributed.get_rank() == 0


def _node() -> str:
    # One machine may act as several nodes (torchrun's tests, slurmd -N), so the host name alone is not enough.
    return "/".join([socket.gethostname(), *(os.environ.get(name, "") for name in ("GROUP_RANK", "SLURMD_NODENAME"))])


def _work_and_tell(work: Callable[[], Path], store: Any, keys: list[str]) -> Path:
    try:
        path = work()
        outcome = {"path": str(path)}
    except UserError as error:
        outcome = {"user_error": str(error)}
        raise
    except BaseException as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        for key in keys:
            store.set(key, json.dumps(outcome))
    return path


def _wait_for_readers(store: Any, seen: str, readers: int) -> None:
    # A launcher ends the other ranks as soon as rank 0 has exited, and the store may live in rank 0: let them read the
    # error first.
    deadline = time.monotonic() + ERROR_SECONDS
    while store.add(seen, 0) < readers and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _wait(store: Any, key: str, seen: str) -> Path:
    while not store.check([key]):
        time.sleep(POLL_SECONDS)
    outcome = json.loads(store.get(key))
    if "path" not in outcome:
        store.add(seen, 1)
    if "user_error" in outcome:
        raise UserError(outcome["user_error"])
    if "error" in outcome:
        raise RuntimeError(f"The rank that works for the others failed: {outcome['error']}")
    return Path(outcome["path"])


def _seen_or_own(path: Path, work: Callable[[], Path]) -> Path:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < deadline:
        if path.exists():
            return path
        if not path.parent.exists():
            break  # the cache is on a local disk of the other node: there is nothing to wait for
        time.sleep(POLL_SECONDS)
    return work()
