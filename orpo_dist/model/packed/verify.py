"""Compares the packed with the padded layout, for every model before training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.errors import UserError
from orpo_dist.model.loading.vision import is_vision_language
from orpo_dist.model.packed.switch import PackingVerdict
from orpo_dist.model.patches import OBSERVED_STATES, SHORT_WINDOW, add_forward_hook, replace_attribute, undo_all
from orpo_dist.model.upstream import refuses_keyword
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.layout import PackedLayout, PackedLayoutError
from orpo_dist.packing.padded import PaddedCollator

# A wrong layout is off by tenths. Rounding adds up over layers; float32 may be TF32 on a GPU.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_LENGTHS = ((9, 5, 8), (4, 9, 3))  # P, C, R of two pairs: each completion once the longer one, all beyond the window
_WINDOW = 6  # stands in for the model's own window, which a tiny batch would not reach


@dataclass(frozen=True)
class LayoutCheck:
    """difference: root mean square over all tokens of |packed - padded| / |padded|, norms of the last hidden states;
    infinite when the model cannot run the packed row. Not the largest, because in half precision rounding alone may
    send a token of a mixture of experts to another expert.
    tolerance: what rounding explains in the precision of the computation.
    reason: what is wrong, for the log; empty when ok."""

    difference: float
    tolerance: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance  # False for nan


def verify_layout(
    model: nn.Module, verdict: PackingVerdict, *, prefix_sharing: bool, compute_dtype: torch.dtype = torch.float32
) -> LayoutCheck:
    """Run two tiny pairs through a model that `use_packed_layout` has switched, packed and padded, and compare.

    `model` may be wrapped (PEFT, DDP, DeepSpeed, FSDP2); every rank must call it, as each of the two forwards may
    gather weights. No gradients, no dropout; sliding windows are shortened meanwhile so that the batch exercises them.
    compute_dtype: the precision of autocast where the model runs under it; the weights' own coarser one counts too.

    Raises:
        UserError: a vision-language model whose forward needs pixels.
    """
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    rows = _rows(base)
    packed = PackedCollator(prefix_sharing, nll_scope="sequence")(rows)
    padded = PaddedCollator(pad_token_id=0, nll_scope="sequence")(rows)
    del padded["orpo_layout"]
    layout: PackedLayout = packed["orpo_layout"]
    layout.tokens, layout.pairs = layout.counts().float().unbind()  # a loss head inside the forward divides by them
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), short_window(base):
            with verdict.paused():
                padded_states = _own_states(model, base, padded)
            packed_states = last_hidden_states(model, base, packed)[0]
    except PackedLayoutError as error:
        return LayoutCheck(float("inf"), 0.0, str(error))
    except TypeError as error:
        if not refuses_keyword(error, "orpo_layout"):
            raise
        return LayoutCheck(float("inf"), 0.0, str(error))
    finally:
        model.train(was_training)
    tolerance = max(TOLERANCES[compute_dtype], TOLERANCES[padded_states.dtype])
    difference = difference_of_packed(packed_states.double(), padded_states.double(), layout)
    check = LayoutCheck(difference, tolerance)
    if check.ok:
        return check
    reason = f"its packed and padded hidden states differ by {difference:.2g} (rounding explains {tolerance:.2g})"
    return LayoutCheck(difference, tolerance, reason)


def _own_states(model: nn.Module, base: PreTrainedModel, padded: dict[str, Any]) -> torch.Tensor:
    try:
        return last_hidden_states(model, base, padded)
    except TypeError as error:
        if not is_vision_language(base.config):
            raise
        # BLIP-2: missing 1 required positional argument: 'pixel_values'
        raise UserError(
            f"{type(base).__name__} cannot compute pairs without images ({error}). Choose another model."
        ) from error


def ordinary_ids(base: PreTrainedModel) -> torch.Tensor:
    """Token ids that stand for text: no image, end or padding token."""
    config = base.config.get_text_config(decoder=True)
    options = {**base.config.to_dict(), **config.to_dict()}
    special = {value for name, value in options.items() if name.endswith(("token_id", "token_index"))
               and isinstance(value, int)}  # fmt: skip
    return torch.tensor([i for i in range(min(config.vocab_size, 1000)) if i not in special])


def _rows(base: PreTrainedModel) -> list[dict[str, Any]]:
    """Two pairs of ordinary token ids, the same on every rank."""
    ordinary = ordinary_ids(base)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, lengths in enumerate(_LENGTHS):
        ids = ordinary[torch.randint(len(ordinary), (sum(lengths),), generator=generator)]
        prompt, chosen, rejected = (part.tolist() for part in ids.split(lengths))
        rows.append(
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "weight": 1.0, "index": index}
        )
    return rows


def last_hidden_states(model: nn.Module, base: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Taken by a hook: what the whole model returns depends on its head."""
    device = next(base.parameters()).device
    found: list[torch.Tensor] = []
    with add_forward_hook(base.get_decoder(), lambda module, args, output: found.append(output[0]), OBSERVED_STATES):
        model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False)
    return found[0]


def difference_of_packed(packed: torch.Tensor, padded: torch.Tensor, layout: PackedLayout) -> float:
    """packed (T, H) against padded (2B, L, H), chosen rows first, every token of both sequences of each pair."""
    pairs = len(layout.segments)
    errors = []
    for i, s in enumerate(layout.segments):
        for sequence, row, length in (
            (2 * i, i, s.prompt + s.chosen),
            (2 * i + 1, pairs + i, s.prompt + s.rejected),
        ):
            ours, theirs = packed[layout.unshare_index[sequence, :length]], padded[row, :length]
            errors.append((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1))
    return torch.cat(errors).square().mean().sqrt().item()


@contextmanager
def short_window(base: PreTrainedModel) -> Iterator[None]:
    """Within it, sliding windows are short enough for the tiny rows of a check to reach beyond them."""
    holders = [base.config.get_text_config(decoder=True), *base.get_decoder().modules()]
    windowed = [holder for holder in holders if isinstance(vars(holder).get("sliding_window"), int)]
    handles = [replace_attribute(holder, "sliding_window", _WINDOW, SHORT_WINDOW) for holder in windowed]
    try:
        yield
    finally:
        undo_all(handles)
