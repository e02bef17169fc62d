"""Packed attention with FlexAttention: the whole row, with softcap, sinks and windows, compiled to one kernel.

A query of the packed row sees two intervals of keys: those of the shared prompt, and those of its own sequence up to
itself (or up to the end of an image with bidirectional attention). Both are computed on the device from the layout,
once per micro-batch and window, and never read on the host.

Shape legend: T tokens of the packed row, M blocks of the block mask, D head size, Hq query heads, Hk key heads.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from orpo_dist.model.attention.sequences import Scores
from orpo_dist.packing.layout import PackedLayout

BLOCK = 128


@dataclass(frozen=True)
class VisibleKeys:
    """(M * BLOCK,) int32 each: query q sees the keys of [prompt_start, prompt_stop) and of [own_start, own_stop); those
    beyond the row's end see nothing."""

    prompt_start: torch.Tensor
    prompt_stop: torch.Tensor
    own_start: torch.Tensor
    own_stop: torch.Tensor


def visible_keys(layout: PackedLayout, window: int | None) -> VisibleKeys:
    """On the layout's device, without a sync."""
    starts, key_starts = layout.cu_seqlens_q, layout.cu_seqlens_k
    row = torch.arange(layout.length, device=starts.device, dtype=torch.int32)
    sequence = torch.searchsorted(starts, row, right=True) - 1
    first = starts[sequence]
    before = (key_starts.diff() - starts.diff())[sequence]  # keys of the sequence that lie before its own part: P or 0
    own_start, own_stop, skipped = first, row + 1, torch.zeros_like(row)
    if window is not None:
        own_start = torch.maximum(first, row - window + 1)
        skipped = (before + row - first - window + 1).clamp(min=0).minimum(before)
    if layout.prompt_blocks is not None:
        block_start, block_stop = _prompt_blocks(layout, row)
        own_start, own_stop = torch.minimum(own_start, block_start), torch.maximum(own_stop, block_stop)
    prompt = torch.zeros_like(row) if layout.key_index is None else layout.key_index[key_starts[sequence]].int()
    padding = -layout.length % BLOCK
    intervals = (prompt + skipped, prompt + before, own_start, own_stop)
    return VisibleKeys(*(torch.nn.functional.pad(bound, (0, padding)) for bound in intervals))


def _prompt_blocks(layout: PackedLayout, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) where the prompt block of each token begins and ends; a token in none is its own."""
    rows, sources, prompts = [], [], 0
    for s in layout.segments:
        for start in (s.start, s.rejected_start - s.prompt)[: s.prompt_copies]:
            rows.append(torch.arange(start, start + s.prompt))
            sources.append(torch.arange(prompts, prompts + s.prompt))
        prompts += s.prompt
    places, source = (torch.cat(x).to(row.device, non_blocking=True) for x in (rows, sources))
    assert layout.prompt_blocks is not None
    numbers = layout.prompt_blocks.index_select(0, source).int()
    number = torch.full_like(row, -1).index_copy(0, places, numbers)
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = (number[1:] != number[:-1]) | (number[1:] < 0)
    block_start = torch.where(begins, row, 0).cummax(0).values
    ends = torch.cat([begins[1:], begins[:1]])  # the row's first token begins, so its last one ends
    block_stop = torch.where(ends, row + 1, layout.length).flip(0).cummin(0).values.flip(0)
    return block_start, block_stop


def block_mask(layout: PackedLayout, window: int | None) -> BlockMask:
    """The block mask of a window, kept in the layout: every layer of a micro-batch uses it, and its recomputation."""
    found = layout.block_masks.get(window)
    if found is None:
        found = layout.block_masks[window] = _block_mask(layout, visible_keys(layout, window))
    return found


def _block_mask(layout: PackedLayout, visible: VisibleKeys) -> BlockMask:
    """Built by counting: `create_block_mask` would evaluate all T x T entries."""
    blocks = visible.own_start.shape[0] // BLOCK
    begin = BLOCK * torch.arange(blocks, device=visible.own_start.device, dtype=torch.int32)

    def seen(start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """(M, M) how many of the BLOCK x BLOCK entries lie in the interval of their query."""
        overlap = torch.minimum(stop[:, None], begin + BLOCK) - torch.maximum(start[:, None], begin)
        return overlap.clamp(min=0).view(blocks, BLOCK, blocks).sum(1, dtype=torch.int32)

    count = seen(visible.prompt_start, visible.prompt_stop) + seen(visible.own_start, visible.own_stop)
    full = count == BLOCK * BLOCK
    partial = (count > 0) & ~full
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(visible),
        seq_lengths=(layout.length, layout.length),
    )


def _mask_mod(visible: VisibleKeys):
    prompt_start, prompt_stop = visible.prompt_start, visible.prompt_stop
    own_start, own_stop = visible.own_start, visible.own_stop

    def sees(batch, head, q, k):
        in_prompt = (k >= prompt_start[q]) & (k < prompt_stop[q])
        return in_prompt | ((k >= own_start[q]) & (k < own_stop[q]))

    return sees


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, M) bool to (1, 1, M) number of set entries per row, and (1, 1, M, M) columns, those of set entries first."""
    columns = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], columns.to(torch.int32).contiguous()[None, None]


@cache
def _compiled_flex():
    return torch.compile(flex_attention)


def flex_packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
) -> torch.Tensor:
    """query (1, Hq, T, D), key and value (1, Hk, T, D) to (1, T, Hq, D)."""
    softcap = scores.softcap

    def cap(score, batch, head, q, k):
        return softcap * torch.tanh(score / softcap)

    result = _compiled_flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else cap,
        block_mask=block_mask(layout, scores.window),
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if scores.sinks is None else AuxRequest(lse=True),
    )
    if scores.sinks is None:
        return result.transpose(1, 2).contiguous()
    output, aux = result
    return with_sinks(output, aux.lse, scores.sinks).transpose(1, 2).contiguous()


def with_sinks(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Attention (1, Hq, T, D) whose softmax had no sink, as if each head's sink (Hq,) had taken part.

    A sink s turns the denominator exp(lse) into exp(lse) + exp(s): a factor of sigmoid(lse - s) on the output. The
    gradients are right because FlexAttention's backward takes one for `lse` too.
    """
    kept = torch.sigmoid(lse - sinks.to(lse.dtype)[None, :, None])
    return (output * kept[..., None]).to(output.dtype)
