"""Pairs with images: the pixels of each prompt once, and the effect of image tokens on positions and attention.

An `ImageCollator` wraps the collator of either layout. `prompt_ids` already contains the image tokens; the collator
adds the processor's image tensors, under their names in the model's forward.

Shape legend: B pairs, T tokens of a packed row, L length of the longest padded row, P tokens of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from orpo_dist.errors import UserError
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.layout import PackedLayout
from orpo_dist.packing.lengths import pair_lengths
from orpo_dist.packing.padded import PaddedCollator

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # the processors' names for the kind of every token
_OF_THE_TEXT = {"input_ids", "attention_mask", "labels", *TOKEN_TYPES}
CAUSAL, IMAGES_BIDIRECTIONAL, PROMPT_BIDIRECTIONAL = "causal", "images", "prompt"


@dataclass(frozen=True)
class MropePositions:
    """Positions of a model whose image tokens have rows and columns (M-RoPE), from its `get_rope_index`.

    model_class: the class with that method, which reads only the config of a model.
    """

    model_class: type
    config: Any

    def __call__(self, token_types: torch.Tensor, grids: torch.Tensor | None) -> torch.Tensor:
        """(3, L) for token_types (L,), 1 on image tokens, and grids (images, 3)."""
        view: Any = object.__new__(self.model_class)
        object.__setattr__(view, "config", self.config)
        positions, _ = view.get_rope_index(
            torch.zeros_like(token_types)[None], mm_token_type_ids=token_types[None], image_grid_thw=grids
        )
        return positions[:, 0]


@dataclass(frozen=True)
class ImageRules:
    """Properties of a vision-language model that its collator needs.

    positions: None if tokens are numbered consecutively.
    attention: what a token attends to besides earlier tokens: CAUSAL nothing, IMAGES_BIDIRECTIONAL the tokens of the
        same image (Gemma 3), PROMPT_BIDIRECTIONAL the whole prompt (PaliGemma).
    """

    positions: MropePositions | None = None
    attention: str = CAUSAL


def shortest_with_images(rows: Any) -> dict[str, Any] | None:
    """The row with the shortest prompt among those with images; None if there is none.

    rows: a list of tokenised rows or a datasets.Dataset of them, or None.
    """
    counts = image_counts(rows)
    if not any(counts):
        return None
    lengths = pair_lengths(rows)
    return rows[min((i for i, count in enumerate(counts) if count), key=lambda i: lengths[i].prompt)]


def image_counts(rows: Any) -> list[int]:
    """Images of each row, from Arrow's offsets where `rows` is a datasets.Dataset: no image is read."""
    if rows is None:
        return []
    if isinstance(rows, list):
        return [len(row.get("images") or ()) for row in rows]
    if "images" not in rows.column_names:
        return [0] * len(rows)
    counts: list[int] = []
    for batch in rows.select_columns(["images"]).with_format("arrow").iter(10_000):
        images = batch["images"].combine_chunks()
        if images.null_count == len(images):  # of type null, which has no lengths, if no row of the data has any
            counts += [0] * len(images)
        else:
            counts += [count or 0 for count in images.value_lengths().to_pylist()]
    return counts


@dataclass(frozen=True)
class PromptImages:
    """What a processor made of the prompts of a micro-batch.

    tensors: of the images, in the order of the rows. token_types: by name, one (P,) tensor per row. counts: images of
    each row.
    """

    tensors: dict[str, torch.Tensor]
    token_types: dict[str, list[torch.Tensor]]
    counts: list[int]


