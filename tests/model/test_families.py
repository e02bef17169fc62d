"""Packed and padded layouts give the same loss and gradients, family by family; what cannot be packed is told."""

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from orpo_dist.loss import Objective
from orpo_dist.model.attention import flex as attention_flex
from orpo_dist.model.attention import interface as attention
from orpo_dist.model.attention import sequences as attention_sequences
from orpo_dist.model.attention.flex import flex_packed_attention
from orpo_dist.model.attention.interface import PACKED_ATTENTION
from orpo_dist.model.attention.kernels import Candidate, on_gathered_keys
from orpo_dist.model.head.install import install_head
from orpo_dist.model.packed.mixers import find_token_mixers
from orpo_dist.model.packed.rotary import fix_rotary_frequencies
from orpo_dist.model.packed.switch import use_packed_layout
from orpo_dist.model.packed.verify import verify_layout
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.layout import PackedLayoutError
from orpo_dist.packing.padded import PaddedCollator
from tests.model.attention.flex_reference import reference_flex
from tests.model.attention.varlen_reference import reference_kernel
from tests.model.packing_reference import assert_equal, packed_result, padded_result, rows
from tests.model.tiny_models import COMMON, HEADS, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*falling back to its reference PyTorch implementation"),
]
PACKED = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma2", "gemma3", "phi3", "olmo2", "gpt_oss", "cohere2",
          "qwen3_5", "bamba", "granite_hybrid", "lfm2", "gpt2", "stablelm", "nemotron", "jamba")  # fmt: skip
DROP_KEYWORDS = ("stablelm", "nemotron", "jamba")
UNSHARED = {"jamba": 1, "qwen3_5": 3, "bamba": 1, "granite_hybrid": 1, "lfm2": 1}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_equals_padded(family, checkpointing):
    model = tiny_model(family)
    expected = padded_result(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    verdict = use_packed_layout(model, max_length=64)
    assert verdict.ok and len(verdict.unshared) == UNSHARED.get(family, 0)
    assert_equal(packed_result(model), expected)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "qwen3_5"])
def test_packing_without_sharing_equals_padded(family):
    model = tiny_model(family)
    expected = padded_result(model, nll_scope="completion")
    use_packed_layout(model, max_length=64)
    assert_equal(packed_result(model, prefix_sharing=False, nll_scope="completion"), expected)


