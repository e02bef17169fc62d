"""Attention over a packed row of pairs, registered with transformers as "orpo_packed".

A pair is two causal sequences, [P C] and [P R] (see packing/layout.py). No mask function is registered, so the model's
mask builders return None, and the layout, an extra keyword of `model(...)`, alone says which token sees which.

    CUDA, half precision   one kernel over all pairs, from model/attention/kernels.py
    the rest               sequence by sequence, model/attention/sequences.py: any device, float32, attention dropout

Shape legend: T tokens of the packed row (of this rank's slice, where several share it), D head size, Hq query heads,
Hk key heads.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import AttentionInterface

from orpo_dist.model.attention.kernels import KernelCase, trusted_kernel
from orpo_dist.model.attention.sequences import Scores, explicit_attention, sdpa_attention
from orpo_dist.model.packed.carried import carried_layout
from orpo_dist.model.packed.slices import on_whole_rows
from orpo_dist.model.packed.temperature import query_scale
from orpo_dist.model.patches import PACKED_ATTENTION_FUNCTION, Patched
from orpo_dist.packing.layout import PackedLayout, PackedLayoutError

PACKED_ATTENTION = "orpo_packed"
_NOT_UNDERSTOOD = ("position_bias", "sinks", "block_indices", "indices")


@torch.compiler.disable  # a compiled block breaks here, see model/packed/compile.py
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
    layout = orpo_layout if orpo_layout is not None else carried_layout()
    layout = _checked(module, query, attention_mask, layout, kwargs)
    layout.reached = True
    scale_of = query_scale(module)
    if scale_of is not None:
        query = (query * scale_of(layout)).to(query.dtype)
    window = None if sliding_window is None or sliding_window >= layout.max_seqlen_k else sliding_window
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
    )
    query, key, value = _one_dtype(query, key, value)
    if layout.split is None:
        return _attend(query, key, value, layout, scores), None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        return _attend(q, k, v, layout, replace(scores, sinks=sinks))

    return on_whole_rows(attend, query, key, value, layout.split, s_aux), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scores: Scores
) -> torch.Tensor:
    """(1, heads, T, D) to (1, T, heads, D), of all heads or of this rank's share of them."""
    trusted = trusted_kernel(KernelCase.of(query, key, value, layout, scores))
    if trusted is not None:
        return trusted.kernel(query, key, value, layout, scores)
    if scores.softcap is not None or scores.sinks is not None:
        return explicit_attention(query, key, value, layout, scores)
    return sdpa_attention(query, key, value, layout, scores)


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
    length = layout.length if layout.split is None else layout.split.width
    if query.shape[0] != 1 or query.shape[2] != length:
        raise PackedLayoutError(
            f"{name} received {query.shape[0]} x {query.shape[2]} queries for a packed row of {length} tokens."
        )
    return layout


def _one_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Rotary embeddings leave float32 under autocast; the kernels want one dtype, autocast's where it is on."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
    return [tensor.to(tensors[-1].dtype) for tensor in tensors]


def register_packed_attention() -> Patched:
    """Make `orpo_packed` known to transformers, for every model. Done at the import of this module."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    # `register` has no counterpart, and `del` on an instance reaches its local names only.
    return Patched(PACKED_ATTENTION_FUNCTION, lambda: AttentionInterface._global_mapping.pop(PACKED_ATTENTION))


register_packed_attention()
