"""The layout of a packed row, past decoder layers that give their attention or mixer no keywords (StableLM, Nemotron,
Jamba).

A layer that drops keywords gets a forward that holds the layout, which it receives itself, while its own forward runs;
attention and mixers that see no keyword look there. The forward that holds it is inside the layer's checkpoint, so a
layer that is recomputed in the backward pass has the layout of its own row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_dist.model.patches import CARRIED_LAYOUT, Patched, replace_attribute
from orpo_dist.model.upstream import CHECKPOINTS_FORWARD, drops_keywords
from orpo_dist.packing.layout import PackedLayout

_CARRIED: ContextVar[PackedLayout | None] = ContextVar("carried layout", default=None)


def carried_layout() -> PackedLayout | None:
    """The layout of the decoder layer that is running, if it is one of those that drop keywords."""
    return _CARRIED.get()


@contextmanager
def carrying(layout: PackedLayout | None) -> Iterator[None]:
    """Within it, `layout` is that of the decoder layer that is running."""
    token = _CARRIED.set(layout)
    try:
        yield
    finally:
        _CARRIED.reset(token)


class LayoutCarrier:
    """A forward for a decoder layer that drops keywords, to be put on and taken off."""

    def __init__(self, block: Any):
        self.block = block

    def put_on(self) -> list[Patched]:
        if "forward" in vars(self.block):  # a compiled block holds the layout itself (model/packed/compile.py)
            return []
        return [replace_attribute(self.block, "forward", self.forward, CARRIED_LAYOUT)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Checkpoints as GradientCheckpointingLayer does, around what holds the layout."""
        if CHECKPOINTS_FORWARD and self.block.gradient_checkpointing and self.block.training:
            return self.block._gradient_checkpointing_func(partial(self._run, **kwargs), *args)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.block).forward
        own_forward = forward.__wrapped__ if CHECKPOINTS_FORWARD else forward
        with carrying(kwargs.get("orpo_layout")):
            return own_forward(self.block, *args, **kwargs)


def layout_carriers(text_model: nn.Module, mixers: Sequence[str]) -> list[LayoutCarrier]:
    """One for each decoder layer that drops the keywords of one of `mixers` (names in the text model)."""
    blocks = {name: module for name, module in text_model.named_modules()
              if isinstance(module, GradientCheckpointingLayer)}  # fmt: skip
    dropping = {}
    for mixer in mixers:
        around = max((name for name in blocks if mixer.startswith(f"{name}.")), key=len, default=None)
        if around is not None and _drops(blocks[around], mixer.removeprefix(f"{around}.").split(".")):
            dropping[around] = blocks[around]
    return [LayoutCarrier(block) for block in dropping.values()]


def _drops(module: nn.Module, path: Sequence[str]) -> bool:
    """Whether a keyword given to `module` is lost on the way to the module at `path` in it."""
    for name in path:
        if drops_keywords(type(module), name):
            return True
        module = module.get_submodule(name)
    return False