def process_prompts(processor: Any, rows: Sequence[dict[str, Any]]) -> PromptImages:
    """Run the processor once over the prompts that have images.

    Raises:
        UserError: an image cannot be read any more, or the processor makes other tokens of a prompt than the data step
            did (another version or other options of the processor).
    """
    from orpo_dist.errors import BadRow
    from orpo_dist.images.decode import open_image

    def opened(row: dict[str, Any]) -> list[Any]:
        try:
            return [open_image(image) for image in row["images"]]
        except BadRow as bad:
            raise UserError(
                f"Pair {row['index']}: {bad.kind}: {bad.reason}. It could be read when data was prepared."
            ) from bad

    counts = [len(row.get("images") or ()) for row in rows]
    illustrated = [row for row, count in zip(rows, counts, strict=True) if count]
    if not illustrated:
        return PromptImages({}, {}, counts)
    made = processor(
        text=[row["prompt_text"] for row in illustrated],
        images=[opened(row) for row in illustrated],
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,  # BOS is in the text, or the data step has put it there
    )
    masks = made["attention_mask"].bool()
    places = [_places(row) for row in illustrated]
    for row, ids, mask, place in zip(illustrated, made["input_ids"], masks, places, strict=True):
        written, processed = torch.tensor(row["prompt_ids"]), ids[mask]
        if place is not None:
            written, place = written[place >= 0], place[place >= 0]
            processed = processed[place] if int(place.max()) < len(processed) else processed
        if not torch.equal(written, processed):
            raise UserError(
                f"Pair {row['index']}: the processor makes {int(mask.sum())} tokens of its prompt and images, and the "
                f"data set holds {len(row['prompt_ids'])} others. Tokenise the rows with the processor that is "
                "trained with, and with the same options."
            )
    token_types = {}
    for name in TOKEN_TYPES:
        if name in made:
            found = iter(
                types[mask] if place is None else F.pad(types[mask], (0, 1))[place]  # ADDED is -1, the padding's place
                for types, mask, place in zip(made[name], masks, places, strict=True)
            )
            token_types[name] = [
                next(found) if count else torch.zeros(len(row["prompt_ids"]), dtype=torch.long)
                for row, count in zip(rows, counts, strict=True)
            ]
    return PromptImages({name: made[name] for name in made if name not in _OF_THE_TEXT}, token_types, counts)


def _places(row: dict[str, Any]) -> torch.Tensor | None:
    """Which of the processor's tokens the prompt keeps, where it keeps not all of them: `prompt_places` of the row."""
    return torch.tensor(row["prompt_places"]) if row.get("prompt_places") else None


