"""A packed row cut over the ranks of a sequence-parallel group: who holds which tokens and which scored rows.

The row of T tokens is filled up to `size` slices of equal width w. The layout goes on describing the whole row; a split
adds what one rank must know of its own slice. Host numbers and CPU tensors, made by the collator.

Shape legend: B pairs, T tokens of the row, w tokens of a slice, N scored rows of the row, n those of this slice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SequencePlace:
    """size: ranks that share one packed row, at least 2. place: of this rank among them, from 0."""

    size: int
    place: int


class RowSplit:
    """What one rank holds of a packed row.

    A row of 12 tokens over 5 ranks has slices of w = 3 tokens: rank 3 holds tokens 9 to 11, rank 4 filling alone.

    where: this rank's place in the group.
    length, width, start: T, w, and the place in the row of the slice's first token.
    rows: (n,) places in the slice of its scored rows, in the order of layout.rows.
    places: (n,) theirs among layout.rows.
    counts: per pair, how many scored rows of the prompt, the chosen and the rejected completion lie here.
    rounds: pairs whose completions lie on several ranks, in two lists of which no rank holds two of one: a border of
        slices cuts at most one pair, so a rank has such a pair at its beginning and one at its end.
    group: the process group, attached before the forward: a collator in a worker process has none.
    """

    def __init__(
        self, where: SequencePlace, length: int, rows: torch.Tensor, scored_counts: Sequence[tuple[int, int, int]]
    ):
        """length: T. rows: (N,) of the whole row. scored_counts: per pair, see PackedLayout."""
        self.where, self.length = where, length
        self.width = -(-length // where.size)
        self.start = where.place * self.width
        owner = rows // self.width
        self.places = (owner == where.place).nonzero()[:, 0]
        self.rows = rows[self.places] - self.start
        parts = owner.split([count for counts in scored_counts for count in counts])
        here = [int((part == where.place).sum()) for part in parts]
        self.counts = [(here[i], here[i + 1], here[i + 2]) for i in range(0, len(here), 3)]
        spanning = [
            pair
            for pair in range(len(scored_counts))
            if torch.cat(parts[3 * pair + 1 : 3 * pair + 3]).unique().numel() > 1
        ]
        self.rounds = [pairs for pairs in (spanning[0::2], spanning[1::2]) if pairs]
        self.group: ProcessGroup | None = None

    def replace(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces each tensor by what `change` makes of it: moved or pinned."""
        self.rows, self.places = change(self.rows), change(self.places)

    def cut(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's slice of a tensor with T tokens in `dim`, filled up with zeros to w."""
        held = max(0, min(self.width, self.length - self.start))
        here = tensor.narrow(dim, min(self.start, self.length), held)
        if held == self.width:
            return here
        shape = list(here.shape)
        shape[dim] = self.width - held
        return torch.cat([here, here.new_zeros(shape)], dim)
