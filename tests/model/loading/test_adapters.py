import copy
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FalconConfig,
    FalconForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from orpo_dist.errors import UserError
from orpo_dist.model.loading.adapters import add_adapter, disable_base_dropout, lora_config
from orpo_dist.model.loading.load import load_model, quantization_config
from orpo_dist.options.model import ModelArguments

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_llama(64).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, folder) -> Path:
    """A trained adapter of the model in `folder`: rank 4 on all linear layers, weights that are not zero."""
    path = tmp_path_factory.mktemp("adapter")
    model = add_adapter(load_model(str(folder)), lora_config(ModelArguments(use_peft=True, lora_r=4, lora_dropout=0.0)))
    _perturb(model)
    model.save_pretrained(path)
    return path


def _tied_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def _mixture() -> Glm4MoeForCausalLM:
    """Fused experts, and beside them a shared one of linear layers with the names that single experts used to have."""
    torch.manual_seed(0)
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            first_k_dense_replace=0,
        )
    )


def _t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0)
    )


def _perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def _adapted_layers(model: nn.Module) -> set[str]:
    return {name.split(".")[-4] for name, _ in model.named_parameters() if name.endswith("lora_A.default.weight")}


def _loss(model: nn.Module, **autocast) -> torch.Tensor:
    with torch.autocast("cpu", **(autocast or {"enabled": False})):
        return model(input_ids=IDS, labels=IDS).loss


# ---------------------------------------------------------------- settings


def test_defaults_of_lora():
    config = lora_config(ModelArguments(use_peft=True))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    assert config.target_modules == "all-linear"
    assert not config.use_rslora and not config.use_dora
    assert lora_config(ModelArguments()) is None


def test_task_type_of_an_encoder_decoder():
    assert lora_config(ModelArguments(use_peft=True)).task_type == "CAUSAL_LM"
    assert lora_config(ModelArguments(use_peft=True), is_encoder_decoder=True).task_type == "SEQ_2_SEQ_LM"


def test_rslora_scales_by_the_root_of_the_rank(folder):
    for use_rslora, scaling in ((False, 32 / 16), (True, 32 / math.sqrt(16))):
        config = lora_config(ModelArguments(use_peft=True, use_rslora=use_rslora))
        model = add_adapter(load_model(str(folder)), config)
        assert model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == pytest.approx(scaling)


def test_dora_trains_magnitudes(folder):
    model = add_adapter(load_model(str(folder)), lora_config(ModelArguments(use_peft=True, use_dora=True)))
    _loss(model).backward()
    magnitudes = [p for n, p in model.named_parameters() if "lora_magnitude_vector" in n]
    assert len(magnitudes) == 14
    assert all(p.grad.abs().sum() > 0 for p in magnitudes)


@pytest.mark.parametrize(
    ("option", "value"),
    [("lora_r", 8), ("lora_alpha", 8), ("lora_dropout", 0.0), ("lora_target_modules", ["q_proj"]), ("use_dora", True)],
)
def test_settings_beside_a_given_adapter_are_refused(option, value):
    arguments = ModelArguments(adapter_name_or_path="runs/one", **{option: value})
    with pytest.raises(UserError, match=f"{option}=.* a given adapter brings its own settings"):
        lora_config(arguments)
    assert lora_config(ModelArguments(adapter_name_or_path="runs/one", use_peft=True)) is None


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_covers_every_linear_layer_but_the_head(folder, tied):
    base = _tied_llama() if tied else load_model(str(folder))
    model = add_adapter(base, lora_config(ModelArguments(use_peft=True)))
    assert _adapted_layers(model) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_all_linear_of_an_encoder_decoder_and_of_conv1d():
    config = lora_config(ModelArguments(use_peft=True), is_encoder_decoder=True)
    assert _adapted_layers(add_adapter(_t5(), config)) == {"q", "k", "v", "o", "wi", "wo"}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    model = add_adapter(gpt2, lora_config(ModelArguments(use_peft=True)))
    assert _adapted_layers(model) == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_no_target(folder, target):
    config = lora_config(ModelArguments(use_peft=True, lora_target_modules=["q_proj", target]))
    with pytest.raises(UserError, match=f"targets .*{target}, and this model's output head and input embeddings"):
        add_adapter(_tied_llama(), config)
    untied = add_adapter(load_model(str(folder)), config)
    assert any(target in name for name, parameter in untied.named_parameters() if parameter.requires_grad)