@pytest.mark.parametrize("family", ["qwen3", "bamba"])
def test_lora_before_and_after_the_switch(family):
    for wrap_first in (True, False):
        model = tiny_model(family)
        verdict = None if wrap_first else use_packed_layout(model, max_length=64)
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
        if verdict is None:
            verdict = use_packed_layout(model, max_length=64)
        assert verify_layout(model, verdict, prefix_sharing=True).ok
        ours = packed_result(model)
        verdict.restore()
        assert_equal(ours, padded_result(model))


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [False, True], ids=["lora", "4bit"])
@pytest.mark.parametrize("family", PACKED)
def test_adapters_of_every_family_with_checkpointing(tmp_path, family, quantised):
    """Packed and recomputed against padded and not recomputed, gradients of the adapter."""
    model = tiny_model(family)
    if quantised:
        pytest.importorskip("bitsandbytes")
        model.save_pretrained(tmp_path)
        options = t.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = type(model).from_pretrained(tmp_path, quantization_config=options, dtype=torch.float32).train()
        assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    torch.manual_seed(1)
    options = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    model = get_peft_model(model, options, autocast_adapter_dtype=False)
    expected = padded_result(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    use_packed_layout(model, max_length=64)
    # The recurrence of qwen3_5 is float32 whatever the model's dtype is, and its decay rates cancel: see tiny_model.
    assert_equal(packed_result(model), expected, relative=1e-4 if family == "qwen3_5" else 1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen3_5"])
@pytest.mark.parametrize("sharing", [True, False])
def test_the_varlen_path_equals_padded(monkeypatch, family, sharing):
    kernel = Candidate("reference", on_gathered_keys(reference_kernel))
    monkeypatch.setattr(attention, "trusted_kernel", lambda case: kernel)
    model = tiny_model(family)
    expected = padded_result(model)
    use_packed_layout(model, max_length=64)
    assert_equal(packed_result(model, prefix_sharing=sharing), expected)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gemma3"])
@pytest.mark.parametrize("sharing", [True, False])
def test_the_flex_path_equals_padded(monkeypatch, family, sharing):
    monkeypatch.setattr(attention, "trusted_kernel", lambda case: Candidate("flex", flex_packed_attention))
    monkeypatch.setattr(attention_flex, "_compiled_flex", lambda: reference_flex)
    model = tiny_model(family)
    expected = padded_result(model)
    use_packed_layout(model, max_length=64)
    assert_equal(packed_result(model, prefix_sharing=sharing), expected)


@pytest.mark.parametrize("family", ["gemma2", "bamba", "stablelm", "jamba"])
def test_reentrant_checkpointing(family):
    model = tiny_model(family)
    expected = padded_result(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    use_packed_layout(model, max_length=64)
    assert_equal(packed_result(model), expected)


def test_recomputation_uses_the_layout_of_its_own_forward():
    """Two packed forwards before one backward: the first is recomputed with its own layout."""
    for family in ("mistral", "bamba", *DROP_KEYWORDS):
        model = tiny_model(family)
        use_packed_layout(model, max_length=64)
        collator = PackedCollator(True, "sequence")
        batches = [collator(rows()[:2]), collator([rows()[1], rows()[0]])]  # the same number of tokens, laid out anew

        def run(model=model, batches=batches):
            total = sum(model(**batch, use_cache=False).logits.square().mean() for batch in batches)
            total.backward()
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            return found

        plain = run()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, gradient in run().items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- routers


def test_router_loss_per_micro_batch():
    """The padded layout counts each prompt token twice, so with weight 2 on the prompts both losses are equal."""
    model = tiny_model("qwen3_moe")
    config = model.config
    padded = PaddedCollator(0, "sequence")(rows())
    del padded["orpo_layout"]
    outputs = model(**padded, use_cache=False, output_router_logits=True)
    expected = load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, padded["attention_mask"]
    )
    use_packed_layout(model, max_length=64)
    packed = PackedCollator(True, "sequence")(rows())
    outputs = model(**packed, use_cache=False, output_router_logits=True)
    weights = torch.ones_like(packed["input_ids"])
    for s in packed["orpo_layout"].segments:
        weights[0, s.start : s.start + s.prompt] = 2
    ours = load_balancing_loss_func(outputs.router_logits, config.num_experts, config.num_experts_per_tok, weights)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    once = load_balancing_loss_func(outputs.router_logits, config.num_experts, config.num_experts_per_tok)
    torch.testing.assert_close(outputs.aux_loss, once)  # what a packed forward reports: every token once


# ---------------------------------------------------------------- rotary embeddings that look at the batch


def _dynamic(kind: str) -> t.PreTrainedModel:
    torch.manual_seed(0)
    if kind == "dynamic":
        parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        return t.LlamaForCausalLM(t.LlamaConfig(**{**HEADS, "max_position_embeddings": 16}, rope_parameters=parameters))
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    }
    return t.Phi3ForCausalLM(t.Phi3Config(**COMMON, rope_parameters=parameters))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_are_those_of_max_length(kind):
    moving, fixed, short = (_dynamic(kind).model.rotary_emb for _ in range(3))
    assert list(fix_rotary_frequencies(fixed, max_length=64)) == [""]
    assert not fix_rotary_frequencies(fixed, max_length=64)  # nothing left to fix
    fix_rotary_frequencies(short, max_length=16)
    x, long_positions, positions = torch.zeros(1), torch.arange(64)[None], torch.arange(16)[None]
    for ours, theirs in zip(fixed(x, long_positions), moving(x, long_positions), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, expected in zip(fixed(x, positions), fixed(x, long_positions), strict=True):
        torch.testing.assert_close(ours, expected[:, :16])  # whatever the batch at hand
    for ours, theirs in zip(short(x, positions), _dynamic(kind).model.rotary_emb(x, positions), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_moving_rotary_families_equal_padded(kind):
    model = _dynamic(kind)
    verdict = use_packed_layout(model, max_length=64)
    assert verdict.fixed_rotary == ["rotary_emb"]
    ours = packed_result(model)
    verdict.restore()
    assert_equal(ours, padded_result(model))


# ---------------------------------------------------------------- what is packed, what is not


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_only_the_text_model_of_a_vision_language_model_changes(family):
    model = tiny_model(family)
    expected = padded_result(model)
    verdict = use_packed_layout(model, max_length=64)
    assert model.config.text_config._attn_implementation == PACKED_ATTENTION
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert verify_layout(model, verdict, prefix_sharing=True).ok
    ours = packed_result(model)
    assert_equal(ours, expected)
    verdict.restore()
    assert model.config.text_config._attn_implementation == model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_alibi_stays_padded(family):
    model = tiny_model(family)
    expected = padded_result(model)
    verdict = use_packed_layout(model, max_length=64)
    assert not verdict.ok and "attention interface" in verdict.reason
    verdict.restore()
    assert_equal(padded_result(model), expected)


def test_encoder_decoder_stays_padded():
    model = t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    assert "encoder-decoder" in use_packed_layout(model, max_length=64).reason


def test_chunked_attention_is_packed_within_a_chunk_only():
    config = t.Llama4TextConfig(**HEADS, attention_chunk_size=32, num_local_experts=2, intermediate_size_mlp=32,
                                num_experts_per_tok=1)  # fmt: skip
    model = t.Llama4ForCausalLM(config)
    for max_length in (None, 64):
        assert "attention_chunk_size=32" in use_packed_layout(model, max_length=max_length).reason
    expected = padded_result(model)
    assert use_packed_layout(model, max_length=32).ok
    assert_equal(packed_result(model), expected)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_llama4_takes_its_temperature_from_each_sequences_own_positions(sharing, checkpointing):
    config = t.Llama4TextConfig(
        **HEADS, attention_chunk_size=64, num_local_experts=2, intermediate_size_mlp=32, num_experts_per_tok=1,
        no_rope_layers=[1, 0], attn_temperature_tuning=True, floor_scale=4, attn_scale=0.7,
    )  # fmt: skip
    model = t.Llama4ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # scores far enough apart for a temperature to matter
    expected = padded_result(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    verdict = use_packed_layout(model, max_length=64)
    assert verdict.ok
    assert_equal(packed_result(model, prefix_sharing=sharing), expected)
    with verdict.paused():
        assert_equal(padded_result(model), expected)
    assert verify_layout(model, verdict, prefix_sharing=sharing).ok
    verdict.restore()
    layer = model.model.layers[1].self_attn
    assert layer.attn_temperature_tuning and "orpo_query_scale" not in vars(layer)
    assert_equal(padded_result(model), expected)


PHIMOE = {**COMMON, "num_local_experts": 2}
QWEN2_MOE = {**COMMON, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
             "shared_expert_intermediate_size": 16, "use_sliding_window": True, "max_window_layers": 1}  # fmt: skip


@pytest.mark.parametrize("config", [
    t.PhimoeConfig(**PHIMOE, sliding_window=6),
    t.Qwen2MoeConfig(**QWEN2_MOE, sliding_window=6),
    t.DogeConfig(**COMMON, sliding_window=6),
], ids=lambda config: config.model_type)  # fmt: skip
def test_a_window_in_masks_alone_stays_padded_without_a_check(config):
    model = t.AutoModelForCausalLM.from_config(config)
    assert "sliding window of 6 tokens is in its masks alone" in use_packed_layout(model, max_length=64).reason
    assert "masks alone" not in use_packed_layout(model, max_length=6).reason


def test_a_window_that_no_layer_uses_stays_packed():
    config = t.PhimoeConfig(**PHIMOE, sliding_window=131072)
    model = t.PhimoeForCausalLM(config)
    expected = padded_result(model)
    assert use_packed_layout(model, max_length=64).ok
    assert_equal(packed_result(model), expected)
    config = t.Qwen2MoeConfig(**{**QWEN2_MOE, "use_sliding_window": False}, sliding_window=6)
    assert use_packed_layout(t.Qwen2MoeForCausalLM(config), max_length=64).ok


def test_a_mixer_that_gets_no_layout_is_found_out():
    class Indirect(t.models.jamba.modeling_jamba.JambaMambaDecoderLayer):
        """Its source does not show that it drops keywords."""

        def forward(self, hidden_states, **kwargs):
            mixer = self.mamba
            return hidden_states + mixer(hidden_states)

    model, expected = tiny_model("jamba"), tiny_model("jamba")
    for one in (model, expected):
        weights = one.model.layers[0].state_dict()
        one.model.layers[0] = Indirect(one.config, 0)
        one.model.layers[0].load_state_dict(weights)
    verdict = use_packed_layout(model, max_length=64)
    check = verify_layout(model, verdict, prefix_sharing=True)
    assert not check.ok and "JambaMambaMixer) receives no layout" in check.reason
    verdict.restore()
    assert_equal(padded_result(model), padded_result(expected))


def test_models_that_pass_no_keywords_to_their_layers_stay_padded():
    model = t.MambaForCausalLM(t.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8))
    verdict = use_packed_layout(model, max_length=64)
    assert not verify_layout(model, verdict, prefix_sharing=True).ok


def test_an_indexer_inside_attention_stays_padded():
    class Indexer(nn.Module):
        def forward(self, x, past_key_values=None):
            return x

    model = tiny_model("llama")
    model.model.layers[1].self_attn.indexer = Indexer()
    verdict = use_packed_layout(model, max_length=64)
    assert "layers.1.self_attn holds another token mixer (layers.1.self_attn.indexer)" in verdict.reason
    assert model.config._attn_implementation == "sdpa"


def test_mixers_of_a_hybrid():
    mixers = find_token_mixers(tiny_model("bamba").model)
    assert [(mixer.name, mixer.uses_interface) for mixer in mixers] == [
        ("layers.0.mamba", False),
        ("layers.1.self_attn", True),
    ]


# ---------------------------------------------------------------- switching back and forth


@pytest.mark.parametrize("family", ["gemma2", "qwen3_5"])
def test_pause_and_restore(family, tmp_path):
    model = tiny_model(family).eval()
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    before = model.config._attn_implementation
    verdict = use_packed_layout(model, max_length=64)
    assert model.config._attn_implementation == PACKED_ATTENTION
    with pytest.raises(PackedLayoutError, match="received no orpo_layout"):
        model(input_ids=ids)
    with verdict.paused():
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), expected)
    assert verify_layout(model, verdict, prefix_sharing=True).ok and not model.training
    model.save_pretrained(tmp_path)
    assert PACKED_ATTENTION not in (tmp_path / "config.json").read_text()
    verdict.restore()
    verdict.restore()
    assert model.config._attn_implementation == before
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------- verification


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", PACKED)
def test_verification_passes(family, dtype):
    model = tiny_model(family).to(dtype)
    verdict = use_packed_layout(model, max_length=64)
    for sharing in (True, False):
        check = verify_layout(model, verdict, prefix_sharing=sharing)
        assert check.ok and model.training, check
    assert model.config._attn_implementation == PACKED_ATTENTION


def test_verification_with_the_loss_head_inside_the_forward():
    model = tiny_model("gemma2")
    install_head(model, Objective())
    verdict = use_packed_layout(model, max_length=64)
    assert verify_layout(model, verdict, prefix_sharing=True).ok


def _no_window(layout, queries, keys, window, device, visible=attention_sequences._visible):
    return visible(layout, queries, keys, None, device)


def _window_too_long(layout, queries, keys, window, device, visible=attention_sequences._visible):
    return visible(layout, queries, keys, window and window + 1, device)


def _top_left(layout, queries, keys, window, device, visible=attention_sequences._visible):
    return torch.ones(queries, keys, dtype=torch.bool).tril()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [_no_window, _window_too_long, _top_left])
