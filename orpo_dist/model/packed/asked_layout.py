"""What a run asks of its layout, and the collator that data loaders hold before it is chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orpo_dist.loss import Objective
from orpo_dist.packing.sampler import UNNUMBERED
from orpo_dist.packing.split import SequencePlace

Rows = Sequence[dict[str, Any]]
Collator = Callable[[Rows], dict[str, Any]]


@dataclass(frozen=True)
class ImageSetup:
    """The settings of a run with images.

    example: the row with images that has the shortest prompt, which shows how images appear in a text.
    partitioned: whether the weights are sharded, so that all ranks must run the vision tower.
    world_size: number of ranks.
    """

    processor: Any
    example: dict[str, Any]
    partitioned: bool
    world_size: int


@dataclass(frozen=True)
class LayoutOptions:
    """Options of the layout, from the config and the data.

    trl_collator: a data collator of the user, which requires the padded layout.
    max_length: limit of P + C and P + R, or None.
    images: None if no row has any.
    sequence: the place of this rank where several share a packed row, which the padded layout refuses.
    """

    objective: Objective
    padding_free: bool
    prefix_sharing: bool
    verify_layout: bool
    loss_chunk_size: int | None
    nll_scope: str
    pad_token_id: int
    max_length: int | None
    compute_dtype: torch.dtype
    trl_collator: Callable[[list[dict]], dict[str, Any]] | None = None
    images: ImageSetup | None = None
    sequence: SequencePlace | None = None


class PairCollator:
    """What data loaders hold: collates in the layout that has been chosen, whose workers start after the choice.

    Rows of a loader that the user has made carry neither weight nor index.
    """

    def __init__(self) -> None:
        self.chosen: Collator | None = None

    def __call__(self, rows: Rows) -> dict[str, Any]:
        assert self.chosen is not None, "LayoutChoice.choose() comes first"
        return self.chosen([{"weight": 1.0, "index": UNNUMBERED, **row} for row in rows])
