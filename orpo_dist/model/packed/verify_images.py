"""Compares a layout with the model's own forward on images, for every vision-language model at start-up."""

import io
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_dist.errors import UserError
from orpo_dist.model.loading.vision import features_for_both
from orpo_dist.model.packed.stations import Comparison, compare_layouts
from orpo_dist.model.packed.switch import PackingVerdict
from orpo_dist.model.packed.verify import FAILURES, LayoutCheck, layout_check, ordinary_ids, rounding_unit, run
from orpo_dist.model.upstream import is_failure_of_peers, is_out_of_memory
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.images import ImageCollator
from orpo_dist.packing.padded import PaddedCollator

_SIZES = ((40, 24), (24, 56), (32, 32), (64, 24))  # width, height of the drawn images, in turn


def drawn_row(example: dict[str, Any], processor: Any, first: int = 0, again: int = 0) -> dict[str, Any]:
    """The prompt of a row of the data set with small drawn images in place of its own, or the row's own where the
    processor refuses drawings. No completions yet.

    first: which sizes and drawings. again: other drawings of those sizes."""
    from orpo_dist.images.decode import open_image

    if processor.image_processor.do_resize is False:  # its images must have the size that they have
        sizes = [open_image(stored).size for stored in example["images"]]
    else:
        sizes = [_SIZES[(first + i) % len(_SIZES)] for i in range(len(example["images"]))]
    images = [_drawing(*size, first + i + 3 * again) for i, size in enumerate(sizes)]
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
    padded batch, and compare them layer by layer. Where the layout is that forward, it is only run.

    example: a row of the data set that has images; its prompt says where they stand. verdict: of the packed layout,
    None where the layout is padded. Every rank must call it.

    Raises:
        UserError: the model's own forward cannot compute such pairs.
    """
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    rows = image_rows(base, collator.processor, example)
    reference = _padded(collator, rows)
    batch = replace(collator, filler=None)(rows)
    layout = PackedCollator(prefix_sharing=True, nll_scope="sequence")(rows)["orpo_layout"]
    del reference["orpo_layout"]
    if verdict is not None:
        layout = batch["orpo_layout"].split_over(None)  # the exchange between ranks: verify_slices.py
        layout.tokens, layout.pairs = layout.counts().float().unbind()
    else:
        del batch["orpo_layout"]

    def run_reference() -> None:
        with nullcontext() if verdict is None else verdict.paused():
            _run_own(model, base, reference)

    def run_ours() -> None:
        with features_for_both(base) if verdict is None else nullcontext():
            run(model, base, batch)

    def compare() -> Comparison:
        if verdict is None and collator.pixels_twice:
            run_reference()
            return Comparison("", 0.0, 0.0)
        return compare_layouts(
            base,
            run_reference,
            run_ours,
            layout=layout,
            padded=tuple(reference["input_ids"].shape),
            packed=verdict is not None,
            unit=rounding_unit(base, compute_dtype),
            amplified=False,
        )

    return layout_check(
        model,
        base,
        compare,
        max_length=None if verdict is None else verdict.max_length,
        what="with images its hidden states",
    )


def tiny_image_batch(base: PreTrainedModel, collator: ImageCollator, example: dict[str, Any]) -> dict[str, Any]:
    """Padded pairs with and without images, as the model itself takes them."""
    return _padded(collator, image_rows(base, collator.processor, example))


def _padded(collator: ImageCollator, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pads = PaddedCollator(pad_token_id=0, nll_scope="sequence")
    return replace(collator, inner=pads, filler=None, pixels_twice=True)(rows)


def _run_own(model: nn.Module, base: PreTrainedModel, batch: dict[str, Any]) -> None:
    try:
        run(model, base, batch)
    except FAILURES as error:
        if is_out_of_memory(error) or is_failure_of_peers(error):
            raise
        raise UserError(
            f"{type(base).__name__} cannot compute pairs with and without images in one batch "
            f"({type(error).__name__}: {error}). Choose another vision-language model, or set image_column='' to train "
            "on the text alone."
        ) from error


def image_rows(base: PreTrainedModel, processor: Any, example: dict[str, Any]) -> list[dict[str, Any]]:
    """Pairs with images of unequal size around one without, completions of unequal length; once more with other
    drawings and tokens, see model/packed/stations.py."""
    ordinary = ordinary_ids(base)
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return ordinary[torch.randint(len(ordinary), (count,), generator=generator)].tolist()

    rows: list[dict[str, Any]] = []
    for again in (0, 1):
        prompts: Sequence[dict[str, Any]] = (
            drawn_row(example, processor, again=again),
            {"prompt_ids": ids(7), "images": [], "prompt_text": ""},
            drawn_row(example, processor, first=1, again=again),
        )
        rows += [
            {**prompt, "chosen_ids": ids(3 + i), "rejected_ids": ids(6 - i), "weight": 1.0, "index": len(rows) + i}
            for i, prompt in enumerate(prompts)
        ]
    return rows


def _drawing(width: int, height: int, number: int) -> Any:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), (40 * number % 256, 90, 160))
    ImageDraw.Draw(image).ellipse((2, 2, width // 2 + number, height - 4), fill=(250, 200 - 30 * number % 200, 20))
    return image


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
