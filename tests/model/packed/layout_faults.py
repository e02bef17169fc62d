"""Faults of a packed layout, put into one layer of a model on purpose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM

from orpo_dist.model.attention import sequences
from orpo_dist.packing.layout import PackedLayout

_visible, _sequences = sequences._visible, sequences._sequences


def _top_left(layout, queries, keys, window, device):
    return torch.ones(queries, keys, dtype=torch.bool).tril()


def _sees_one_ahead(layout, queries, keys, window, device):
    ahead = torch.arange(keys - queries, keys)[:, None] + 1 == torch.arange(keys)
    return _visible(layout, queries, keys, window, device) | ahead


def _no_window(layout, queries, keys, window, device):
    return _visible(layout, queries, keys, None, device)


def _window_of(change: int) -> Callable:
    return lambda layout, queries, keys, window, device: _visible(
        layout, queries, keys, window and window + change, device
    )


def _keys(change: Callable, of: int = 1) -> Callable:
    """`change(keys or values, those of the chosen sequence, P, those of the pair before)` of the rejected sequence (1)
    or of the chosen one (0)."""

    def changed(query, key, value, layout) -> Iterator[tuple]:
        before: Any = None
        items = list(_sequences(query, key, value, layout))
        for i, (queries, keys, values) in enumerate(items):
            chosen, prompt = items[i - i % 2], layout.segments[i // 2].prompt
            if i % 2 == of:
                keys, values = (
                    change(part, chosen[k], prompt, before and before[k]) for k, part in ((1, keys), (2, values))
                )
            yield queries, keys, values
            before = items[i] if i % 2 else before

    return changed


def _prompt_lost(x, chosen, prompt, before):
    return x[:, :, prompt:]


def _last_of_prompt_lost(x, chosen, prompt, before):
    return torch.cat([x[:, :, : prompt - 1], x[:, :, prompt:]], 2)


def _first_of_prompt_lost(x, chosen, prompt, before):
    return x[:, :, 1:]


def _chosen_seen(x, chosen, prompt, before):
    return torch.cat([chosen, x[:, :, prompt:]], 2)


def _pair_before_seen(x, chosen, prompt, before):
    return x if before is None else torch.cat([before[:, :, -1:], x], 2)


def _positions(of_rejected: Callable[[Any], int]) -> Callable:
    """A pre-hook on attention: the rejected completion's rotary angles are those of positions from another start."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        layout: PackedLayout | None = kwargs.get("orpo_layout")
        if layout is None:
            return None
        starts = [(s, of_rejected(s)) for s in layout.segments]
        places = [(torch.arange(s.prompt + s.chosen), torch.arange(start, start + s.rejected)) for s, start in starts]
        positions = torch.cat([part for both in places for part in both])[None]
        return args, {
            **kwargs,
            "position_embeddings": vars(module)["rotary"](kwargs["position_embeddings"][0], positions),
        }

    return hook


MASKS = {
    "mask from the top left": ("_visible", _top_left),
    "one token ahead is seen": ("_visible", _sees_one_ahead),
    "the rejected branch is blind to its prompt": ("_sequences", _keys(_prompt_lost)),
    "the rejected branch loses the prompt's last token": ("_sequences", _keys(_last_of_prompt_lost)),
    "the rejected branch loses the prompt's first token": ("_sequences", _keys(_first_of_prompt_lost)),
    "the rejected branch sees the chosen one": ("_sequences", _keys(_chosen_seen)),
    "the pair before is seen": ("_sequences", _keys(_pair_before_seen, of=0)),
    "no window": ("_visible", _no_window),
    "a window one too long": ("_visible", _window_of(1)),
    "a window one too short": ("_visible", _window_of(-1)),
}
POSITIONS = {
    "positions of the rejected branch one too far": _positions(lambda s: s.prompt + 1),
    "positions of the rejected branch go on from the chosen one": _positions(lambda s: s.prompt + s.chosen),
}
FAULTS = (*MASKS, *POSITIONS)


@contextmanager
def fault_in(name: str, model: Any, layer: int) -> Iterator[None]:
    """The fault of this name in one layer of a model of Llama's shape, while it runs packed."""
    attention = model.model.layers[layer].self_attn
    with pytest.MonkeyPatch.context() as patch:
        if name in POSITIONS:
            kinds = getattr(model.config, "layer_types", None) or [None]
            kind = {"layer_type": kinds[layer]} if isinstance(model, Gemma3ForCausalLM) else {}
            vars(attention)["rotary"] = partial(model.model.rotary_emb, **kind)
            handles = [attention.register_forward_pre_hook(POSITIONS[name], with_kwargs=True)]
        else:
            handles = [
                attention.register_forward_pre_hook(lambda *args: patch.setattr(sequences, *MASKS[name])),
                attention.register_forward_hook(lambda *args: patch.undo()),
            ]
        try:
            yield
        finally:
            vars(attention).pop("rotary", None)
            for handle in handles:
                handle.remove()
