"""The call of the output layer that returns a loss: its own hooks, adapters and weights, fused_loss as its forward.

The layer must be called as a module: the hooks of ZeRO-3 and FSDP2 gather its weight for the call, and only for it.

Shape legend: N scored rows, H hidden, V vocabulary, r rank of an adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from orpo_dist.loss import Objective
from orpo_dist.model.head.chunked_pass import LogitTransform
from orpo_dist.model.head.chunks import PairRows
from orpo_dist.model.head.fused_loss import Adapter, fused_orpo_loss
from orpo_dist.model.patches import HEAD_CALL, replace_attribute
from orpo_dist.packing.layout import PackedLayout, PackedLayoutError
from orpo_dist.packing.padded import PaddedLayout

PairLayout = PackedLayout | PaddedLayout


@dataclass(frozen=True)
class HeadOptions:
    """chunk_rows: rows whose logits exist at once; None, see fused_loss.default_chunk_rows."""

    objective: Objective
    transform: LogitTransform
    chunk_rows: int | None


def call_head(head: nn.Module, hidden: torch.Tensor, layout: PairLayout, options: HeadOptions) -> torch.Tensor:
    """() loss of the scored rows (N, H), with the weights of `head` and of the adapter in it. Writes `layout.scores`.

    Raises:
        PackedLayoutError: the output layer is of a kind that the fused loss cannot replace.
    """
    if not isinstance(head, ModulesToSaveWrapper | LoraLinear):
        return _call_linear(head, hidden, [], layout, options)
    # peft's layer is entered too: it may be what FSDP2 has sharded, with the last norm, and counts on both calls.
    return _call_with(head, lambda rows: _call_wrapped(head, rows, layout, options), hidden)


def _call_wrapped(
    head: ModulesToSaveWrapper | LoraLinear, hidden: torch.Tensor, layout: PairLayout, options: HeadOptions
) -> torch.Tensor:
    if isinstance(head, ModulesToSaveWrapper):
        copies = head.modules_to_save
        inner = head.original_module if head.disable_adapters else copies[head.active_adapters[0]]
        return call_head(inner, hidden, layout, options)
    names = [] if head.disable_adapters or head.merged else [n for n in head.active_adapters if n in head.lora_A]
    if any(name in head.lora_variant or head.lora_bias[name] for name in names):
        raise PackedLayoutError("the output layer's adapter is not plain LoRA (DoRA, lora_bias).")

    def with_adapters(remaining: list[str], adapters: list[Adapter]) -> torch.Tensor:
        # lora_B is entered like the layer itself: inside its call its weight is gathered, and stays so for the next.
        if not remaining:
            return _call_linear(head.get_base_layer(), hidden, adapters, layout, options)
        name = remaining[0]
        down, up = cast(nn.Linear, head.lora_A[name]), cast(nn.Linear, head.lora_B[name])
        x = head.lora_dropout[name](hidden.to(down.weight.dtype))
        return _call_with(
            up,
            lambda low_rank: with_adapters(remaining[1:], [*adapters, Adapter(low_rank, up.weight)]),
            down(x) * head.scaling[name],
        )

    return with_adapters(names, [])


def _call_linear(
    head: nn.Module, hidden: torch.Tensor, adapters: list[Adapter], layout: PairLayout, options: HeadOptions
) -> torch.Tensor:
    if not isinstance(head, nn.Linear):
        raise PackedLayoutError(f"the output layer is a {type(head).__name__}, not a linear layer or LoRA on one.")

    def fused(rows: torch.Tensor) -> torch.Tensor:
        if not head.weight.is_floating_point():
            raise PackedLayoutError(f"the output layer's weight is quantised ({head.weight.dtype}).")
        result = fused_orpo_loss(
            rows,
            head.weight,
            layout.scored_targets,
            [PairRows(*counts) for counts in layout.scored_counts],
            layout.weight,
            options.objective,
            bias=head.bias,
            adapters=adapters,
            transform=options.transform,
            tokens=layout.tokens,
            pairs=layout.pairs,
            chunk_rows=options.chunk_rows,
            split=layout.split if isinstance(layout, PackedLayout) else None,
        )
        layout.scores = result.scores
        return result.loss

    return _call_with(head, fused, hidden)


def _call_with(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Call `module` with `function` in place of its forward, so that its hooks run."""
    with replace_attribute(module, "forward", function, HEAD_CALL):
        return module(x)
