"""Tiny models and real processors of families that are siblings of others: the same text model or tower in another
arrangement."""

import transformers as t

from tests.model.fixed_size_vlms import Built, siglip, text, token_id
from tests.model.native_size_vlms import glm4v_parts
from tests.model.tiny_vlms import SQUARE, TILES, TOWER

CLIP = t.CLIPVisionConfig(**{**TOWER, "num_hidden_layers": 2}, image_size=16)


def llava_next_video(tok) -> Built:
    images = t.LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=TILES)
    config = t.LlavaNextVideoConfig(
        text_config=t.LlamaConfig(**text(tok)),
        vision_config=CLIP,
        image_grid_pinpoints=TILES,
        image_token_index=token_id(tok, "<image>"),
        video_token_index=token_id(tok, "<video>"),
    )
    processor = t.LlavaNextVideoProcessor(
        video_processor=t.LlavaNextVideoVideoProcessor(),
        image_processor=images,
        tokenizer=tok,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return processor, t.LlavaNextVideoForConditionalGeneration(config)


def video_llava(tok) -> Built:
    config = t.VideoLlavaConfig(
        text_config=t.LlamaConfig(**text(tok)),
        vision_config=CLIP,
        image_token_index=token_id(tok, "<image>"),
        video_token_index=token_id(tok, "<video>"),
    )
    processor = t.VideoLlavaProcessor(
        image_processor=t.VideoLlavaImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE),
        video_processor=t.VideoLlavaVideoProcessor(),
        tokenizer=tok,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return processor, t.VideoLlavaForConditionalGeneration(config)


def deepseek_vl_hybrid(tok) -> Built:
    images = t.DeepseekVLHybridImageProcessor(size=SQUARE, min_size=4, high_res_size={"height": 64, "width": 64})
    second = dict(
        hidden_size=16, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=4,
        mlp_dim=24, window_size=2, global_attn_indexes=[1],
    )  # fmt: skip
    config = t.DeepseekVLHybridConfig(
        text_config=t.LlamaConfig(**text(tok)),
        vision_config=siglip(),
        high_res_vision_config=second,
        image_token_id=token_id(tok, "<image>"),
    )
    processor = t.DeepseekVLHybridProcessor(images, tok, num_image_tokens=16)
    return processor, t.DeepseekVLHybridForConditionalGeneration(config)


def light_on_ocr(tok) -> Built:
    images = t.PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4})
    config = t.LightOnOcrConfig(
        text_config=t.Qwen3Config(**text(tok), head_dim=8),
        vision_config=t.PixtralVisionConfig(**TOWER, head_dim=8, image_size=32),
        spatial_merge_size=2,
        image_token_id=token_id(tok, "<image>"),
    )
    processor = t.LightOnOcrProcessor(images, tok, patch_size=4, spatial_merge_size=2)
    return processor, t.LightOnOcrForConditionalGeneration(config)


def glm46v(tok) -> Built:
    processor, more, rest = glm4v_parts(tok)
    config = t.Glm46VConfig(
        text_config={"model_type": "glm4v_text", **text(tok, **more)},
        vision_config={"model_type": "glm4v_vision", **rest.pop("vision_config")},
        **rest,
    )
    pixels = {"shortest_edge": 8 * 8 * 2, "longest_edge": 32 * 32 * 2}
    images = t.Glm46VImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, size=pixels)
    processor = t.Glm46VProcessor(images, tok, t.Glm46VVideoProcessor(patch_size=4, merge_size=2))
    return processor, t.Glm46VForConditionalGeneration(config)


def aria(tok) -> Built:
    experts = t.AriaTextConfig(**text(tok), moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    tower = t.Idefics3VisionConfig(**{**TOWER, "patch_size": 14}, image_size=490)
    config = t.AriaConfig(
        text_config=experts,
        vision_config=tower.to_dict(),
        projector_patch_to_query_dict={"1225": 128, "4900": 256},
        image_token_index=token_id(tok, "<image>"),
    )
    images = t.AriaImageProcessor(max_image_size=490, min_image_size=336)
    return t.AriaProcessor(images, tok), t.AriaForConditionalGeneration(config)
