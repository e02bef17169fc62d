"""A world of drawn images for a tiny model: one to three shapes of one kind and colour, and what they are in words."""

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import transformers as t
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.model.tiny_vlms import stored

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 230), "yellow": (230, 220, 40)}
SHAPES = ("circles", "squares", "triangles")
COUNTS = ("one", "two", "three")
SIDE, CELL = 32, 16
QUESTION = "what is drawn ?"


@dataclass(frozen=True)
class Scene:
    count: str
    colour: str
    shape: str

    @property
    def words(self) -> str:
        return f"{self.count} {self.colour} {self.shape}"


SCENES = [Scene(*parts) for parts in product(COUNTS, COLOURS, SHAPES)]
# Every colour, shape and count is seen in training, these combinations of the three never.
UNSEEN = [
    scene
    for scene in SCENES
    if (COUNTS.index(scene.count) + list(COLOURS).index(scene.colour) + SHAPES.index(scene.shape)) % 3 == 0
]
SEEN = [scene for scene in SCENES if scene not in UNSEEN]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The shapes in cells of their own, shaken and sized at random, on a background of random grey."""
    grey = rng.randint(0, 60)
    image = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
    pen = ImageDraw.Draw(image)
    for cell in rng.sample(range(4), COUNTS.index(scene.count) + 1):
        size = rng.randint(10, 13)
        left = cell % 2 * CELL + rng.randint(0, CELL - size)
        top = cell // 2 * CELL + rng.randint(0, CELL - size)
        right, bottom = left + size, top + size
        fill = tuple(min(255, max(0, part + rng.randint(-20, 20))) for part in COLOURS[scene.colour])
        if scene.shape == "circles":
            pen.ellipse((left, top, right, bottom), fill=fill)
        elif scene.shape == "squares":
            pen.rectangle((left, top, right, bottom), fill=fill)
        else:
            pen.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill=fill)
    return image


def tokenizer() -> t.PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<image>", *QUESTION.split(), *COUNTS, *COLOURS, *SHAPES]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def processor() -> t.LlavaProcessor:
    side = {"height": SIDE, "width": SIDE}
    return t.LlavaProcessor(
        t.CLIPImageProcessorPil(size=side, crop_size=side, do_resize=False, do_center_crop=False),
        tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def model(vocab: int) -> t.LlavaForConditionalGeneration:
    """Under half a million weights, untrained."""
    torch.manual_seed(0)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "num_key_value_heads": 4, "vocab_size": vocab, "max_position_embeddings": 64}
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config=t.LlamaConfig(**text, pad_token_id=0, bos_token_id=1, eos_token_id=2),
            vision_config=t.CLIPVisionConfig(**tower, image_size=SIDE, patch_size=CELL),
            vision_feature_layer=-1,
            image_token_index=3,
        )
    )


def pair(processor: Any, image: Image.Image, chosen: Scene, rejected: Scene) -> dict[str, Any]:
    """A tokenised row."""
    text = f"<s> <image> {QUESTION}"
    tok = processor.tokenizer
    return {
        "prompt_ids": list(processor(text=[text], images=[[image]])["input_ids"][0]),
        "chosen_ids": tok(f"{chosen.words} </s>")["input_ids"],
        "rejected_ids": tok(f"{rejected.words} </s>")["input_ids"],
        "images": [stored(image)],
        "prompt_text": text,
    }


def training_pairs(processor: Any, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Images of seen combinations, preferred over the words of another seen one."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        chosen, rejected = rng.sample(SEEN, 2)
        rows.append(pair(processor, draw(chosen, rng), chosen, rejected))
    return rows


@dataclass(frozen=True)
class HeldOut:
    """The same questions about unseen combinations over three images: the one that the chosen answer describes, the one
    that the rejected answer describes, and one of a third combination."""

    right: list[dict[str, Any]]
    swapped: list[dict[str, Any]]
    other: list[dict[str, Any]]


def held_out_pairs(processor: Any, count: int, seed: int = 1) -> HeldOut:
    """Both orders of every two answers, so that a model that does not look at the image is right in half of them."""
    rng = random.Random(seed)
    found = HeldOut([], [], [])
    for _ in range(count // 2):
        one, another = rng.sample(UNSEEN, 2)
        for chosen, rejected in ((one, another), (another, one)):
            third = rng.choice([scene for scene in SCENES if scene not in (chosen, rejected)])
            for rows, scene in ((found.right, chosen), (found.swapped, rejected), (found.other, third)):
                rows.append(pair(processor, draw(scene, rng), chosen, rejected))
    return found
