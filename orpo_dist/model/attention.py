"""Attention over a packed row of pairs, registered with transformers as "orpo_packed".

A pair is two causal sequences, [P C] and [P R] (see packing/layout.py). No mask function is registered, so the model's
mask builders return None and the layout, an extra keyword of `model(...)`, is all that says who sees whom.

    plain or sliding window, CUDA in half precision   one varlen call over all pairs
    the same elsewhere, or attention dropout          scaled_dot_product_attention per sequence
    logit softcap (Gemma 2), sinks (GPT-OSS)          explicit maths per sequence, in blocks of queries

Shape legend: T tokens of the packed row, K keys over all sequences, D head size, Hq query heads, Hk key heads.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from orpo_dist.packing.layout import PackedLayout, PackedLayoutError

PACKED_ATTENTION = "orpo_packed"
EXPLICIT_BLOCK = 1024  # most queries whose score matrix exists at once in the explicit maths
_FLASH_HEAD_SIZE = 256  # largest head of the flash kernels, which also want multiples of 8
_NOT_UNDERSTOOD = ("position_bias", "sinks", "block_indices", "indices")

VarlenKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedLayout, float, int | None], torch.Tensor]


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


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    orpo_layout: PackedLayout | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (1, Hq, T, D), key and value (1, Hk, T, D) to (1, T, Hq, D).

    Raises:
        PackedLayoutError: no layout reached the layer, or it asks for something that this function does not know.
    """
    layout = _checked(module, query, attention_mask, orpo_layout, kwargs)
    window = None if sliding_window is None or sliding_window >= layout.max_seqlen_k else sliding_window
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
    )
    query, key, value = _one_dtype(query, key, value)
    if softcap is not None or s_aux is not None:
        return explicit_attention(query, key, value, layout, scores), None
    kernel = varlen_kernel(query, value, dropout) if layout.prompt_blocks is None else None  # kernels are causal
    if kernel is not None:
        return varlen_attention(query, key, value, layout, scores, kernel), None
    return sdpa_attention(query, key, value, layout, scores), None


def _checked(
    module: nn.Module,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: PackedLayout | None,
    kwargs: dict,
) -> PackedLayout:
    name = type(module).__name__
    if layout is None:
        raise PackedLayoutError(
            f"{name} received no orpo_layout. The model is in the packed layout: pass orpo_layout=..., or restore() it "
            "before a plain forward or generate()."
        )
    if attention_mask is not None:
        raise PackedLayoutError(f"{name} received an attention mask, which the packed layout cannot honour.")
    not_causal = kwargs.get("is_causal") is False or vars(module).get("is_causal") is False
    if not_causal and layout.prompt_blocks is None:
        raise PackedLayoutError(f"{name} is not causal.")
    unknown = [option for option in _NOT_UNDERSTOOD if kwargs.get(option) is not None]
    if unknown:
        raise PackedLayoutError(f"{name} uses {', '.join(unknown)}, which the packed attention does not know.")
    if query.shape[0] != 1 or query.shape[2] != layout.length:
        raise PackedLayoutError(
            f"{name} received {query.shape[0]} x {query.shape[2]} queries for a packed row of {layout.length} tokens."
        )
    return layout


def _one_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Rotary embeddings leave float32 under autocast; the kernels want one dtype, autocast's where it is on."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
    return [tensor.to(tensors[-1].dtype) for tensor in tensors]


# ---------------------------------------------------------------- one varlen call


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    scores: Scores,
    kernel: VarlenKernel,
) -> torch.Tensor:
    """(1, T, Hq, D). The row's queries are those of all sequences in order; keys are gathered to [P C][P R]."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    if layout.key_index is not None:
        key, value = key.index_select(0, layout.key_index), value.index_select(0, layout.key_index)
    return kernel(query, key, value, layout, scores.scale, scores.window)[None]


def varlen_kernel(query: torch.Tensor, value: torch.Tensor, dropout: float) -> VarlenKernel | None:
    """The varlen kernel of these tensors, or None where there is none: it has no dropout and wants a GPU of compute
    capability 8, half precision and heads of equal size."""
    head = query.shape[-1]
    fits = query.dtype in (torch.bfloat16, torch.float16) and head == value.shape[-1]
    if not query.is_cuda or not fits or head % 8 or head > _FLASH_HEAD_SIZE or dropout > 0:
        return None
    return _device_kernel(query.device.index)


@lru_cache
def _device_kernel(device_index: int) -> VarlenKernel | None:
    if torch.cuda.get_device_capability(device_index) < (8, 0):
        return None
    if {"scale", "window_size"} <= _varlen_options():
        return _torch_varlen
    return _flash_attn_varlen if find_spec("flash_attn") else None


@lru_cache
def _varlen_options() -> frozenset[str]:
    return frozenset(inspect.signature(varlen_attn).parameters)


def _torch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if groups > 1 and "enable_gqa" in _varlen_options():
        options["enable_gqa"] = True
    elif groups > 1:  # torch 2.11
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = varlen_attn(
        query,
        key,
        value,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # tokens to the left, none to the right: causal
        **options,
    )
    assert isinstance(output, torch.Tensor)  # a tuple only where the log-sum-exp is asked for
    return output


def _flash_attn_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
    )


# ---------------------------------------------------------------- sequence by sequence


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
        behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        found = behind >= 0
        if window is not None:
            found = found & (behind < window)
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
    logits = (query @ key.transpose(2, 3)) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~visible, -torch.inf)
    if scores.sinks is not None:
        sinks = scores.sinks.to(logits.dtype)[None, :, None, None].expand(-1, -1, logits.shape[2], -1)
        logits = torch.cat([logits, sinks], 3)
    weights = torch.softmax(logits, 3)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weights, scores.dropout) @ value


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
