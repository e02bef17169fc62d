"""Tiny models and real processors of families whose images keep their shape, in patches or tiles."""

from typing import Any

import transformers as t
from tokenizers import Regex, normalizers

from tests.model.fixed_size_vlms import Built, sliding, text, token_id
from tests.model.tiny_vlms import ROPE, SQUARE, TOWER


def glm4v_parts(tok) -> tuple[t.ProcessorMixin, dict[str, Any], dict[str, Any]]:
    """The processor, what a text config has besides its sizes, and the rest of the config."""
    pixels = {"shortest_edge": 8 * 8 * 2, "longest_edge": 32 * 32 * 2}
    images = t.Glm4vImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, size=pixels)
    rope = {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    tower = dict(
        depth=1, hidden_size=16, num_heads=2, image_size=32, patch_size=4, out_hidden_size=32, intermediate_size=24,
        spatial_merge_size=2,
    )  # fmt: skip
    ids = {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    rest = {"vision_config": tower, **{option: token_id(tok, token) for option, token in ids.items()}}
    processor = t.Glm4vProcessor(images, tok, t.Glm4vVideoProcessor(patch_size=4, merge_size=2))
    return processor, {"head_dim": 8, "rope_parameters": rope}, rest


def glm4v(tok) -> Built:
    processor, more, rest = glm4v_parts(tok)
    return processor, t.Glm4vForConditionalGeneration(t.Glm4vConfig(text_config=text(tok, **more), **rest))


def glm4v_moe(tok) -> Built:
    processor, more, rest = glm4v_parts(tok)
    experts = dict(
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1,
        topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    config = t.Glm4vMoeConfig(text_config=text(tok, **more, **experts), **rest)
    return processor, t.Glm4vMoeForConditionalGeneration(config)


def lfm2_vl(tok) -> Built:
    images = t.Lfm2VlImageProcessor(
        encoder_patch_size=4, downsample_factor=2, tile_size=32, max_tiles=4, min_tiles=2, min_image_tokens=4,
        max_image_tokens=16, max_num_patches=64, max_pixels_tolerance=2.0,
    )  # fmt: skip
    layers = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}
    config = t.Lfm2VlConfig(
        text_config=t.Lfm2Config(**{**text(tok), **layers}, block_ff_dim=48, block_multiple_of=8),
        vision_config=t.Siglip2VisionConfig(**TOWER, num_patches=64, vision_use_head=False),
        projector_hidden_size=24,
        downsample_factor=2,
        image_token_id=token_id(tok, "<image>"),
    )
    return t.Lfm2VlProcessor(images, tok), t.Lfm2VlForConditionalGeneration(config)


def kimi_k25(tok) -> Built:
    images = t.Kimi_K25ImageProcessor(patch_size=4, merge_size=2, size={"max_height": 32, "max_width": 32})
    experts = t.DeepseekV3Config(
        **{**text(tok), "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    tower = dict(
        patch_size=4, pos_emb_height=8, pos_emb_width=8, pos_emb_time=2, num_attention_heads=2, num_hidden_layers=1,
        hidden_size=16, intermediate_size=24,
    )  # fmt: skip
    config = t.Kimi_K25Config(
        text_config=experts,
        vision_config=tower,
        projection_hidden_size=16,
        image_token_id=token_id(tok, "<|media_pad|>"),
        video_token_id=token_id(tok, "<video>"),
        tie_word_embeddings=False,
    )
    processor = t.Kimi_K25Processor(images, tok, t.Kimi_K25VideoProcessor(patch_size=4, merge_size=2))
    return processor, t.Kimi_K25ForConditionalGeneration(config)


def gemma4(tok, **more: Any) -> Built:
    images = t.Gemma4ImageProcessor(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    videos = t.Gemma4VideoProcessor(patch_size=4, pooling_kernel_size=2)
    tower = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, pooling_kernel_size=2, patch_size=4, position_embedding_size=64,
    )  # fmt: skip
    config = t.Gemma4Config(
        text_config=sliding(
            tok, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=len(tok),
            **more,
        ),
        vision_config=tower,
        audio_config=None,
        image_token_id=token_id(tok, "<image>"),
        boi_token_id=token_id(tok, "<boi>"),
        eoi_token_id=token_id(tok, "<eoi>"),
        video_token_id=token_id(tok, "<|video|>"),
        audio_token_id=token_id(tok, "<audio>"),
        boa_token_id=token_id(tok, "<boa>"),
        eoa_token_index=token_id(tok, "<eoa>"),
    )  # fmt: skip
    processor = t.Gemma4Processor(t.Gemma4AudioFeatureExtractor(), images, tok, videos, image_seq_length=70)
    return processor, t.Gemma4ForConditionalGeneration(config)


def gemma4_bidirectional(tok) -> Built:
    return gemma4(tok, use_bidirectional_attention="vision")


def minicpm_parts(tok) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """What the processor is made of, and the config but for its tower."""
    images = t.MiniCPMV4_6ImageProcessor(scale_resolution=32, patch_size=4, max_slice_nums=2)
    videos = t.MiniCPMV4_6VideoProcessor(scale_resolution=32, patch_size=4, max_slice_nums=1)
    linear = t.Qwen3_5TextConfig(
        **{**text(tok), "num_hidden_layers": 4}, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
        rope_parameters={**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
    )  # fmt: skip
    tower = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4,
        insert_layer_id=0,
    )  # fmt: skip
    rest = dict(
        text_config=linear,
        vision_config=tower,
        insert_layer_id=0,
        image_size=32,
        image_token_id=token_id(tok, "<image>"),
        video_token_id=token_id(tok, "<video>"),
    )
    return (images, tok, videos), rest


def minicpm_v46(tok) -> Built:
    parts, rest = minicpm_parts(tok)
    model = t.MiniCPMV4_6ForConditionalGeneration(t.MiniCPMV4_6Config(**rest))
    return t.MiniCPMV4_6Processor(parts[0], parts[2], parts[1]), model


def minicpm_v47(tok) -> Built:
    parts, rest = minicpm_parts(tok)
    marks = dict(
        image_start_id=token_id(tok, "<|image_start|>"),
        image_end_id=token_id(tok, "<|image_end|>"),
        slice_start_id=token_id(tok, "<slice>"),
        slice_end_id=token_id(tok, "</slice>"),
        newline_id=tok("\n", add_special_tokens=False)["input_ids"][0],
    )
    model = t.MiniCPMV4_7ForConditionalGeneration(t.MiniCPMV4_7Config(**rest, **marks))
    return t.MiniCPMV4_7Processor(parts[0], parts[2], parts[1]), model


def molmo2(tok) -> Built:
    images = t.Molmo2ImageProcessor(size=SQUARE, max_crops=2, overlap_margins=[1, 1], patch_size=4, pooling_size=[2, 2])
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    config = t.Molmo2Config(
        text_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=len(tok), additional_vocab_size=8, max_position_embeddings=2048, pad_token_id=0,
            bos_token_id=1, eos_token_id=3,
        ),
        vision_config=dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, **heads, image_size=[16, 16], patch_size=4,
            num_position_embeddings=16,
        ),
        adapter_config=dict(
            vision_feature_layer=[-1, -2], hidden_size=16, **heads, intermediate_size=24, text_hidden_size=32
        ),
        image_start_token_id=token_id(tok, "<im_start>"),
        low_res_image_start_token_id=token_id(tok, "<low_res_im_start>"),
        image_end_token_id=token_id(tok, "<im_end>"),
        image_patch_id=token_id(tok, "<im_patch>"),
        frame_start_token_id=token_id(tok, "<frame_start>"),
        frame_end_token_id=token_id(tok, "<frame_end>"),
    )  # fmt: skip
    return t.Molmo2Processor(images, t.Molmo2VideoProcessor(), tok), t.Molmo2ForConditionalGeneration(config)


def fuyu(tok) -> Built:
    """With a tokenizer that writes a word's beginning before the first token, as SentencePiece does: the processor
    takes it off again."""
    tok.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"^(?=\|SPEAKER\|.)"), "a")
    tok.add_tokens([t.AddedToken(token, normalized=True) for token in ("|SPEAKER|", "|NEWLINE|")])
    images = t.FuyuImageProcessor(size={"height": 32, "width": 32}, patch_size={"height": 8, "width": 8})
    persimmon = t.PersimmonConfig(**{**text(tok), "num_key_value_heads": 4})
    config = t.FuyuConfig(text_config=persimmon, image_size=32, patch_size=8, image_token_id=token_id(tok, "|SPEAKER|"))
    return t.FuyuProcessor(images, tok), t.FuyuForCausalLM(config)


def phi4(tok) -> Built:
    images = t.Phi4MultimodalImageProcessor(size={"height": 16, "width": 16}, patch_size=4, dynamic_hd=2)
    sounds = dict(
        hidden_size=16, intermediate_size=24, num_blocks=1, num_attention_heads=2, ext_pw_out_channel=16,
        depthwise_separable_out_channel=16, nemo_conv_channels=8, audio_token_id=token_id(tok, "<audio>"),
    )  # fmt: skip
    tower = {**TOWER, "num_hidden_layers": 2, "image_size": 16, "crop_size": 16}
    config = t.Phi4MultimodalConfig(
        **text(tok),
        original_max_position_embeddings=1024,
        vision_config={**tower, "image_token_id": token_id(tok, "<image>")},
        audio_config=sounds,
    )
    processor = t.Phi4MultimodalProcessor(images, t.Phi4MultimodalFeatureExtractor(), tok)
    return processor, t.Phi4MultimodalForCausalLM(config)
