"""What model/upstream.py reads from other libraries still is what it takes it for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from orpo_dist.model.upstream import (
    CHECKPOINTS_FORWARD,
    computes_mrope_positions,
    config_value,
    drops_keywords,
    has_image_features,
    has_window_in_masks_alone,
    is_adapter_on_experts_refusal,
    is_failure_of_peers,
    is_out_of_memory,
    is_unknown_architecture,
    layer_configs,
    refuses_keyword,
    scales_queries_by_place,
    text_model_of,
    uses_attention_interface,
    wants_remote_code,
)
from tests.model.tiny_models import HEADS, MOE, tiny_model


def test_the_attention_interface_is_named_in_the_source_of_its_users():
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS  # the name that is looked for
    assert uses_attention_interface(LlamaAttention)
    assert not uses_attention_interface(LlamaMLP)
    assert not uses_attention_interface(Mamba2Mixer)
    assert uses_attention_interface(type(tiny_model("gemma2").model.layers[0].self_attn))


def test_checkpointing_goes_around_what_the_version_says():
    assert ("__init_subclass__" in vars(GradientCheckpointingLayer)) is CHECKPOINTS_FORWARD
    assert ("__call__" in vars(GradientCheckpointingLayer)) is not CHECKPOINTS_FORWARD
    block = type(tiny_model("llama").model.layers[0])
    assert hasattr(block.forward, "__wrapped__") or not CHECKPOINTS_FORWARD


def test_the_text_model_is_the_decoder_without_the_output_layer():
    llama4 = t.Llama4ForCausalLM(t.Llama4TextConfig(**HEADS, num_local_experts=2, intermediate_size_mlp=32))
    assert llama4.get_decoder() is llama4 and text_model_of(llama4) is llama4.model
    vlm = tiny_model("llava")
    assert text_model_of(vlm) is vlm.model.language_model
    gpt2 = tiny_model("gpt2")
    assert text_model_of(gpt2) is gpt2.transformer is text_model_of(gpt2.transformer)


def test_layers_that_drop_keywords_are_told_by_their_source():
    dropping = {"stablelm": "self_attn", "nemotron": "self_attn", "jamba": "mamba"}
    for family, part in {**dropping, "llama": "self_attn", "gpt2": "attn"}.items():
        block = next(m for m in tiny_model(family).modules() if isinstance(m, GradientCheckpointingLayer))
        assert drops_keywords(type(block), part) is (family in dropping), family
    assert not drops_keywords(LlamaMLP, "self_attn")  # never called


def test_windows_that_only_masks_hold_are_told_from_those_that_attention_gets():
    from transformers.models.phimoe.modeling_phimoe import PhimoeAttention, PhimoeModel
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention, Qwen2MoeModel

    assert has_window_in_masks_alone(PhimoeModel, [PhimoeAttention])
    assert has_window_in_masks_alone(Qwen2MoeModel, [Qwen2MoeAttention])
    for family in ("mistral", "gemma2", "gemma3", "gpt_oss", "cohere2", "phi3", "qwen2", "llama"):
        model = text_model_of(tiny_model(family))
        attention = [type(m) for m in model.modules() if uses_attention_interface(type(m))]
        assert attention and not has_window_in_masks_alone(type(model), attention), family


def test_llama4_alone_scales_queries_by_their_place():
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextAttention

    config = Llama4TextConfig(**HEADS, no_rope_layers=[1, 0])
    assert [scales_queries_by_place(Llama4TextAttention(config, layer)) for layer in range(2)] == [False, True]
    config.attn_temperature_tuning = False
    assert not scales_queries_by_place(Llama4TextAttention(config, 1))
    assert not any(map(scales_queries_by_place, tiny_model("llama").modules()))


def test_an_unknown_keyword_is_told_by_its_name():
    def forward(input_ids):
        return input_ids

    with pytest.raises(TypeError) as unknown:
        forward(1, orpo_layout=None)
    assert refuses_keyword(unknown.value, "orpo_layout")
    with pytest.raises(TypeError) as missing:
        forward()
    assert not refuses_keyword(missing.value, "orpo_layout")


def _folder(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("from transformers import PreTrainedConfig as OwnConfig\n")
    return folder


def test_code_of_a_repository_is_refused_by_the_name_of_the_argument(tmp_path):
    folder = _folder(tmp_path, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(ValueError) as refusal:
        t.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert wants_remote_code(refusal.value) and not is_unknown_architecture(refusal.value)


def test_an_unknown_architecture_is_told_in_these_words(tmp_path):
    with pytest.raises(ValueError) as refusal:
        t.AutoConfig.from_pretrained(_folder(tmp_path, model_type="own"))
    assert is_unknown_architecture(refusal.value) and not wants_remote_code(refusal.value)


@pytest.mark.parametrize("setting", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_peft_names_its_layer_when_it_refuses_experts(setting):
    model = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**HEADS, **MOE))
    experts = ["mlp.experts.gate_up_proj"]
    with pytest.raises(ValueError) as refusal:
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=experts, **setting))
    assert is_adapter_on_experts_refusal(refusal.value)


def test_other_refusals_of_peft_are_told_apart():
    with pytest.raises(ValueError) as refusal:
        get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["nothing"]))
    assert not is_adapter_on_experts_refusal(refusal.value)


def test_older_families_have_the_common_names_as_attributes_only():
    config = t.Zamba2Config()
    assert config_value(config, "head_dim") == config.attention_head_dim
    assert "head_dim" not in config.to_dict()  # else to_dict() would do
    assert config_value(t.JambaConfig(), "layer_types")
    assert config_value(t.GPT2Config(), "head_dim") is None


def test_vision_families_share_method_names():
    qwen, llava = type(tiny_model("qwen2_5_vl").base_model), type(tiny_model("llava").base_model)
    assert computes_mrope_positions(qwen) and not computes_mrope_positions(llava)
    assert not computes_mrope_positions(t.MiniCPMV4_7Model)  # which reads the tokens around an image
    assert has_image_features(qwen) and has_image_features(llava)
    assert not has_image_features(t.LlamaModel)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, seen):
    assert is_out_of_memory(error) is seen


def test_a_lost_peer_is_told_from_other_runtime_errors():
    assert is_failure_of_peers(torch.distributed.DistNetworkError("Connection closed by peer"))
    assert not is_failure_of_peers(RuntimeError("shapes differ"))


def test_layers_may_have_configs_of_their_own():
    config = t.LlamaConfig(num_hidden_layers=3)
    assert [layer.head_dim for layer in layer_configs(config)] == [config.head_dim] * 3
    if "gemma4_text" in t.CONFIG_MAPPING:
        kinds = ["sliding_attention", "full_attention"]
        config = t.CONFIG_MAPPING["gemma4_text"](num_hidden_layers=2, layer_types=kinds, head_dim=8, global_head_dim=16)
        assert [layer.head_dim for layer in layer_configs(config)] == [8, 16]
