"""Tiny random models and real processors of the families in the second table of docs/vlm.md, by the name in it.

Every family has its own tower, projector and text model. Processors are transformers' own, on torchvision, with small
sizes; the tokenizer is trained here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as t

from tests.model import fixed_size_vlms as fixed
from tests.model import native_size_vlms as native
from tests.model.fixed_size_vlms import Built
from tests.model.tiny_vlms import CHAT_TEMPLATE, drawing
from tests.tiny_tokenizers import train_bpe

NAMED = {
    "image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<audio>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
    "image_boundary_token": "<fake_token_around_image>",
    "img_line_break_token": "<lb>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail_token": "<|img_thumbnail|>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
UNNAMED = [
    *("<end_of_utterance>", "<|video|>"),  # Idefics 2, Gemma 4, GLM-4V
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),  # GLM-4V
    *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"),  # Cohere
    *(f"TILE_{tile}" for tile in range(1, 5)),
    *(f"<ind{number}>" for number in range(5)),  # Ovis 2
    *("<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
    *("<|image|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|python_tag|>"),  # Llama 3.2 and 4
    *("|SPEAKER|", "|NEWLINE|", "<0x00>", "<0x01>", "<0x02>", "<0x03>", "<0x04>"),  # Fuyu
    *(
        "<im_patch>",
        "<im_col>",
        "<im_start>",
        "<low_res_im_start>",
        "<frame_start>",
        "<im_end>",
        "<frame_end>",
    ),  # Molmo
    *("<im_low>", "<|media_pad|>"),  # Kimi K2.5
    *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),  # LFM2-VL
]


@dataclass(frozen=True)
class Further:
    """A family.

    placeholder: what a prompt holds for an image. named: tokens that the tokenizer knows under other names than in
    NAMED, or under none. templated: False for a model without turns. illustrated: every row has an image, as the family
    wants it.
    needs: a package that its tower lies in. scale: of its weights.
    """

    build: Callable[[t.PreTrainedTokenizerFast], Built]
    placeholder: str = "<image>"
    named: dict[str, str | None] = field(default_factory=dict)
    templated: bool = True
    illustrated: bool = False
    needs: str | None = None
    scale: int = 3


def tokenizer(named: dict[str, str | None]) -> t.PreTrainedTokenizerFast:
    names = {name: token for name, token in {**NAMED, **named}.items() if token is not None}
    media = [*NAMED.values(), *names.values(), *UNNAMED]
    special = list(dict.fromkeys(["<pad>", "<s>", "<|im_start|>", "<|im_end|>", *media]))
    made = t.PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(special, vocab_size=640),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=names,
    )
    made.padding_side = "right"
    return made


def further_vlm(name: str) -> Built:
    """In float32 and training mode, with weights large enough for attention to prefer some tokens over others."""
    family = FURTHER[name]
    tok = tokenizer(family.named)
    torch.manual_seed(0)
    processor, model = family.build(tok)
    if family.templated:
        processor.chat_template = tok.chat_template = CHAT_TEMPLATE.replace("IMAGE", family.placeholder)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.abs().sum():
                parameter.normal_(std=0.1)  # what starts at zero, so that its gradient says something
            elif parameter.dim() > 1:
                parameter.mul_(family.scale)
    return processor, model.float().train()


def rows_of(name: str) -> list[dict[str, Any]]:
    """Four pairs as a user writes them: an image, two of other sizes, none, and a wide one."""
    family = FURTHER[name]
    texts = [
        ("What is the capital?", "Paris, of course.", "The river"),
        ("Compare.", "One fox", "The lazy dog jumps over"),
        ("How do I reset my password?", "Open the settings", "no"),
        ("two three", "ten", "eleven twelve quick brown"),
    ]
    images = [[(32, 24)], [(16, 16), (20, 40)], [(24, 24)] if family.illustrated else [], [(60, 22)]]
    rows = []
    for number, ((question, *answers), sizes) in enumerate(zip(texts, images, strict=True)):
        row: dict[str, Any] = {"images": [drawing(*size, number + i) for i, size in enumerate(sizes)]}
        if family.templated:
            parts = [*({"type": "image"} for _ in sizes), {"type": "text", "text": question}]
            row["prompt"] = [{"role": "user", "content": parts}]
            answers = [[{"role": "assistant", "content": answer}] for answer in answers]
        else:
            row["prompt"] = family.placeholder * len(sizes) + question
        rows.append({**row, "chosen": answers[0], "rejected": answers[1]})
    return rows


_GLM4V = {"image_token": "<|image|>", "video_token": "<|video|>"}
_GLM4V_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
_LLAMA = {"image_token": "<|image|>"}
FURTHER = {
    "Ovis 2": Further(fixed.ovis2),
    "Idefics2": Further(fixed.idefics2),
    "VipLLaVA": Further(fixed.vipllava),
    "Aya Vision": Further(fixed.aya_vision),
    "Cohere2 Vision": Further(fixed.cohere2_vision),
    "DeepSeek-VL": Further(fixed.deepseek_vl),
    "Janus": Further(fixed.janus),
    "GLM-4V": Further(native.glm4v, _GLM4V_IMAGE, _GLM4V),
    "GLM-4V MoE": Further(native.glm4v_moe, _GLM4V_IMAGE, _GLM4V),
    "LFM2-VL": Further(native.lfm2_vl),
    "Kimi K2.5": Further(native.kimi_k25, "<|media_pad|>", {"image_token": "<|media_pad|>"}),
    "Gemma 4": Further(native.gemma4),
    "Gemma 4 with bidirectional vision": Further(native.gemma4_bidirectional),
    "Gemma 3n": Further(fixed.gemma3n, needs="timm"),
    "PerceptionLM": Further(fixed.perception_lm, needs="timm"),
    "FastVLM": Further(fixed.fast_vlm, needs="timm"),
    "PaliGemma 2": Further(fixed.paligemma2, templated=False, illustrated=True),
    "MiniCPM-V 4.6": Further(native.minicpm_v46, scale=1),  # as qwen3_5, see tiny_models.tiny_model
    "MiniCPM-V 4.7": Further(native.minicpm_v47, scale=1),
    "Molmo 2": Further(native.molmo2, "<|image|>", _LLAMA),
    "Llama 4": Further(fixed.llama4, "<|image|>", _LLAMA),
    "Llama 3.2 Vision": Further(fixed.mllama, "<|image|>", _LLAMA),
    "BLIP-2": Further(fixed.blip_2, named={"image_token": None}),
    "Phi-4-multimodal": Further(native.phi4),
    "Fuyu": Further(native.fuyu, "|SPEAKER|"),
}
