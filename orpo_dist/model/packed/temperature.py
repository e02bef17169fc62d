"""Attention whose temperature depends on the position (Llama 4), in a packed row.

Layers without rotary positions multiply a query by log(1 + floor((position + 1) / floor_scale)) * attn_scale + 1 and
take the place in the row for the position: 1 up to floor_scale (8192), and wrong from there on, where other sequences
come before. In the packed layout they leave it out, and the packed attention multiplies by the scale of the position
in the query's own sequence.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from orpo_dist.model.patches import OWN_TEMPERATURE, Patched, replace_attribute
from orpo_dist.model.upstream import scales_queries_by_place
from orpo_dist.packing.layout import PackedLayout

QueryScale = Callable[[PackedLayout], torch.Tensor]


def own_temperatures(text_model: nn.Module) -> Callable[[], list[Patched]]:
    """Puts the patches of the layers concerned on."""
    modules = [module for module in text_model.modules() if scales_queries_by_place(module)]

    def put_on() -> list[Patched]:
        handles = []
        for module in modules:
            handles.append(replace_attribute(module, "attn_temperature_tuning", False, OWN_TEMPERATURE))
            handles.append(replace_attribute(module, "orpo_query_scale", partial(_scale, module), OWN_TEMPERATURE))
        return handles

    return put_on


def query_scale(module: nn.Module) -> QueryScale | None:
    """How `module` scales its queries, if it is one that leaves that to the packed attention."""
    return vars(module).get("orpo_query_scale")


def _scale(module: Any, layout: PackedLayout) -> torch.Tensor:
    """(1, 1, T, 1) float32, of a split row (1, 1, w, 1), in Llama4TextAttention.forward's terms."""
    positions = layout.reshare_index % layout.unshare_index.shape[1]  # unshared rows begin with their sequence
    if layout.split is not None:
        positions = layout.split.cut(positions, 0)
    steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
    return (torch.log1p(steps) * module.attn_scale + 1.0)[None, None, :, None]
