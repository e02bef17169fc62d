"""Compares a packed row cut over a sequence-parallel group with the whole row, layer by layer, at start-up.

Both forwards are the packed one, so only the exchange between the ranks can make a difference. The states of the whole
row are recorded at the stations of model/packed/stations.py, and put in their place in the forward of the slices: what
differs at a station comes from the layer before it.

Shape legend: T tokens of the row, w tokens of a slice, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.model.packed.stations import Comparison, StationPass, TokenMap, observed_stations
from orpo_dist.model.packed.verify import LayoutCheck, layout_check, ordinary_ids, rounding_unit, run
from orpo_dist.packing.exchange import sequence_group
from orpo_dist.packing.layout import PackedLayout, PackedLayoutError
from orpo_dist.packing.split import RowSplit

# A token that rounding sends to another expert is another one; a wrong exchange is seen in most tokens.
SHARE, UNITS, LEAST = 0.9, 16.0, 1e-4
# P, C, R of pairs, so that each rank of up to eight holds some tokens.
_LENGTHS = ((9, 5, 8), (4, 9, 3), (12, 7, 6), (3, 4, 11))


def text_rows(base: PreTrainedModel) -> list[dict[str, Any]]:
    """Pairs of ordinary token ids, the same on every rank."""
    ordinary, generator = ordinary_ids(base), torch.Generator().manual_seed(2)
    rows = []
    for index, lengths in enumerate(_LENGTHS):
        ids = ordinary[torch.randint(len(ordinary), (sum(lengths),), generator=generator)]
        prompt, chosen, rejected = (part.tolist() for part in ids.split(lengths))
        rows.append(
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "weight": 1.0, "index": index}
        )
    return rows


def verify_slices(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    max_length: int | None,
    compute_dtype: torch.dtype = torch.float32,
) -> LayoutCheck:
    """Run `batch`, from a collator that splits its rows, whole and in slices, and compare this rank's slice.

    The model has been switched to the packed layout. Every rank must call it.
    """
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    layout: PackedLayout = batch["orpo_layout"]
    split = layout.split
    assert split is not None, "the collator splits its rows"
    split.group = sequence_group(split.where.size)
    layout.tokens, layout.pairs = layout.counts().float().unbind()

    def compare() -> Comparison:
        whole, slices = _Whole(_shape(layout.length), False), _Slices(_shape(split.width), False, split=split)
        layout.split = None
        with observed_stations(base, whole):
            run(model, base, batch)
        layout.split, slices.wanted = split, whole.found
        with observed_stations(base, slices):
            run(model, base, batch)
        return slices.worst(max(LEAST, UNITS * rounding_unit(base, compute_dtype)))

    return layout_check(model, base, compare, max_length=max_length, what="in slices its hidden states")


def _shape(length: int) -> TokenMap:
    nothing = torch.empty(0, dtype=torch.long)
    return TokenMap((1, length), nothing, nothing, nothing, [])


@dataclass
class _Whole(StationPass):
    found: dict[str, torch.Tensor] = field(default_factory=dict)

    def states(self, name: str, kind: str, rows: torch.Tensor) -> torch.Tensor:
        self.found[self.station(name)] = rows
        return rows


@dataclass
class _Slices(StationPass):
    split: RowSplit = field(kw_only=True)
    wanted: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: dict[str, torch.Tensor] = field(default_factory=dict)

    def states(self, name: str, kind: str, rows: torch.Tensor) -> torch.Tensor:
        name = self.station(name)
        if name not in self.wanted:
            raise PackedLayoutError(f"the forward of a slice reaches {name}, which that of the whole row does not")
        wanted = self.split.cut(self.wanted[name], 1)
        wide = torch.promote_types(rows.dtype, torch.float32)
        held = max(0, min(self.split.width, self.split.length - self.split.start))
        ours, theirs = rows[0, :held].to(wide), wanted[0, :held].to(wide)
        difference = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        self.errors[name] = difference.nan_to_num(nan=torch.inf)
        return wanted.to(rows.dtype)

    def worst(self, tolerance: float) -> Comparison:
        """Reads from the device once."""
        missed = next((name for name in self.wanted if name not in self.errors), None)
        if missed is not None:
            raise PackedLayoutError(f"the forward of a slice does not reach {missed}, which that of the whole row does")
        names, differences = list(self.errors), [_typical(errors) for errors in self.errors.values()]
        if not names:
            raise PackedLayoutError("no layer of it was recognised")
        values: Sequence[float] = torch.stack(differences).tolist()
        place = max(range(len(names)), key=values.__getitem__)
        return Comparison(names[place], values[place], tolerance)


def _typical(errors: torch.Tensor) -> torch.Tensor:
    """() the error that a share of SHARE of the tokens does not exceed; 0 for a slice without tokens."""
    if not errors.numel():
        return errors.new_zeros(())
    return errors.sort().values[int(SHARE * (errors.numel() - 1))]
