"""Compares a layout with the model's own forward on images, for every vision-language model at start-up."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.errors import UserError
from orpo_dist.model.loading.vision import features_for_both
from orpo_dist.model.packed.switch import PackingVerdict
from orpo_dist.model.packed.verify import (
    TOLERANCES,
    LayoutCheck,
    difference_of_packed,
    last_hidden_states,
    ordinary_ids,
    short_window,
)
from orpo_dist.packing.images import ImageCollator
from orpo_dist.packing.layout import PackedLayoutError
from orpo_dist.packing.padded import PaddedCollator

# What a forward raises that cannot compute what it is given.
_FAILURES = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, AssertionError)
_SIZES = ((40, 24), (24, 56), (32, 32), (64, 24))  # width, height of the drawn images, in turn


def drawn_row(example: dict[str, Any], processor: Any, first: int = 0) -> dict[str, Any]:
    """The prompt of a row of the data set with small drawn images in place of its own, or the row's own where the
    processor refuses drawings. No completions yet."""
    from orpo_dist.images.decode import open_image

    if processor.image_processor.do_resize is False:  # its images must have the size that they have
        sizes = [open_image(stored).size for stored in example["images"]]
    else:
        sizes = [_SIZES[(first + i) % len(_SIZES)] for i in range(len(example["images"]))]
    images = [_drawing(*size, first + i) for i, size in enumerate(sizes)]
    try:
        made = processor(text=[example["prompt_text"]], images=[images], add_special_tokens=False, return_tensors="pt")
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError):  # too small or too narrow for it
        own = ("prompt_ids", "images", "prompt_text", "prompt_places")
        return {name: example[name] for name in own if name in example}
    return {
        "prompt_ids": list(map(int, made["input_ids"][0])),
        "images": [{"bytes": _png(image), "path": None} for image in images],
        "prompt_text": example["prompt_text"],
    }


def verify_images(
    model: nn.Module,
    collator: ImageCollator,
    example: dict[str, Any],
    verdict: PackingVerdict | None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> LayoutCheck:
    """Run tiny pairs with and without images through `collator`'s layout and through the model's own forward of a
    padded batch, and compare the last hidden states. Where the layout is that forward, it is only run.

    example: a row of the data set that has images; its prompt says where they stand. verdict: of the packed layout,
    None where the layout is padded. Every rank must call it.

    Raises:
        UserError: the model's own forward cannot compute such pairs.
    """
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    rows = _rows(base, collator.processor, example)
    pads = PaddedCollator(pad_token_id=0, nll_scope="sequence")
    reference = replace(collator, inner=pads, filler=None, pixels_twice=True)(rows)
    batch = replace(collator, filler=None)(rows)
    mask, layout = reference["attention_mask"], batch["orpo_layout"]
    del reference["orpo_layout"]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), short_window(base):
            if verdict is not None:
                layout.tokens, layout.pairs = layout.counts().float().unbind()
                states = last_hidden_states(model, base, batch)[0]
                with verdict.paused():
                    expected = _own_states(model, base, reference)
            else:
                expected = _own_states(model, base, reference)
                if collator.pixels_twice:
                    return LayoutCheck(0.0, 0.0)
                del batch["orpo_layout"]
                with features_for_both(base):
                    states = last_hidden_states(model, base, batch)
    except UserError:
        raise
    except (PackedLayoutError, *_FAILURES) as error:
        # With an unknown family anything may fail on the layout's path; the run then falls back to the model's own.
        return LayoutCheck(float("inf"), 0.0, f"{type(error).__name__} with images: {error}")
    finally:
        model.train(was_training)
    if expected.shape[:2] != mask.shape:  # Llama 4: get_decoder() is a model with a head of its own
        raise UserError(
            f"{type(base).__name__}: the hidden states of its text model cannot be read, so no layout can be checked. "
            "Choose another vision-language model, or set image_column='' to train on the text alone."
        )
    tolerance = max(TOLERANCES[compute_dtype], TOLERANCES[expected.dtype])
    if verdict is not None:
        difference = difference_of_packed(states.double(), expected.double(), layout)
    else:
        seen = mask.bool().to(states.device)
        ours, theirs = states[seen].double(), expected[seen].double()
        difference = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).square().mean().sqrt().item()
    reason = f"with images its hidden states differ by {difference:.2g} (rounding explains {tolerance:.2g})"
    check = LayoutCheck(difference, tolerance)
    return check if check.ok else replace(check, reason=reason)


def _own_states(model: nn.Module, base: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    try:
        return last_hidden_states(model, base, batch)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        raise UserError(
            f"{type(base).__name__} cannot compute pairs with and without images in one batch "
            f"({type(error).__name__}: {error}). Choose another vision-language model, or set image_column='' to train "
            "on the text alone."
        ) from error


def _rows(base: PreTrainedModel, processor: Any, example: dict[str, Any]) -> list[dict[str, Any]]:
    """Pairs with images of unequal size around one without, completions of unequal length."""
    ordinary = ordinary_ids(base)
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return ordinary[torch.randint(len(ordinary), (count,), generator=generator)].tolist()

    prompts: Sequence[dict[str, Any]] = (
        drawn_row(example, processor),
        {"prompt_ids": ids(7), "images": [], "prompt_text": ""},
        drawn_row(example, processor, first=1),
    )
    return [
        {**prompt, "chosen_ids": ids(3 + index), "rejected_ids": ids(6 - index), "weight": 1.0, "index": index}
        for index, prompt in enumerate(prompts)
    ]


def _drawing(width: int, height: int, number: int) -> Any:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), (40 * number % 256, 90, 160))
    ImageDraw.Draw(image).ellipse((2, 2, width // 2 + number, height - 4), fill=(250, 200 - 30 * number % 200, 20))
    return image


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
