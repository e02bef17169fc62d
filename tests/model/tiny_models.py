"""Tiny random models of the families that the packed layout must serve, by name."""

import torch
import transformers as t

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
HEADS = {**COMMON, "head_dim": 8}
MIXED = ["sliding_attention", "full_attention"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_n_groups": 1}


def _configs() -> dict[str, tuple[type, t.PreTrainedConfig]]:
    return {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**HEADS)),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**COMMON)),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**HEADS)),
        "qwen3_moe": (t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig(**HEADS, **MOE, router_aux_loss_coef=0.0)),
        "mistral": (t.MistralForCausalLM, t.MistralConfig(**HEADS, sliding_window=6)),
        "gemma2": (
            t.Gemma2ForCausalLM,
            t.Gemma2Config(**HEADS, sliding_window=6, layer_types=MIXED, attn_logit_softcapping=2.0,
                           query_pre_attn_scalar=8),
        ),
        "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**HEADS, sliding_window=6, layer_types=MIXED)),
        "phi3": (t.Phi3ForCausalLM, t.Phi3Config(**COMMON)),
        "olmo2": (t.Olmo2ForCausalLM, t.Olmo2Config(**COMMON)),
        "gpt_oss": (
            t.GptOssForCausalLM,
            t.GptOssConfig(**HEADS, sliding_window=6, layer_types=MIXED, num_local_experts=4, num_experts_per_tok=2,
                           rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        ),
        "cohere2": (t.Cohere2ForCausalLM, t.Cohere2Config(**HEADS, sliding_window=6, layer_types=MIXED)),
        "qwen3_5": (
            t.Qwen3_5ForCausalLM,
            t.Qwen3_5TextConfig(**{**HEADS, "num_hidden_layers": 4}, linear_num_key_heads=2, linear_num_value_heads=2,
                                linear_key_head_dim=8, linear_value_head_dim=8),
        ),
        "bamba": (
            t.BambaForCausalLM,
            t.BambaConfig(**COMMON, **MAMBA, mamba_d_head=16, mamba_chunk_size=8, attn_layer_indices=[1]),
        ),
        "granite_hybrid": (
            t.GraniteMoeHybridForCausalLM,
            t.GraniteMoeHybridConfig(**COMMON, **MAMBA, mamba_d_head=16, mamba_chunk_size=8, num_local_experts=0,
                                     shared_intermediate_size=48, layer_types=["mamba", "attention"],
                                     position_embedding_type="rope"),
        ),
        "jamba": (
            t.JambaForCausalLM,
            t.JambaConfig(**COMMON, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
        ),
        "stablelm": (t.StableLmForCausalLM, t.StableLmConfig(**COMMON)),
        "nemotron": (t.NemotronForCausalLM, t.NemotronConfig(**HEADS)),
        "lfm2": (t.Lfm2ForCausalLM, t.Lfm2Config(**COMMON, layer_types=["conv", "full_attention"])),
        "gpt2": (
            t.GPT2LMHeadModel,
            t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0,
                         embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False),
        ),
        "bloom": (t.BloomForCausalLM, t.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
        "mpt": (t.MptForCausalLM, t.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=128)),
    }  # fmt: skip


def _vision_configs() -> dict[str, tuple[type, t.PreTrainedConfig]]:
    text = {**COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    return {
        "qwen2_5_vl": (
            t.Qwen2_5_VLForConditionalGeneration,
            t.Qwen2_5_VLConfig(
                text_config=text,
                vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
                               "out_hidden_size": 32, "patch_size": 4, "fullatt_block_indexes": [0]},
                image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
            ),
        ),
        "llava": (
            t.LlavaForConditionalGeneration,
            t.LlavaConfig(
                text_config=t.MistralConfig(**HEADS, sliding_window=6),
                vision_config=t.CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                                 num_attention_heads=2, image_size=8, patch_size=4),
                image_token_index=90,
            ),
        ),
    }  # fmt: skip


def tiny_model(name: str) -> t.PreTrainedModel:
    """In float32 and training mode, with weights large enough for attention to prefer some tokens over others.

    Not so for qwen3_5, whose decay rates have gradients of cancelling terms: with larger weights their rounding alone
    passes the tolerance (in float64 both layouts agree to 1e-13).
    """
    model_class, config = (_configs() | _vision_configs())[name]
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1 if name == "qwen3_5" else 6)
    return model.train()
