"""Tiny random models of text families, built from their own configs, for one trainer step each."""

from typing import Any

import torch
import transformers as t
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 97
# Small values by the names that configs have for them; each config takes those that it knows.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "lru_width", "attention_hidden_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "intermediate_size_mlp", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "kv_channels", "global_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "mamba_d_conv"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_mem_blocks"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads", "mamba_expand"), 2),
    **dict.fromkeys(("linear_num_value_heads", "expert_layer_period", "attn_layer_period"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "head_size"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 6),
    "mamba_num_heads": 4,
    "num_kv_shared_layers": 0,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "attn_layer_indices": [1],
    "use_mamba_kernels": False,
}
_NO_DROPOUT = ("hidden_dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout",
               "activation_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "layerdrop",
               "router_jitter_noise", "input_jitter_noise", "router_aux_loss_coef")  # fmt: skip
_ALWAYS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
# What a family needs beyond the sizes.
_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "llama4_text": {"attention_chunk_size": 128},
    "gemma4_text": {"enable_moe_block": True},
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4},
    "kimi_linear": {"head_dim": 4, "num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def text_family(name: str) -> t.PreTrainedModel:
    """A model of this `model_type`, in float32, with weights three times those of a new one, so that attention prefers
    some tokens over others. No window, no chunk of it is longer than the rows."""
    config = _config(name)
    torch.manual_seed(0)
    model = getattr(t, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
            if not torch.isfinite(parameter).all() or parameter.abs().max() > 1e4:  # made with torch.empty
                parameter.normal_(0, 0.1)
    return model


def _config(name: str) -> t.PreTrainedConfig:
    kind = CONFIG_MAPPING[name]
    known = kind().to_dict()
    names = {**dict.fromkeys(known), **getattr(kind, "attribute_map", {})}
    options = {key: value for key, value in _SIZES.items() if key in names}
    options |= {key: 0.0 for key in _NO_DROPOUT if key in known}
    for alias, own in getattr(kind, "attribute_map", {}).items():
        if alias in options and own in options:
            del options[alias]
    for key in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(known.get(key) or []))
        if kinds:
            options[key] = (kinds * 2)[: max(2, len(kinds))]
    if "layer_types" in options:
        options["num_hidden_layers"] = len(options["layer_types"])
    return kind(**{**options, **_ALWAYS, **_SPECIAL.get(name, {})})
