"""Token mixers: the modules in which tokens interact, and how each supports the packed layout.

Everything else in a decoder works token by token and needs no change. A mixer that calls transformers' attention
interface gets the packed attention; any other one (linear attention, Mamba, short convolutions, something unknown) is
run on unshared rows: its input is copied out to [P C] and [P R] rows, and P, C and R of its output are put back.

Shape legend: T tokens of the packed row, S = 2B causal sequences, L the longest of them.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orpo_dist.model.packed.carried import carried_layout
from orpo_dist.model.patches import LAYOUT_SEEN, UNSHARED_MIXER, Patched, add_forward_hook, add_forward_pre_hook
from orpo_dist.model.upstream import uses_attention_interface
from orpo_dist.packing.exchange import gather_row
from orpo_dist.packing.layout import PackedLayout, PackedLayoutError

# A module that can keep state between decoding steps mixes tokens; these are the names that transformers gives it.
_CACHE_ARGUMENTS = frozenset({"past_key_values", "past_key_value", "layer_past", "cache_params"})


@dataclass(frozen=True)
class TokenMixer:
    """name: of the module in the text model. uses_interface: it calls transformers' attention interface.
    inner: name of another mixer inside it, if there is one."""

    name: str
    module: nn.Module
    uses_interface: bool
    inner: str | None = None


def find_token_mixers(text_model: nn.Module) -> list[TokenMixer]:
    """The mixers of a decoder: its innermost modules that take a cache, and attention that holds another such one."""
    caching = {name: module for name, module in text_model.named_modules() if name and _takes_cache(module)}
    mixers = []
    for name, module in caching.items():
        inner = next((other for other in caching if other.startswith(f"{name}.")), None)
        uses_interface = uses_attention_interface(type(module))
        if inner is None or uses_interface:
            mixers.append(TokenMixer(name, module, uses_interface, inner))
    return mixers


def _takes_cache(module: nn.Module) -> bool:
    return not _CACHE_ARGUMENTS.isdisjoint(inspect.signature(type(module).forward).parameters)


class Unsharing:
    """Hooks that run one mixer on unshared rows while its model is given a packed layout; without one they do nothing.

    No mask is needed: what fills a row beyond its sequence's end comes after all that is read. The hooks belong to the
    mixer, so they run again when gradient checkpointing recomputes the layer, with the layout that the recomputed call
    was given.
    """

    def __init__(self, mixer: TokenMixer, row: "PackedRow"):
        self.name, self.row = f"{mixer.name} ({type(mixer.module).__name__})", row
        self.layout: PackedLayout | None = None
        self._module = mixer.module

    def put_on(self) -> list[Patched]:
        return [
            add_forward_pre_hook(self._module, self._before, UNSHARED_MIXER),
            add_forward_hook(self._module, self._after, UNSHARED_MIXER),
        ]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        layout = kwargs.pop("orpo_layout", None)
        self.layout = layout = carried_layout() if layout is None else layout
        if layout is None:
            if self.row.packed:
                raise PackedLayoutError(f"{self.name} receives no layout: its decoder layer passes no keywords on.")
            return args, kwargs
        layout.reached = True
        return _map(args, layout, _unshare), _map(kwargs, layout, _unshare)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return output if self.layout is None else _map(output, self.layout, _reshare)


class PackedRow:
    """Whether the text model's current forward was given a packed row: a mixer that sees no layout then must fail."""

    def __init__(self, text_model: nn.Module):
        self.packed = False
        self._text_model = text_model

    def put_on(self) -> list[Patched]:
        return [add_forward_pre_hook(self._text_model, self._note, LAYOUT_SEEN)]

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.packed = kwargs.get("orpo_layout") is not None


def _map(value: Any, layout: PackedLayout, change: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value, layout)
    if isinstance(value, dict):
        return {name: _map(item, layout, change) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_map(item, layout, change) for item in value)
    return value


def _unshare(tensor: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """(1, T, ...) to (S, L, ...), a slice (1, w, ...) after the row is gathered; other tensors as they are."""
    if layout.split is not None and tensor.shape[:2] == (1, layout.split.width):
        tensor = gather_row(tensor, layout.split)
    if tensor.shape[:2] != (1, layout.length):
        return tensor
    sequences, longest = layout.unshare_index.shape
    return tensor[0].index_select(0, layout.unshare_index.flatten()).unflatten(0, (sequences, longest))


def _reshare(tensor: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """(S, L, ...) to (1, T, ...), or to this rank's slice; other tensors as they are."""
    if tensor.shape[:2] != layout.unshare_index.shape:
        return tensor
    row = tensor.flatten(0, 1).index_select(0, layout.reshare_index)[None]
    return row if layout.split is None else layout.split.cut(row, 1)