@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
def test_verification_finds_faults(monkeypatch, family, fault, dtype):
    model = tiny_model(family).to(dtype)
    model.config.sliding_window = 4096  # as in a real model: far beyond what the check's batch reaches
    for module in model.modules():
        if isinstance(vars(module).get("sliding_window"), int):
            module.sliding_window = 4096
    verdict = use_packed_layout(model, max_length=8192)
    assert verify_layout(model, verdict, prefix_sharing=True).ok
    monkeypatch.setattr(attention_sequences, "_visible", fault)
    check = verify_layout(model, verdict, prefix_sharing=True)
    assert not check.ok and check.difference > 0.1 and "differ by" in check.reason
    assert model.config.sliding_window == 4096


def test_verification_finds_wrong_positions():
    model = tiny_model("gpt2")
    verdict = use_packed_layout(model, max_length=64)
    wte = model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    assert not verify_layout(model, verdict, prefix_sharing=True).ok
    wte.remove()
    assert verify_layout(model, verdict, prefix_sharing=True).ok


def test_a_forward_that_takes_no_keyword_is_told():
    class Plain(t.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
            return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache)

    model = Plain(t.LlamaConfig(**HEADS))
    verdict = use_packed_layout(model, max_length=64)
    check = verify_layout(model, verdict, prefix_sharing=True)
    assert not check.ok and "orpo_layout" in check.reason
