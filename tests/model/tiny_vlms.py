"""Tiny random vision-language models with real processors, by family, and rows of pairs with drawn images.

Processors are transformers' own with small sizes: on torchvision where the family needs it, else on PIL. The tokenizer
is trained here.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as t
from PIL import Image, ImageDraw

from tests.tiny_tokenizers import train_bpe

VISION_TOKENS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "attention_dropout": 0.0,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
QWEN_TOWER = {"depth": 1, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
SQUARE = {"height": 16, "width": 16}
TILES = [[16, 32], [32, 16], [32, 32]]


@dataclass(frozen=True)
class Family:
    """placeholder: what stands for an image in the text that the processor is given."""

    placeholder: str
    processor: Callable[[t.PreTrainedTokenizerFast], t.ProcessorMixin]
    model: Callable[[t.PreTrainedTokenizerFast], t.PreTrainedModel]


def tokenizer() -> t.PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS.values()]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    made = t.PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(special, vocab_size=640),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=dict(VISION_TOKENS),
    )
    made.padding_side = "right"
    return made


def _qwen_processor(processor_class: type, video_class: type) -> Callable:
    def build(tok):
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
        pixels = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
        return processor_class(t.Qwen2VLImageProcessor(**sizes, size=pixels), tok, video_class(**sizes))

    return build


def _ids(tok, **names: str) -> dict[str, int]:
    return {option: tok.convert_tokens_to_ids(VISION_TOKENS[name]) for option, name in names.items()}


def _qwen_ids(tok) -> dict[str, int]:
    return _ids(
        tok,
        image_token_id="image_token",
        video_token_id="video_token",
        vision_start_token_id="vision_start_token",
        vision_end_token_id="vision_end_token",
    )


def _text(tok, **more: Any) -> dict[str, Any]:
    return {"vocab_size": len(tok), **TEXT, **more}


def _mrope(section: list[int]) -> dict[str, Any]:
    return {"rope_parameters": {**ROPE, "mrope_section": section}}


def _qwen2_vl(tok):
    vision = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, **QWEN_TOWER}
    return t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(text_config=_text(tok, **_mrope([1, 1, 2])), vision_config=vision, **_qwen_ids(tok))
    )


def _qwen2_5_vl(tok):
    vision = {"hidden_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16}
    return t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(
            text_config=_text(tok, **_mrope([1, 1, 2])),
            vision_config={**QWEN_TOWER, **vision, "depth": 2},
            **_qwen_ids(tok),
        )
    )


def _qwen3_vl(tok):
    vision = {"hidden_size": 16, "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return t.Qwen3VLForConditionalGeneration(
        t.Qwen3VLConfig(
            text_config=_text(tok, head_dim=8, **_mrope([2, 1, 1])),
            vision_config={**QWEN_TOWER, **vision, "depth": 2},
            **_qwen_ids(tok),
        )
    )


def _qwen3_5(tok):
    vision = {"hidden_size": 16, "out_hidden_size": 32, "num_position_embeddings": 64}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "num_hidden_layers": 4}
    text = _text(tok, head_dim=16, linear_value_head_dim=8, **_mrope([1, 1, 0])) | linear
    text["rope_parameters"] |= {"partial_rotary_factor": 0.25}
    return t.Qwen3_5ForConditionalGeneration(
        t.Qwen3_5Config(text_config=text, vision_config={**QWEN_TOWER, **vision}, **_qwen_ids(tok))
    )


def _llava_processor(tok):
    image_processor = t.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE)
    return t.LlavaProcessor(
        image_processor,
        tok,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava(tok):
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config=t.LlamaConfig(**_text(tok)),
            vision_config=t.CLIPVisionConfig(**{**TOWER, "num_hidden_layers": 2}, image_size=16),
            **_ids(tok, image_token_index="image_token"),
        )
    )


def _llava_next_processor(tok):
    image_processor = t.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=TILES
    )
    return t.LlavaNextProcessor(
        image_processor,
        tok,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next(tok):
    return t.LlavaNextForConditionalGeneration(
        t.LlavaNextConfig(
            text_config=t.MistralConfig(**_text(tok), sliding_window=None),
            vision_config=t.CLIPVisionConfig(**{**TOWER, "num_hidden_layers": 2}, image_size=16),
            image_grid_pinpoints=TILES,
            **_ids(tok, image_token_index="image_token"),
        )
    )


def _llava_onevision_processor(tok):
    image_processor = t.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=TILES)
    return t.LlavaOnevisionProcessor(
        image_processor,
        tok,
        t.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )


def _llava_onevision(tok):
    return t.LlavaOnevisionForConditionalGeneration(
        t.LlavaOnevisionConfig(
            text_config=t.Qwen2Config(**_text(tok)),
            vision_config=t.SiglipVisionConfig(**TOWER, image_size=16, vision_use_head=False),
            image_grid_pinpoints=TILES,
            **_ids(tok, image_token_index="image_token", video_token_index="video_token"),
        )
    )


def _idefics3_processor(tok):
    image_processor = t.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return t.Idefics3Processor(image_processor, tok, image_seq_len=4)


def _idefics3(tok):
    return t.Idefics3ForConditionalGeneration(
        t.Idefics3Config(
            text_config=t.LlamaConfig(**_text(tok)),
            vision_config={**TOWER, "image_size": 16},
            scale_factor=2,
            **_ids(tok, image_token_id="image_token"),
        )
    )


def _smolvlm_processor(tok):
    image_processor = t.SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return t.SmolVLMProcessor(image_processor, tok, t.SmolVLMVideoProcessor(), image_seq_len=4)


def _smolvlm(tok):
    return t.SmolVLMForConditionalGeneration(
        t.SmolVLMConfig(
            text_config=t.LlamaConfig(**_text(tok)),
            vision_config={**TOWER, "image_size": 16},
            scale_factor=2,
            **_ids(tok, image_token_id="image_token"),
        )
    )


def _gemma3_processor(tok):
    tok.image_token, tok.image_token_id = "<IMG_CONTEXT>", tok.convert_tokens_to_ids("<IMG_CONTEXT>")
    image_processor = t.Gemma3ImageProcessorPil(size=SQUARE)
    return t.Gemma3Processor(image_processor, tok, image_seq_length=4)


def _gemma3(tok):
    return t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(
            text_config=_text(
                tok, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"],
                query_pre_attn_scalar=8,
            ),
            vision_config=t.SiglipVisionConfig(**TOWER, image_size=16, vision_use_head=False),
            mm_tokens_per_image=4,
            **_ids(tok, image_token_index="context_image_token", boi_token_index="boi_token",
                   eoi_token_index="eoi_token"),
        )
    )  # fmt: skip


def _paligemma_processor(tok):
    image_processor = t.SiglipImageProcessorPil(size=SQUARE)
    image_processor.image_seq_length = 16
    return t.PaliGemmaProcessor(image_processor, tok)


def _paligemma(tok):
    return t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(
            text_config=t.GemmaConfig(**_text(tok, head_dim=8)),
            vision_config=t.SiglipVisionConfig(**TOWER, image_size=16, vision_use_head=False, projection_dim=32),
            projection_dim=32,
            **_ids(tok, image_token_index="image_token"),
        )
    )


def _internvl_processor(tok):
    image_processor = t.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=3)
    return t.InternVLProcessor(image_processor, tok, t.InternVLVideoProcessor(), image_seq_length=4)


def _internvl(tok):
    return t.InternVLForConditionalGeneration(
        t.InternVLConfig(
            text_config=t.Qwen2Config(**_text(tok)),
            vision_config={**TOWER, "patch_size": [4, 4], "image_size": [16, 16]},
            image_seq_length=4,
            **_ids(tok, image_token_id="context_image_token"),
        )
    )


def _pixtral_processor(tok):
    image_processor = t.PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4})
    return t.PixtralProcessor(image_processor, tok, patch_size=4, spatial_merge_size=2, image_token="<image>")


def _mistral3(tok):
    return t.Mistral3ForConditionalGeneration(
        t.Mistral3Config(
            text_config=t.MistralConfig(**_text(tok, head_dim=8), sliding_window=None),
            vision_config=t.PixtralVisionConfig(**TOWER, head_dim=8, image_size=32),
            spatial_merge_size=2,
            **_ids(tok, image_token_index="image_token"),
        )
    )


_QWEN = "<|vision_start|><image><|vision_end|>"
FAMILIES = {
    "qwen2_vl": Family(_QWEN, _qwen_processor(t.Qwen2VLProcessor, t.Qwen2VLVideoProcessor), _qwen2_vl),
    "qwen2_5_vl": Family(_QWEN, _qwen_processor(t.Qwen2_5_VLProcessor, t.Qwen2VLVideoProcessor), _qwen2_5_vl),
    "qwen3_vl": Family(_QWEN, _qwen_processor(t.Qwen3VLProcessor, t.Qwen3VLVideoProcessor), _qwen3_vl),
    "qwen3_5": Family(_QWEN, _qwen_processor(t.Qwen3VLProcessor, t.Qwen3VLVideoProcessor), _qwen3_5),
    "llava": Family("<image>", _llava_processor, _llava),
    "llava_next": Family("<image>", _llava_next_processor, _llava_next),
    "llava_onevision": Family("<image>", _llava_onevision_processor, _llava_onevision),
    "idefics3": Family("<image>", _idefics3_processor, _idefics3),
    "smolvlm": Family("<image>", _smolvlm_processor, _smolvlm),
    "gemma3": Family("<start_of_image>", _gemma3_processor, _gemma3),
    "paligemma": Family("<image>", _paligemma_processor, _paligemma),
    "internvl": Family("<IMG_CONTEXT>", _internvl_processor, _internvl),
    "mistral3": Family("<image>", _pixtral_processor, _mistral3),
}


@cache
def tiny_processor(name: str) -> t.ProcessorMixin:
    family, tok = FAMILIES[name], tokenizer()
    processor = family.processor(tok)
    processor.chat_template = tok.chat_template = CHAT_TEMPLATE.replace("IMAGE", family.placeholder)
    return processor


def tiny_vlm(name: str) -> t.PreTrainedModel:
    """In float32 and training mode, with weights large enough for attention to prefer some tokens over others (but for
    qwen3_5, see tiny_models.tiny_model)."""
    torch.manual_seed(0)
    model = FAMILIES[name].model(tiny_processor(name).tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.abs().sum():
                parameter.normal_(std=0.1)  # what starts at zero, so that its gradient says something
            elif parameter.dim() > 1:
                parameter.mul_(1 if name == "qwen3_5" else 4)
    return model.train()


def drawing(width: int, height: int, seed: int) -> Image.Image:
    """A rectangle and a disc in colours of their own, on grey."""
    colours = ["red", "green", "blue", "yellow", "purple", "orange"]
    image = Image.new("RGB", (width, height), (90, 110, 130))
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 8, height // 8, width // 2, height // 2), fill=colours[seed % 6])
    draw.ellipse((width // 3, height // 3, width - 2, height - 2), fill=colours[(seed + 2) % 6])
    return image


def stored(image: Image.Image) -> dict[str, Any]:
    """As datasets.Image(decode=False) keeps it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def image_row(name: str, index: int, images: list[Image.Image], question: str, chosen: str, rejected: str) -> dict:
    """A tokenised pair: images first, then the question."""
    processor = tiny_processor(name)
    text = f"<|im_start|>{FAMILIES[name].placeholder * len(images)}{question}<|im_end|>"
    tok = processor.tokenizer
    prompt_ids = processor(text=[text], images=[images])["input_ids"][0] if images else tok(text)["input_ids"]

    def completion(words: str) -> list[int]:
        return [*tok(words, add_special_tokens=False)["input_ids"], tok.eos_token_id]

    return {
        "prompt_ids": list(prompt_ids),
        "chosen_ids": completion(chosen),
        "rejected_ids": completion(rejected),
        "images": [stored(image) for image in images],
        "prompt_text": text,
        "row": index,
    }


def image_rows(name: str, photographs: list[Image.Image] = ()) -> list[dict]:
    """Four pairs: one image, two of other sizes, none, a tall one; then one for each photograph."""
    rows = [
        image_row(name, 0, [drawing(32, 24, 0)], "What is the capital?", "Paris, of course.", "The river"),
        image_row(name, 1, [drawing(16, 16, 1), drawing(20, 40, 2)], "Compare.", "One fox", "The lazy dog jumps over"),
        image_row(name, 2, [], "How do I reset my password?", "Open the settings", "no"),
        image_row(name, 3, [drawing(12, 44, 3)], "two three", "ten", "eleven twelve quick brown"),
    ]
    rows += [
        image_row(name, 4 + i, [photograph], "What is this?", "the river bank", "my order")
        for i, photograph in enumerate(photographs)
    ]
    return rows
