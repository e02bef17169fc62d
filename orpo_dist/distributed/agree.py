"""Decisions that a rank could reach alone, made by all ranks together.

A rank that falls back, skips or stops by what only it has seen leaves the others waiting in their next collective: gloo
aborts or reads garbage, NCCL hangs until its timeout.
"""

from typing import Any, TypeVar

from torch import distributed

Value = TypeVar("Value")


def first_objection(reason: str) -> str:
    """The objection of the lowest rank that has one, the same on every rank; "" if none has. A collective: every rank
    must call it.

    reason: this rank's objection, "" for none.
    """
    reasons: list[Any] = [reason]
    if _has_peers():
        reasons = [None] * distributed.get_world_size()
        distributed.all_gather_object(reasons, reason)
    rank = next((rank for rank, found in enumerate(reasons) if found), None)
    if rank is None:
        return ""
    return reasons[rank] if all(reasons) else f"{reasons[rank]} (on rank {rank} of {len(reasons)})"


def as_on_first_rank(value: Value) -> Value:
    """Rank 0's value on every rank. A collective: every rank must call it."""
    if not _has_peers():
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def _has_peers() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
