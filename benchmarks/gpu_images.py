"""Pairs with images for the parts of gpu.py: a Qwen2.5-VL, and random pixels in the form that its tower takes.

No image processor is needed (it would require Pillow and torchvision), and none is measured. An image of n x n patches
makes n * n / 4 tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.gpu_harness import OURS, PADDED, Setting, Trainer, bare, rows_of, trainable
from benchmarks.vision import WORDS, completion_lengths
from orpo_dist.model.loading.vision import features_for_both, image_rules
from orpo_dist.packing.images import ImageCollator, PromptImages
from orpo_dist.packing.lengths import PairLengths

# Shape of https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct; the weights are random.
TEXT: dict[str, Any] = dict(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
)
TOWER: dict[str, Any] = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
IDS = dict(vision_start_token_id=151652, vision_end_token_id=151653, image_token_id=151655, video_token_id=151656)
TINY_TEXT: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
)
TINY_TOWER: dict[str, Any] = dict(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1]
)
TINY_IDS = dict(vision_start_token_id=508, vision_end_token_id=509, image_token_id=510, video_token_id=511)


def build_image_model(setting: Setting) -> nn.Module:
    """With LoRA on the language model; the tower is frozen."""
    text, tower, ids = (TEXT | TINY_TEXT, TOWER | TINY_TOWER, TINY_IDS) if setting.tiny else (TEXT, TOWER, IDS)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids, dtype=setting.dtype)
    return trainable(setting, lambda: Qwen2_5_VLForConditionalGeneration._from_config(config), lora=True)


def image_pairs(setting: Setting, model: nn.Module, count: int) -> tuple[list[PairLengths], list[dict[str, Any]]]:
    """Pairs with the shares of image, question and completions that benchmarks/vision.py has."""
    side = 24 if setting.tiny else 48  # patches: images of 336 and 672 pixels
    lengths = [PairLengths(WORDS, *completion_lengths(side * side // 4))] * count
    config = bare(model).config
    rows = with_images(rows_of(lengths, config.vision_start_token_id), config, side)
    return [replace(pair, prompt=len(row["prompt_ids"])) for pair, row in zip(lengths, rows, strict=True)], rows


def with_images(rows: Sequence[dict[str, Any]], config: PreTrainedConfig, side: int) -> list[dict[str, Any]]:
    """The rows with an image before each prompt. `pixels`: (side * side, numbers of a patch), noise."""
    tower = config.vision_config
    merged = side * side // tower.spatial_merge_size**2
    of_patch = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    image = [config.vision_start_token_id, *[config.image_token_id] * merged, config.vision_end_token_id]
    generator = torch.Generator().manual_seed(0)
    return [
        {
            **row,
            "prompt_ids": image + row["prompt_ids"],
            "pixels": torch.randn(side * side, of_patch, generator=generator),
            "grid": torch.tensor([[1, side, side]]),
        }
        for row in rows
    ]


@dataclass(frozen=True)
class DrawnImages:
    """Collator for rows from `with_images`: an ImageCollator without its processor."""

    inner: ImageCollator
    image_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        prompts = [*rows, *rows] if self.inner.pixels_twice else rows
        tensors = {
            "pixel_values": torch.cat([row["pixels"] for row in prompts]),
            "image_grid_thw": torch.cat([row["grid"] for row in prompts]),
        }
        types = [(torch.tensor(row["prompt_ids"]) == self.image_token_id).long() for row in prompts]
        return self.inner.collate(rows, PromptImages(tensors, {"mm_token_type_ids": types}, [1] * len(prompts)))


def image_trainers(model: nn.Module) -> tuple[Trainer, Trainer, Trainer]:
    """Packed; padded; and padded as the model does it natively: every image twice, with the model's own positions."""
    base = bare(model)
    rules = image_rules(base)

    def collator(trainer: Trainer, pixels_twice: bool = False) -> DrawnImages:
        inner = ImageCollator(trainer.collate, None, rules, pixels_twice=pixels_twice)  # type: ignore[arg-type]
        return DrawnImages(inner, base.config.image_token_id)

    def padded_loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        with features_for_both(bare(model)):
            return PADDED.loss(model, batch)

    return (
        replace(OURS, collate=collator(OURS), note="packed; MFU counts no tower"),
        replace(PADDED, collate=collator(PADDED), loss=padded_loss, note="the tower once per pair"),
        replace(PADDED, name="duplicated", collate=collator(PADDED, True), note="TRL's layout, the tower twice"),
    )