@dataclass(frozen=True)
class ImageCollator:
    """Rows of token ids with `images` and `prompt_text` to a batch of either layout with the images' tensors.

    One pair, prompt `<image>` of 2 tokens and `?`, packed:

        {"prompt_ids": [90, 90, 5], "chosen_ids": [7, 2], "rejected_ids": [8, 2], "images": [...], ...}

        input_ids      [[90, 90, 5, 7, 2, 8, 2]]
        position_ids   of the plain layout, or (4, 1, T): those, then temporal, height and width from get_rope_index on
                       [P C], where the rejected completion takes the slice that starts at P
        pixel_values, image_grid_thw, ...   of one prompt, though two completions follow it

    inner: the collator of the layout. A packed one shares the prompt: two copies of it would need two of its features.
    filler: a pair of weight zero with one small image, appended where no row has an image. With partitioned weights or
        a trained tower every rank must run the tower, or the collectives of the others wait for it.
    pixels_twice: give a padded batch everything twice, as the model itself expects it, instead of leaving it to
        `model.vision.features_for_both` to use the features of the chosen rows for the rejected ones again.

    Raises:
        UserError: as `process_prompts`.
    """

    inner: PackedCollator | PaddedCollator
    processor: Any
    rules: ImageRules
    filler: dict[str, Any] | None = None
    pixels_twice: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.filler is not None and not any(row.get("images") for row in rows):
            rows = [*rows, self.filler]
        # A processor need not put the images of all rows one behind the other in the first dimension (MiniCPM-V).
        prompts = process_prompts(self.processor, [*rows, *rows] if self.pixels_twice else rows)
        return self.collate(rows, prompts)

    def collate(self, rows: Sequence[dict[str, Any]], prompts: PromptImages) -> dict[str, Any]:
        """The batch of rows whose prompts have been through the processor, twice with `pixels_twice`."""
        batch = self.inner(rows)
        if isinstance(batch["orpo_layout"], PackedLayout):
            self._finish_packed(batch, rows, prompts)
        else:
            self._finish_padded(batch, rows, prompts)
        return batch

    def _finish_packed(self, batch: dict[str, Any], rows: Sequence[dict], prompts: PromptImages) -> None:
        layout: PackedLayout = batch["orpo_layout"]
        batch |= prompts.tensors
        if self.rules.positions is not None:
            parts = []
            for s, positions in zip(layout.segments, self._mrope(rows, prompts), strict=True):
                parts += [positions[:, : s.prompt + s.chosen], positions[:, s.prompt : s.prompt + s.rejected]]
            batch["position_ids"] = torch.cat([batch["position_ids"], torch.cat(parts, 1)])[:, None]
        blocks = self._blocks(rows, prompts)
        if blocks is not None:
            layout.prompt_blocks = torch.cat(blocks)

    def _finish_padded(self, batch: dict[str, Any], rows: Sequence[dict], prompts: PromptImages) -> None:
        length = batch["input_ids"].shape[1]
        prefix = self.rules.attention == PROMPT_BIDIRECTIONAL
        token_types = dict(prompts.token_types)
        if prefix and not token_types:
            token_types["token_type_ids"] = [torch.zeros(len(row["prompt_ids"]), dtype=torch.long) for row in rows]
        for name, types in token_types.items():
            rows_of_types = [F.pad(kind, (0, length - len(kind)), value=int(prefix)) for kind in types[: len(rows)]]
            batch[name] = torch.stack(rows_of_types * 2)
        batch |= prompts.tensors
        if self.rules.positions is not None and not self.pixels_twice:
            texts = torch.arange(length).expand(1, 2 * len(rows), length)
            images = torch.zeros(3, 2 * len(rows), length, dtype=torch.long)
            for i, positions in enumerate(self._mrope(rows, prompts)):
                for side, row in (("chosen_ids", i), ("rejected_ids", len(rows) + i)):
                    tokens = len(rows[i]["prompt_ids"]) + len(rows[i][side])
                    images[:, row, :tokens] = positions[:, :tokens]
            batch["position_ids"] = torch.cat([texts, images])

    def _mrope(self, rows: Sequence[dict], prompts: PromptImages) -> list[torch.Tensor]:
        """Per pair (3, P + the longer completion)."""
        assert self.rules.positions is not None
        types = prompts.token_types.get("mm_token_type_ids")
        all_grids = prompts.tensors.get("image_grid_thw")
        grids = all_grids.split(prompts.counts) if all_grids is not None else [None] * len(rows)
        found = []
        for i, row in enumerate(rows):
            prompt = types[i] if types is not None else torch.zeros(len(row["prompt_ids"]), dtype=torch.long)
            longer = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            of_row = grids[i] if prompts.counts[i] else None
            found.append(self.rules.positions(F.pad(prompt.long(), (0, longer)), of_row))
        return found

    def _blocks(self, rows: Sequence[dict], prompts: PromptImages) -> list[torch.Tensor] | None:
        """Per pair (P,): tokens of the same number see each other; -1 where attention is causal."""
        if self.rules.attention == PROMPT_BIDIRECTIONAL:
            return [torch.zeros(len(row["prompt_ids"]), dtype=torch.long) for row in rows]
        if self.rules.attention == CAUSAL or not prompts.token_types:
            return None
        (types,) = prompts.token_types.values()
        return [_numbered_runs(kind == 1) for kind in types]


def _numbered_runs(inside: torch.Tensor) -> torch.Tensor:
    """[0 1 1 0 1] to [-1 0 0 -1 1]: runs of True by number."""
    starts = inside & ~F.pad(inside, (1, 0))[:-1]
    return torch.where(inside, starts.long().cumsum(0) - 1, -1)
