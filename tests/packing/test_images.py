"""What images mean for positions and attention, by hand. Real models: tests/model/test_vision_families.py."""

import datasets
import pytest
import torch

from orpo_dist.errors import UserError
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.images import (
    CAUSAL,
    IMAGES_BIDIRECTIONAL,
    PROMPT_BIDIRECTIONAL,
    ImageCollator,
    ImageRules,
    MropePositions,
    PromptImages,
    image_counts,
    process_prompts,
    shortest_with_images,
)
from orpo_dist.packing.padded import PaddedCollator

IMAGE = 90  # the image token
ROWS = [
    {"prompt_ids": [IMAGE, IMAGE, 5], "chosen_ids": [7, 2], "rejected_ids": [8, 9, 2], "weight": 1.0, "index": 0},
    {"prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [8], "weight": 1.0, "index": 1},
]
PIXELS = torch.arange(4.0).view(1, 4)
PROMPTS = PromptImages(
    {"pixel_values": PIXELS}, {"token_type_ids": [torch.tensor([1, 1, 0]), torch.tensor([0])]}, [1, 0]
)


class TimesTen:
    """A model class whose positions are ten times the usual ones in the first of three directions."""

    def get_rope_index(self, input_ids, mm_token_type_ids, image_grid_thw):
        assert self.config == "config" and input_ids.shape == mm_token_type_ids.shape
        usual = torch.arange(input_ids.shape[1])
        return torch.stack([10 * usual, usual, usual])[:, None], None


def collated(rules, inner=None, **options):
    inner = inner or PackedCollator(prefix_sharing=True, nll_scope="sequence")
    return ImageCollator(inner, None, rules, **options).collate(ROWS, PROMPTS)


@pytest.mark.parametrize(
    "attention, blocks",
    [(CAUSAL, None), (IMAGES_BIDIRECTIONAL, [0, 0, -1, -1]), (PROMPT_BIDIRECTIONAL, [0, 0, 0, 0])],
)
def test_prompt_tokens_that_see_each_other(attention, blocks):
    layout = collated(ImageRules(attention=attention))["orpo_layout"]
    assert blocks == (None if layout.prompt_blocks is None else layout.prompt_blocks.tolist())


def test_two_images_in_one_prompt_do_not_see_each_other():
    row = {**ROWS[0], "prompt_ids": [IMAGE, IMAGE, 5, IMAGE]}
    prompts = PromptImages({}, {"token_type_ids": [torch.tensor([1, 1, 0, 1])]}, [2])
    inner = PackedCollator(prefix_sharing=True, nll_scope="sequence")
    batch = ImageCollator(inner, None, ImageRules(attention=IMAGES_BIDIRECTIONAL)).collate([row], prompts)
    assert batch["orpo_layout"].prompt_blocks.tolist() == [0, 0, -1, 1]


def test_packed_positions_of_a_rejected_completion_continue_from_the_prompt():
    batch = collated(ImageRules(positions=MropePositions(TimesTen, "config")))
    positions = batch["position_ids"]
    assert positions.shape == (4, 1, 11)  # of the plain layout, then three directions
    #                                       P   P   C   C  ->  R from P on
    assert positions[0, 0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1]
    assert positions[1, 0].tolist() == [0, 10, 20, 30, 40, 30, 40, 50, 0, 10, 10]
    assert torch.equal(batch["pixel_values"], PIXELS)


def test_padded_positions_and_pixels():
    padded = PaddedCollator(0, "sequence")
    batch = collated(ImageRules(positions=MropePositions(TimesTen, "config")), padded)
    assert batch["position_ids"][1].tolist() == [
        [0, 10, 20, 30, 40, 0],
        [0, 10, 0, 0, 0, 0],
        [0, 10, 20, 30, 40, 50],
        [0, 10, 0, 0, 0, 0],
    ]
    assert torch.equal(batch["pixel_values"], PIXELS)
    assert batch["token_type_ids"].tolist() == [[1, 1, 0, 0, 0, 0], [0] * 6] * 2


def test_pixels_twice_go_through_the_processor_twice(monkeypatch):
    """MiniCPM-V's processor puts the patches of all images behind each other in the last dimension."""

    def last(processor, rows):
        types = [torch.ones(len(row["prompt_ids"]), dtype=torch.long) for row in rows]
        return PromptImages({"pixel_values": PIXELS.repeat(1, len(rows))}, {"token_type_ids": types}, [1] * len(rows))

    monkeypatch.setattr("orpo_dist.packing.images.process_prompts", last)
    batch = ImageCollator(PaddedCollator(0, "sequence"), None, ImageRules(), pixels_twice=True)(ROWS)
    assert torch.equal(batch["pixel_values"], PIXELS.repeat(1, 4))
    assert batch["token_type_ids"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]] * 2


def test_the_filler_comes_where_no_row_has_an_image(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "orpo_dist.packing.images.process_prompts",
        lambda processor, rows: seen.append([row["index"] for row in rows]) or PromptImages({}, {}, [0] * len(rows)),
    )
    inner = PackedCollator(prefix_sharing=True, nll_scope="sequence")
    collator = ImageCollator(inner, None, ImageRules(), filler={**ROWS[1], "weight": 0.0, "index": -1})
    collator([{**ROWS[0], "images": ["an image"]}, ROWS[1]])
    collator(ROWS)
    assert seen == [[0, 1], [0, 1, -1]]


def test_a_processor_that_makes_other_tokens_is_refused(monkeypatch):
    monkeypatch.setattr("orpo_dist.images.decode.open_image", lambda image: image)
    row = {**ROWS[0], "images": ["an image"], "prompt_text": "<image>?"}

    def processor(**asked):
        assert asked["text"] == ["<image>?"] and asked["images"] == [["an image"]]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": PIXELS}

    ids = torch.tensor([[IMAGE, IMAGE, 5]])
    made = process_prompts(processor, [ROWS[1], row])
    assert made.counts == [0, 1] and list(made.tensors) == ["pixel_values"]
    ids = torch.tensor([[IMAGE, IMAGE, IMAGE, 5]])
    with pytest.raises(UserError, match="Pair 0: the processor makes 4 tokens of its prompt and images"):
        process_prompts(processor, [ROWS[1], row])


def test_the_shortest_prompt_with_images():
    rows = [
        {**ROWS[1], "images": []},
        {**ROWS[0], "images": ["a"], "index": 5},
        {**ROWS[0], "prompt_ids": [IMAGE, 1, 2, 3], "images": ["b"]},
    ]
    assert shortest_with_images(rows)["index"] == 5
    assert shortest_with_images(ROWS) is None and shortest_with_images(None) is None
    assert shortest_with_images(datasets.Dataset.from_list([{"prompt_ids": [1]}])) is None


def test_a_column_of_images_without_any_image():
    """All None, the column is of Arrow's type null."""
    row = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    for nothing in (None, []):
        rows = datasets.Dataset.from_list([{**row, "images": nothing}] * 2)
        assert image_counts(rows) == [0, 0] and shortest_with_images(rows) is None
