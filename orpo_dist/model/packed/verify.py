"""Compares the packed with the padded layout, for every model before training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.errors import UserError
from orpo_dist.model.loading.vision import is_vision_language
from orpo_dist.model.packed.stations import compare_layouts
from orpo_dist.model.packed.switch import PackingVerdict
from orpo_dist.model.patches import SHORT_WINDOW, replace_attribute, undo_all
from orpo_dist.model.upstream import is_failure_of_peers, is_out_of_memory, text_model_of
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.layout import PackedLayout, PackedLayoutError
from orpo_dist.packing.padded import PaddedCollator

# What a forward raises that cannot compute what it is given.
FAILURES = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, AssertionError, StopIteration)
# P, C, R of pairs: each completion once the longer one, all beyond the window; every length twice (stations.py).
_LENGTHS = ((9, 5, 8), (4, 9, 3)) * 2
_WINDOW = 6  # stands in for the model's own window, which a tiny batch would not reach
_TF32_UNIT = 2.0**-10


@dataclass(frozen=True)
class LayoutCheck:
    """difference: the largest relative difference of a token's state at one layer, beside what rounding explains there
    (model/packed/stations.py); infinite when the model cannot run the packed row.
    tolerance: what rounding explains at that layer, measured.
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
    """Run a few tiny pairs through a model that `use_packed_layout` has switched, packed and padded, and compare them
    layer by layer.

    `model` may be wrapped (PEFT, DDP, DeepSpeed, FSDP2); every rank must call it, as each of the three forwards may
    gather weights. No gradients, no dropout, nothing compiled; sliding windows that the data reaches are shortened
    meanwhile so that the batch exercises them.
    compute_dtype: the precision of autocast where the model runs under it; the weights' own coarser one counts too.

    Raises:
        UserError: a vision-language model whose forward needs pixels.
    """
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    rows = tiny_rows(base)
    packed = PackedCollator(prefix_sharing, nll_scope="sequence")(rows)
    padded = PaddedCollator(pad_token_id=0, nll_scope="sequence")(rows)
    del padded["orpo_layout"]
    layout: PackedLayout = packed["orpo_layout"]
    layout.tokens, layout.pairs = layout.counts().float().unbind()  # a loss head inside the forward divides by them

    def run_padded() -> None:
        with verdict.paused():
            run_own(model, base, padded)

    return layout_check(
        model,
        base,
        lambda: compare_layouts(
            base,
            run_padded,
            lambda: run(model, base, packed),
            layout=layout,
            padded=tuple(padded["input_ids"].shape),
            packed=True,
            unit=rounding_unit(base, compute_dtype),
            amplified=True,
        ),
        max_length=verdict.max_length,
        what="its packed and padded hidden states",
    )


def layout_check(
    model: nn.Module,
    base: PreTrainedModel,
    compare: Callable[[], Any],
    *,
    max_length: int | None,
    what: str,
) -> LayoutCheck:
    """`compare` as a check: without gradients, dropout, compiled code or windows longer than its rows.

    An error of the model's code is a reason not to use the layout: with an unknown family anything may fail on it. A
    full memory or a lost rank says nothing about the layout and is raised.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), short_window(base, max_length):
            found = compare()
    except PackedLayoutError as error:
        return LayoutCheck(float("inf"), 0.0, str(error).removesuffix("."))
    except UserError:
        raise
    except FAILURES as error:
        if is_out_of_memory(error) or is_failure_of_peers(error):
            raise
        return LayoutCheck(float("inf"), 0.0, f"{type(error).__name__}: {error}")
    finally:
        model.train(was_training)
    check = LayoutCheck(found.difference, found.tolerance)
    if check.ok:
        return check
    reason = f"{what} differ by {found.difference:.2g} at {found.worst} (rounding explains {found.tolerance:.2g})"
    return LayoutCheck(found.difference, found.tolerance, reason)


def rounding_unit(base: PreTrainedModel, compute_dtype: torch.dtype) -> float:
    """Relative unit of rounding: of the coarser of autocast's precision and the weights' own."""
    unit = max(torch.finfo(compute_dtype).eps, torch.finfo(base.dtype).eps)
    on_cuda = next(base.parameters()).device.type == "cuda"
    return max(unit, _TF32_UNIT) if on_cuda and torch.get_float32_matmul_precision() != "highest" else unit


def run_own(model: nn.Module, base: PreTrainedModel, padded: dict[str, Any]) -> None:
    """Run padded rows of text.

    Raises:
        UserError: a vision-language model whose forward needs pixels.
    """
    try:
        run(model, base, padded)
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


def tiny_rows(base: PreTrainedModel) -> list[dict[str, Any]]:
    """Pairs of ordinary token ids, the same on every rank, and once more the same pairs."""
    ordinary = ordinary_ids(base)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, lengths in enumerate(_LENGTHS):
        ids = ordinary[torch.randint(len(ordinary), (sum(lengths),), generator=generator)]
        prompt, chosen, rejected = (part.tolist() for part in ids.split(lengths))
        rows.append(
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "weight": 1.0, "index": index}
        )
    return [*rows, *({**row, "index": len(rows) + row["index"]} for row in rows)]


def run(model: nn.Module, base: PreTrainedModel, batch: dict[str, Any]) -> None:
    device = next(base.parameters()).device
    model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False)


@contextmanager
def short_window(base: PreTrainedModel, max_length: int | None) -> Iterator[None]:
    """Within it, sliding windows are short enough for the tiny rows of a check to reach beyond them. Not those that no
    sequence of the data reaches: some models have one in their config and apply it nowhere but in their masks."""
    holders = [base.config.get_text_config(decoder=True), *text_model_of(base).modules()]
    windowed = [
        holder
        for holder in holders
        if isinstance(window := vars(holder).get("sliding_window"), int) and (max_length is None or window < max_length)
    ]
    handles = [replace_attribute(holder, "sliding_window", _WINDOW, SHORT_WINDOW) for holder in windowed]
    try:
        yield
    finally:
        undo_all(handles)
