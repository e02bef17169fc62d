"""Sequence parallelism (Ulysses): every rank of a group runs the whole model on its slice of one packed row.

    decoder's input    cut to the slice                                                   (SliceRow, hooks)
    attention          all-to-all: slices of all heads -> the row of some heads -> back   (on_whole_rows)
    other mixers       all-gather of the row, computed on every rank, own slice kept      (mixers.py)
    loss head          the slice's scored rows                                            (model/head/slice_pass.py)

Parameters get the slice's part of the gradient: the sum over all ranks is the whole one, as with data parallelism.
Jacobs et al. 2023, DeepSpeed Ulysses (https://arxiv.org/abs/2309.14509).

Shape legend: T tokens of the row, w of a slice, D head size of queries and keys, Dv of values, Hq query heads, Hk key
heads.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from orpo_dist.model.patches import SLICED_ROW, Patched, add_forward_hook, add_forward_pre_hook
from orpo_dist.packing.exchange import all_to_all, gather_row
from orpo_dist.packing.layout import PackedLayout
from orpo_dist.packing.split import RowSplit

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def on_whole_rows(
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    split: RowSplit,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`attention(query, key, value, sinks)` of (1, heads, T, D) to (1, T, heads, Dv), called with a share of the heads.

    query (1, Hq, w, D), key and value (1, Hk, w, D or Dv) to (1, w, Hq, Dv): one all-to-all there, one back. Keys are
    repeated until every rank gets as many as it needs. Query heads that do not divide are filled up with heads of zeros
    (14 over 4 ranks: 16, with a key head for each). What fills up the last slice is cut off before the attention.
    sinks: (Hq,) or None.
    """
    size, heads, key_heads = split.where.size, query.shape[1], key.shape[1]
    repeat = math.lcm(key_heads, size) // key_heads
    if heads % (repeat * key_heads):
        repeat = heads // key_heads
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    filling = -heads % size
    if filling:
        query, key, value = (nn.functional.pad(x, (0, 0, 0, 0, 0, filling)) for x in (query, key, value))
        sinks = sinks if sinks is None else nn.functional.pad(sinks, (0, filling))
    if sinks is not None:
        sinks = sinks.chunk(size)[split.where.place]
    # (1, heads, w, D) -> (size, w, heads / size * D), the three side by side
    parts = [x[0].unflatten(0, (size, -1)).transpose(1, 2).flatten(2) for x in (query, key, value)]
    received = all_to_all(torch.cat(parts, 2), split).flatten(0, 1)[: split.length]
    head_sizes = (query.shape[3], key.shape[3], value.shape[3])
    q, k, v = (
        part.unflatten(1, (-1, head_size)).transpose(0, 1)[None].contiguous()
        for part, head_size in zip(received.split([part.shape[2] for part in parts], 1), head_sizes, strict=True)
    )
    output = attention(q, k, v, sinks)
    missing = size * split.width - split.length
    output = nn.functional.pad(output[0], (0, 0, 0, 0, 0, missing)).unflatten(0, (size, split.width))
    back = all_to_all(output.contiguous(), split)  # (size, w, Hq / size, Dv)
    return back.transpose(0, 1).flatten(1, 2)[None, :, :heads]


class SliceRow:
    """Hooks that cut what a decoder is given to this rank's slice: tokens or embeddings, positions, and whatever else
    has a dimension of T tokens. Before them stands the embedding of images, after them the decoder's layers."""

    def __init__(self, text_model: nn.Module):
        self._text_model = text_model

    def put_on(self) -> list[Patched]:
        return [
            add_forward_pre_hook(self._text_model, self._before, SLICED_ROW),
            add_forward_hook(self._text_model, self._after, SLICED_ROW),
        ]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        layout = kwargs.get("orpo_layout")
        self._split = split = layout.split if isinstance(layout, PackedLayout) else None
        if split is None:
            return None
        kept = {"orpo_layout": layout}
        if kwargs.get("deepstack_visual_embeds") is not None:  # Qwen3-VL: features of the image tokens, in their order
            mask = kwargs["visual_pos_masks"][0]
            mine = torch.zeros_like(mask)
            mine[split.start : split.start + split.width] = True
            kept["deepstack_visual_embeds"] = [x[mine[mask]] for x in kwargs["deepstack_visual_embeds"]]
        cut = {name: kept[name] if name in kept else _cut(value, split) for name, value in kwargs.items()}
        return tuple(_cut(value, split) for value in args), cut

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """The load-balancing loss is of the whole row: every rank computes it, and adds a share (LossHead.loss)."""
        split = self._split
        if split is not None and isinstance(output, dict) and output.get("router_logits"):
            output["router_logits"] = tuple(gather_row(x[None], split)[0] for x in output["router_logits"])
        return output


def _cut(value: Any, split: RowSplit) -> Any:
    if isinstance(value, dict):
        return {name: _cut(item, split) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cut(item, split) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape[:2] == (1, split.length):
        return split.cut(value, 1)
    if value.dim() in (1, 3) and value.shape[-1] == split.length:  # positions: (T,), or M-RoPE's (3 or 4, 1, T)
        return split.cut(value, value.dim() - 1)
    return value