def test_targets_that_do_not_exist_are_listed(folder):
    config = lora_config(ModelArguments(use_peft=True, lora_target_modules=["query", "value"]))
    with pytest.raises(
        UserError, match="linear layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ):
        add_adapter(load_model(str(folder)), config)


def test_default_adapter_of_a_mixture_leaves_its_experts_alone(caplog):
    model = add_adapter(_mixture(), lora_config(ModelArguments(use_peft=True)))
    assert _adapted_layers(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "no expert. Name experts in lora_target_parameters" in caplog.text


def test_experts_are_adapted_through_target_parameters():
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    arguments = ModelArguments(use_peft=True, lora_target_parameters=experts, lora_dropout=0.0)
    model = add_adapter(_mixture(), lora_config(arguments))
    _perturb(model)
    _loss(model).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and ".experts." in n}
    assert len(gradients) == 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_experts_take_no_dropout_and_no_dora():
    with pytest.raises(UserError, match=r"Set lora_dropout=0"):
        lora_config(ModelArguments(use_peft=True, lora_target_parameters=["experts.down_proj"]))
    with pytest.raises(UserError, match="DoRA needs linear layers"):
        lora_config(
            ModelArguments(use_peft=True, lora_target_parameters=["experts.down_proj"], lora_dropout=0, use_dora=True)
        )
    config = lora_config(ModelArguments(use_peft=True, lora_target_modules=["q_proj", "down_proj"]))
    with pytest.raises(UserError, match="set lora_dropout=0"):
        add_adapter(_mixture(), config)


def test_the_given_settings_stay_as_they_are(folder):
    config = lora_config(ModelArguments(use_peft=True))
    before = copy.deepcopy(config.to_dict())
    add_adapter(load_model(str(folder)), config)
    assert config.to_dict() == before


# ---------------------------------------------------------------- precision and gradients


@pytest.mark.parametrize("quantised", ["load_in_4bit", "load_in_8bit", None])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_flow_through_checkpointing(folder, quantised, reentrant):
    """Checkpointing must give the adapters the gradients they have without it; reentrant alone gives them none."""
    arguments = ModelArguments(use_peft=True, lora_dropout=0.0, **({quantised: True} if quantised else {}))
    kwargs = {"use_reentrant": reentrant}

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        quantization = quantization_config(arguments, torch.float32)
        torch.manual_seed(0)
        model = add_adapter(
            load_model(str(folder), quantization_config=quantization),
            lora_config(arguments),
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=kwargs,
        )
        if checkpointing:
            # Not through activation_checkpointing_enable: recent versions of it make the input require gradients too.
            decoder = model.base_model.model
            decoder._set_gradient_checkpointing(True, lambda *a: torch.utils.checkpoint.checkpoint(*a, **kwargs))
        model.train()
        _perturb(model)
        _loss(model).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, actual = gradients(False), gradients(True)
    assert all(gradient is not None for gradient in actual.values())
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantised", ["load_in_4bit", "load_in_8bit", None])
def test_low_precision_base_keeps_its_dtype_under_a_float32_adapter(folder, dtype, quantised):
    arguments = ModelArguments(use_peft=True, **({quantised: True} if quantised else {}))
    base = load_model(str(folder), dtype=dtype, quantization_config=quantization_config(arguments, dtype))
    model = add_adapter(base, lora_config(arguments))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == ({dtype, torch.int8} if quantised == "load_in_8bit" else {dtype})
    loss = _loss(model, dtype=dtype)
    loss.backward()
    assert math.isfinite(loss.item())
    assert any(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("quantised", ["load_in_4bit", "load_in_8bit"])
def test_evaluation_does_not_change_the_gradients_after_it(tmp_path, quantised):
    """bitsandbytes packs 4-bit weights for inference on some CPUs; without a remedy most gradients are wrong then."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    arguments = ModelArguments(use_peft=True, lora_dropout=0.0, **{quantised: True})
    base = load_model(str(tmp_path), quantization_config=quantization_config(arguments, torch.float32))
    model = add_adapter(base, lora_config(arguments))
    _perturb(model)

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        _loss(model).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    before = gradients()
    model.eval()
    with torch.no_grad():
        _loss(model)
    for expected, actual in zip(before, gradients(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("quantised", [True, False])
def test_every_weight_has_one_dtype_under_zero3(folder, quantised):
    arguments = ModelArguments(use_peft=True, use_dora=True, load_in_4bit=quantised)
    quantization = quantization_config(arguments, torch.bfloat16)
    base = load_model(str(folder), dtype=torch.bfloat16, quantization_config=quantization)
    model = add_adapter(base, lora_config(arguments), zero3=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("quantised", ["load_in_4bit", "load_in_8bit"])
def test_quantised_model_without_an_adapter_is_refused(folder, quantised):
    arguments = ModelArguments(use_peft=True, **{quantised: True})
    model = load_model(str(folder), quantization_config=quantization_config(arguments, torch.float32))
    with pytest.raises(UserError, match="has no adapter: quantised weights are rounded"):
        add_adapter(model)


def test_plain_model_comes_back_as_it_is(folder):
    model = load_model(str(folder))
    assert add_adapter(model) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------- continuing


@pytest.mark.parametrize("quantised", [False, True])
def test_continuing_an_adapter(folder, adapter, quantised):
    arguments = ModelArguments(adapter_name_or_path=str(adapter), load_in_4bit=quantised)
    quantization = quantization_config(arguments, torch.float32)
    reference = PeftModel.from_pretrained(load_model(str(folder), quantization_config=quantization), adapter)
    reference.train()  # the adapter has no dropout, and inference would go through other kernels
    base = load_model(str(folder), quantization_config=quantization)
    model = add_adapter(base, lora_config(arguments), adapter_name_or_path=str(adapter))
    model.train()
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits)
    assert model.peft_config["default"].r == 4
    _loss(model).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_continuing_with_other_settings_is_refused(folder, adapter):
    with pytest.raises(UserError, match=r"Both peft_config and the adapter .* are given"):
        add_adapter(load_model(str(folder)), LoraConfig(r=8), adapter_name_or_path=str(adapter))


def test_adapter_of_another_model_is_refused(adapter):
    with pytest.raises(UserError, match=r"does not fit .* it was trained on"):
        add_adapter(
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=64,
                    hidden_size=16,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                )
            ),
            adapter_name_or_path=str(adapter),
        )


def test_missing_adapter_says_so(folder, tmp_path):
    with pytest.raises(UserError, match="neither an existing folder nor the name of a model"):
        add_adapter(load_model(str(folder)), adapter_name_or_path=str(tmp_path / "absent"))


def test_a_given_peft_model_is_trained_on(folder, adapter):
    model = PeftModel.from_pretrained(load_model(str(folder)), adapter, is_trainable=True)
    assert add_adapter(model) is model
    with pytest.raises(UserError, match="a PeftModel already, so peft_config would add a second adapter"):
        add_adapter(model, LoraConfig())
    with pytest.raises(UserError, match="adapter_name_or_path would add a second adapter"):
        add_adapter(model, adapter_name_or_path=str(adapter))


def test_a_frozen_peft_model_is_refused(folder, adapter):
    with pytest.raises(UserError, match="is_trainable=True"):
        add_adapter(PeftModel.from_pretrained(load_model(str(folder)), adapter))


# ---------------------------------------------------------------- what is saved


def test_saved_adapter_names_hub_id_and_commit_of_its_base(folder, tmp_path):
    base = load_model(str(folder))
    base.name_or_path = f"/root/.cache/huggingface/hub/models--some-org--tiny/snapshots/{COMMIT}"
    model = add_adapter(base, lora_config(ModelArguments(use_peft=True)))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("some-org/tiny", COMMIT)
    assert "snapshots" not in (tmp_path / "adapter_config.json").read_text()
    assert not list(tmp_path.glob("*.bin"))


def test_given_peft_model_gets_its_base_named_too(folder, tmp_path):
    base = load_model(str(folder))
    base.name_or_path = f"/root/.cache/huggingface/hub/models--some-org--tiny/snapshots/{COMMIT}"
    model = add_adapter(get_peft_model(base, LoraConfig(target_modules=["q_proj"])))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some-org/tiny"


# ---------------------------------------------------------------- dropout


def _with_dropout() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    llama.attention_dropout = 0.4
    return {
        "llama": LlamaForCausalLM(llama),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0.4)
        ),
        "falcon": FalconForCausalLM(
            FalconConfig(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                attention_dropout=0.4,
                hidden_dropout=0.4,
            )
        ),
        "t5": _t5(),
        "bart": BartForConditionalGeneration(
            BartConfig(
                vocab_size=64,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_position_embeddings=64,
                attention_dropout=0.4,
                activation_dropout=0.4,
                encoder_layerdrop=0.4,
                decoder_layerdrop=0.4,
            )
        ),
    }


def _is_random(model: nn.Module) -> bool:
    model.train()
    return len({round(_loss(model).item(), 5) for _ in range(4)}) > 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "t5", "bart"])
def test_dropout_of_the_base_is_switched_off_wherever_it_is(name):
    model = _with_dropout()[name]
    assert _is_random(model)
    disable_base_dropout(model)
    assert not _is_random(model)


@pytest.mark.parametrize("before", [True, False])
def test_dropout_of_the_adapter_stays(before):
    model = _with_dropout()["llama"]
    if before:
        disable_base_dropout(model)
    adapted = add_adapter(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM"))
    if not before:
        disable_base_dropout(adapted)
    _perturb(adapted)
    layer = adapted.base_model.model.model.layers[0].self_attn
    assert layer.q_proj.lora_dropout["default"].p == 0.5
    assert layer.attention_dropout == 0.0
    assert _is_random(adapted)
    with adapted.disable_adapter():
        assert not _is_random(adapted)
