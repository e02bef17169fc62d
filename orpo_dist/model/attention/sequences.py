"""Attention over a packed row, sequence by sequence. It runs on any device and is the reference for every kernel.

    plain or sliding window   scaled_dot_product_attention
    softcap, sinks            explicit maths, in blocks of queries

Shape legend: T tokens of the packed row, D head size, Hq query heads, Hk key heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from orpo_dist.packing.layout import PackedLayout

MASK_ELEMENTS = 2**24  # of the largest attention mask that is formed as a whole
EXPLICIT_BLOCK = 1024  # most queries whose score matrix exists at once in the explicit maths


@dataclass(frozen=True)
class Scores:
    """How a layer turns query-key products into weights.

    scale: factor of the products. window: how many tokens a query sees, itself included; None for all.
    softcap: s -> softcap * tanh(s / softcap). sinks: (Hq,) a logit per head that takes part in the softmax only.
    dropout: probability of dropping a weight.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    dropout: float = 0.0


def _sequences(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries, keys and values of [P C] and [P R] of each pair in turn.

    `split` and not slices: the backward of a slice fills a tensor of the whole row with zeros, that of a split
    concatenates once.
    """
    query_sizes: list[int] = []
    part_sizes: list[int] = []
    for s in layout.segments:
        second_prompt = [] if layout.shared else [s.prompt]
        query_sizes += [s.prompt + s.chosen, s.tokens - s.prompt - s.chosen]
        part_sizes += [s.prompt, s.chosen, *second_prompt, s.rejected]
    queries = iter(query.split(query_sizes, 2))
    if not layout.shared:
        yield from zip(queries, key.split(query_sizes, 2), value.split(query_sizes, 2), strict=True)
        return
    keys, values = iter(key.split(part_sizes, 2)), iter(value.split(part_sizes, 2))
    for _ in layout.segments:
        key_p, key_c, key_r = next(keys), next(keys), next(keys)
        value_p, value_c, value_r = next(values), next(values), next(values)
        yield next(queries), torch.cat([key_p, key_c], 2), torch.cat([value_p, value_c], 2)
        yield next(queries), torch.cat([key_p, key_r], 2), torch.cat([value_p, value_r], 2)


def _visible(layout: PackedLayout, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(queries, keys) bool: the last query sees the last key, each one `window` tokens back."""
    found = layout.visibility.get((queries, keys, window))
    if found is None:
        last, key = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)
        found = key <= last
        if window is not None:
            found = found & (key > last - window)
        layout.visibility[queries, keys, window] = found
    return found


def _see_own_block(visible: torch.Tensor, blocks: torch.Tensor | None) -> torch.Tensor:
    """`visible` (queries, keys), where the tokens of a prompt block (P,) see each other too."""
    if blocks is None:
        return visible
    visible, prompt = visible.clone(), len(blocks)
    visible[:prompt, :prompt] |= (blocks[:, None] == blocks) & (blocks >= 0)
    return visible


def sdpa_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
) -> torch.Tensor:
    """(1, T, Hq, D) by scaled_dot_product_attention, two calls per pair."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for sequence, (q, k, v) in enumerate(_sequences(query, key, value, layout)):
        queries, keys, blocks = q.shape[2], k.shape[2], layout.blocks_of(sequence)
        windowed = scores.window is not None and keys > scores.window
        causal = queries == keys and not windowed and blocks is None
        if not causal and blocks is None and queries * keys > MASK_ELEMENTS:
            outputs.append(_sdpa_in_blocks(q, k, v, scores))
            continue
        mask = None
        if not causal:
            mask = _see_own_block(_visible(layout, queries, keys, scores.window, q.device), blocks)
        grouped = groups > 1 and (mask is None or not q.is_cuda)  # masked GQA has only the slow maths kernel on CUDA
        if groups > 1 and not grouped:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, scores.dropout, is_causal=causal, scale=scores.scale, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _sdpa_in_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
    """The same for one long sequence, block of queries by block, each with the keys that it sees: the mask of all of
    them is kept in float32 until the backward, 3 GB for a completion of 16,384 after a prompt of 32,768."""
    queries, keys, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    size = max(1, MASK_ELEMENTS // keys)
    outputs: list[torch.Tensor] = []
    for block in q.split(size, 2):
        stop = keys - queries + sum(output.shape[2] for output in outputs) + block.shape[2]
        begin = stop - block.shape[2]  # the last key that the first query of the block sees
        first = 0 if scores.window is None else max(0, begin - scores.window + 1)
        last, key = torch.arange(begin, stop, device=q.device)[:, None], torch.arange(first, stop, device=q.device)
        mask = key <= last if scores.window is None else (key <= last) & (key > last - scores.window)
        seen_k, seen_v = (x[:, :, first:stop].repeat_interleave(groups, 1) for x in (k, v))
        outputs.append(F.scaled_dot_product_attention(block, seen_k, seen_v, mask, scores.dropout, scale=scores.scale))
    return torch.cat(outputs, 2)


def explicit_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
) -> torch.Tensor:
    """(1, T, Hq, D) with softcap and sinks, softmax in float32 at least.

    A sequence of more than EXPLICIT_BLOCK queries goes block by block, each recomputed in the backward pass, so that
    memory holds one block of scores and not the square of the sequence.
    """
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for sequence, (q, k, v) in enumerate(_sequences(query, key, value, layout)):
        visible = _visible(layout, q.shape[2], k.shape[2], scores.window, q.device)
        visible = _see_own_block(visible, layout.blocks_of(sequence))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if q.shape[2] <= EXPLICIT_BLOCK:
            outputs.append(_explicit_block(q, k, v, visible, scores))
            continue
        for rows, seen in zip(q.split(EXPLICIT_BLOCK, 2), visible.split(EXPLICIT_BLOCK), strict=True):
            outputs.append(checkpoint(_explicit_block, rows, k, v, seen, scores, use_reentrant=False))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _explicit_block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, scores: Scores
) -> torch.Tensor:
    logits = (query @ key.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32)) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if scores.sinks is not None:
        sinks = scores.sinks.to(logits.dtype)[None, :, None, None].expand(-1, -1, logits.shape[2], -1)
        logits = torch.cat([logits, sinks], 3)
    weights = torch.softmax(logits, 3)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weights, scores.dropout) @ value
