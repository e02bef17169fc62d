"""Exchanges between the ranks that share one packed row, as autograd functions.

Every rank of a group must make the same calls in the same order, forward and backward, whatever lies in its slice.

Shape legend: T tokens of the row, w tokens of a slice.
"""

from typing import Any

import torch
import torch.distributed as dist

from orpo_dist.packing.split import RowSplit

_groups: dict[int, Any] = {}


def sequence_group(size: int) -> Any:
    """This rank's process group of `size` neighbouring ranks. Every rank must call it: making a group is a collective.
    Asked again, it returns the same group."""
    if size not in _groups:
        world, rank = dist.get_world_size(), dist.get_rank()
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        _groups[size] = groups[rank // size]
    return _groups[size]


class _AllToAll(torch.autograd.Function):
    """(size, ...) of which [i] goes to rank i, to (size, ...) of which [i] came from rank i. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, group: Any, send: torch.Tensor) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(send)
        dist.all_to_all_single(received, send, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, _AllToAll.apply(ctx.group, grads[0].contiguous())


class _GatherRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: RowSplit, x: torch.Tensor) -> torch.Tensor:
        ctx.split = split
        whole = x.new_empty(split.where.size * split.width, *x.shape[2:])
        dist.all_gather_into_tensor(whole, x[0].contiguous(), group=split.group)
        return whole[None, : split.length]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        split, grad = ctx.split, grads[0]
        whole = grad.new_zeros(split.where.size * split.width, *grad.shape[2:])
        whole[: split.length] = grad[0]
        mine = torch.empty_like(whole[: split.width])
        dist.reduce_scatter_tensor(mine, whole, group=split.group)
        return None, mine[None]


def all_to_all(send: torch.Tensor, split: RowSplit) -> torch.Tensor:
    """(size, ...) of which [i] goes to rank i of the group, to (size, ...) of which [i] came from rank i."""
    return _AllToAll.apply(split.group, send)  # type: ignore[no-any-return]


def gather_row(x: torch.Tensor, split: RowSplit) -> torch.Tensor:
    """(1, w, ...) of each rank to (1, T, ...) on all. In the backward the gradients of all ranks are summed."""
    return _GatherRow.apply(split, x)  # type: ignore[no-any-return]


def sum_over_group(x: torch.Tensor, split: RowSplit) -> torch.Tensor:
    """`x` summed in place over the group. No gradient."""
    dist.all_reduce(x, group=split.group)
    return x
