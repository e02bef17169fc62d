"""Tiny models and real processors of families whose images become squares of one size, or tiles of it."""

from typing import Any

import transformers as t

from tests.model.tiny_vlms import SQUARE, TEXT, TOWER

Built = tuple[t.ProcessorMixin, t.PreTrainedModel]


def text(tok, **more: Any) -> dict[str, Any]:
    return {"vocab_size": len(tok), **TEXT, **more}


def sliding(tok, **more: Any) -> dict[str, Any]:
    return text(tok, sliding_window=8, layer_types=["sliding_attention", "full_attention"], **more)


def token_id(tok, token: str) -> int:
    return tok.convert_tokens_to_ids(token)


def siglip(**more: Any) -> t.SiglipVisionConfig:
    return t.SiglipVisionConfig(**TOWER, image_size=16, vision_use_head=False, **more)


def ovis2(tok) -> Built:
    images = t.Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=3)
    config = t.Ovis2Config(
        text_config=t.Qwen2Config(**text(tok)),
        vision_config=dict(**TOWER, image_size=16, vocab_size=40, hidden_stride=2),
        image_token_id=token_id(tok, "<IMG_ATOM>"),
        visual_indicator_token_ids=[token_id(tok, f"<ind{number}>") for number in range(5)],
        vocab_size=len(tok),
        hidden_size=32,
    )
    return t.Ovis2Processor(images, tok, image_seq_length=4), t.Ovis2ForConditionalGeneration(config)


def idefics2(tok) -> Built:
    images = t.Idefics2ImageProcessor(size={"longest_edge": 24, "shortest_edge": 12}, do_image_splitting=False)
    resampler = dict(
        hidden_size=32, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8,
        num_key_value_heads=1,
    )  # fmt: skip
    config = t.Idefics2Config(
        text_config=t.MistralConfig(**text(tok), sliding_window=None),
        vision_config=dict(**TOWER, image_size=32),
        perceiver_config=resampler,
        image_token_id=token_id(tok, "<image>"),
    )
    return t.Idefics2Processor(images, tok, image_seq_len=4), t.Idefics2ForConditionalGeneration(config)


def vipllava(tok) -> Built:
    images = t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE)
    config = t.VipLlavaConfig(
        text_config=t.LlamaConfig(**text(tok)),
        vision_config=t.CLIPVisionConfig(**{**TOWER, "num_hidden_layers": 3}, image_size=16),
        vision_feature_layers=[-2, -1],
        image_token_index=token_id(tok, "<image>"),
    )
    processor = t.LlavaProcessor(
        images, tok, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return processor, t.VipLlavaForConditionalGeneration(config)


def aya_vision(tok) -> Built:
    images = t.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=3)
    config = t.AyaVisionConfig(
        text_config=t.Cohere2Config(**sliding(tok)),
        vision_config=siglip(),
        downsample_factor=2,
        image_token_index=token_id(tok, "<|IMG_PATCH|>"),
    )
    processor = t.AyaVisionProcessor(images, tok, patch_size=8, img_size=16, downsample_factor=1)
    return processor, t.AyaVisionForConditionalGeneration(config)


def cohere2_vision(tok) -> Built:
    images = t.Cohere2VisionImageProcessor(size=SQUARE, max_patches=3, patch_size=2)
    config = t.Cohere2VisionConfig(
        text_config=t.Cohere2Config(**sliding(tok)),
        vision_config=siglip(),
        downsample_factor=2,
        alignment_intermediate_size=64,
        image_token_id=token_id(tok, "<image>"),
    )
    return t.Cohere2VisionProcessor(images, tok), t.Cohere2VisionForConditionalGeneration(config)


def deepseek_vl(tok) -> Built:
    images = t.DeepseekVLImageProcessor(size=SQUARE, min_size=4)
    config = t.DeepseekVLConfig(
        text_config=t.LlamaConfig(**text(tok)), vision_config=siglip(), image_token_id=token_id(tok, "<image>")
    )
    processor = t.DeepseekVLProcessor(images, tok, num_image_tokens=16)
    return processor, t.DeepseekVLForConditionalGeneration(config)


def janus(tok) -> Built:
    tower = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4, mlp_ratio=2.0,
        projection_dim=32, num_image_tokens=16, depth=2,
    )  # fmt: skip
    codes = dict(
        embed_dim=4, num_embeddings=8, latent_channels=8, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=1, num_patches=4, projection_dim=32, image_token_embed_dim=32, num_hidden_layers=1,
    )  # fmt: skip
    config = t.JanusConfig(
        text_config=t.LlamaConfig(**text(tok)),
        vision_config=tower,
        vq_config=codes,
        image_token_id=token_id(tok, "<image>"),
    )
    processor = t.JanusProcessor(t.JanusImageProcessor(size=SQUARE, min_size=4), tok, num_image_tokens=16)
    return processor, t.JanusForConditionalGeneration(config)


def paligemma2(tok) -> Built:
    images = t.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    config = t.PaliGemmaConfig(
        text_config=t.Gemma2Config(
            **sliding(tok, head_dim=8), query_pre_attn_scalar=8, final_logit_softcapping=30.0,
            attn_logit_softcapping=50.0,
        ),
        vision_config=siglip(projection_dim=32),
        projection_dim=32,
        image_token_index=token_id(tok, "<image>"),
    )  # fmt: skip
    return t.PaliGemmaProcessor(images, tok), t.PaliGemmaForConditionalGeneration(config)


def perception_lm(tok) -> Built:
    size = {"height": 32, "width": 32}
    images = t.PerceptionLMImageProcessor(vision_input_type="vanilla", tile_size=32, max_num_tiles=1, size=size)
    videos = t.PerceptionLMVideoProcessor(size=size)
    tower = dict(
        embed_dim=16, img_size=[32, 32], depth=1, num_heads=2, patch_size=8, global_pool="", dynamic_img_size=False
    )
    config = t.PerceptionLMConfig(
        text_config=t.LlamaConfig(**text(tok)),
        vision_config=dict(model_type="timm_wrapper", architecture="vit_tiny_patch16_224", model_args=tower),
        vision_use_cls_token=True,
        projector_pooling_ratio=1,
        image_token_id=token_id(tok, "<image>"),
        video_token_id=token_id(tok, "<video>"),
    )
    processor = t.PerceptionLMProcessor(
        video_processor=videos, image_processor=images, tokenizer=tok, patch_size=8, pooling_ratio=1
    )
    return processor, t.PerceptionLMForConditionalGeneration(config)


def gemma3n(tok) -> Built:
    tok.add_bos_token = False
    images = t.SiglipImageProcessor(size={"height": 32, "width": 32})
    sounds = dict(
        vocab_size=8, vocab_offset=len(tok) + 8, hidden_size=16, conf_num_hidden_layers=1, conf_num_attention_heads=2,
        input_feat_size=32, sscp_conv_channel_size=(8, 4),
    )  # fmt: skip
    config = t.Gemma3nConfig(
        text_config=sliding(
            tok, head_dim=8, num_kv_shared_layers=0, hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(tok), laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0],
        ),
        vision_config=dict(architecture="convnext_atto", hidden_size=320, vocab_size=8, vocab_offset=len(tok)),
        audio_config=sounds,
        vision_soft_tokens_per_image=1,
        audio_soft_tokens_per_image=1,
        image_token_id=token_id(tok, "<image>"),
        boi_token_id=token_id(tok, "<boi>"),
        eoi_token_id=token_id(tok, "<eoi>"),
        boa_token_id=token_id(tok, "<boa>"),
        eoa_token_id=token_id(tok, "<eoa>"),
        audio_token_id=token_id(tok, "<audio>"),
    )  # fmt: skip
    processor = t.Gemma3nProcessor(t.Gemma3nAudioFeatureExtractor(), images, tok, image_seq_length=1)
    return processor, t.Gemma3nForConditionalGeneration(config)


def fast_vlm(tok) -> Built:
    side = {"height": 64, "width": 64}
    images = t.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=side)
    tower = dict(
        model_type="timm_wrapper", architecture="fastvit_mci3", do_pooling=False, hidden_size=64,
        model_args=dict(inference_mode=True, layers=(1, 1, 1, 1, 1), embed_dims=(8, 8, 8, 32, 32)),
    )  # fmt: skip
    config = t.FastVlmConfig(
        text_config=t.Qwen2Config(**text(tok)), vision_config=tower, image_token_index=token_id(tok, "<image>")
    )
    processor = t.LlavaProcessor(
        images, tok, patch_size=64, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )
    return processor, t.FastVlmForConditionalGeneration(config)


def llama4(tok) -> Built:
    images = t.Llama4ImageProcessor(size=SQUARE, max_patches=3, resize_to_max_canvas=False)
    tower = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vision_output_dim=16,
        image_size=16, patch_size=4, projector_input_dim=16, projector_output_dim=16,
    )  # fmt: skip
    config = t.Llama4Config(
        text_config=text(
            tok, head_dim=8, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2,
            intermediate_size_mlp=48, attention_chunk_size=512, no_rope_layer_interval=2,
        ),
        vision_config=tower,
        image_token_index=token_id(tok, "<|patch|>"),
        boi_token_index=token_id(tok, "<boi>"),
        eoi_token_index=token_id(tok, "<eoi>"),
    )  # fmt: skip
    return t.Llama4Processor(images, tok, patch_size=4), t.Llama4ForConditionalGeneration(config)


def mllama(tok) -> Built:
    shapes = [[1, 1], [1, 2], [2, 1], [2, 2], [1, 3], [3, 1], [1, 4], [4, 1]]
    images = t.MllamaImageProcessor(size=SQUARE, max_image_tiles=4)
    tower = dict(
        hidden_size=16, attention_heads=2, num_hidden_layers=2, num_global_layers=1, intermediate_size=24,
        vision_output_dim=32, image_size=16, patch_size=4, max_num_tiles=4, intermediate_layers_indices=[0],
        supported_aspect_ratios=shapes,
    )  # fmt: skip
    config = t.MllamaConfig(
        text_config={**text(tok), "num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        vision_config=tower,
        image_token_index=token_id(tok, "<|image|>"),
    )
    return t.MllamaProcessor(images, tok), t.MllamaForConditionalGeneration(config)


def blip_2(tok) -> Built:
    tower = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16
    )
    queries = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, encoder_hidden_size=16,
        vocab_size=100,
    )  # fmt: skip
    opt = t.OPTConfig(
        vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=512, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=3,
    )  # fmt: skip
    config = t.Blip2Config(
        text_config=opt.to_dict(),
        vision_config=tower,
        qformer_config=queries,
        num_query_tokens=4,
        image_token_index=token_id(tok, "<image>"),
    )
    processor = t.Blip2Processor(t.BlipImageProcessor(size=SQUARE), tok, num_query_tokens=4)
    return processor, t.Blip2ForConditionalGeneration(config)
