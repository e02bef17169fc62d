"""The loss head in whole models: against the loss and gradients from full logits of the same packed row."""

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import nn

from orpo_dist.loss import Objective, PairScores, orpo_loss
from orpo_dist.model.attention.interface import PACKED_ATTENTION
from orpo_dist.model.head.chunked_pass import LogitTransform
from orpo_dist.model.head.install import install_head, measure_transform
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.layout import PackedLayoutError
from tests.model.packing_reference import rows

VOCAB = 97
OBJECTIVE = Objective(beta=0.7, label_smoothing=0.1)
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": t.LlamaConfig(**COMMON),
    "llama_tied": t.LlamaConfig(**{**COMMON, "tie_word_embeddings": True}),
    "gemma2": t.Gemma2Config(**COMMON, final_logit_softcapping=1.5, query_pre_attn_scalar=8),
    "cohere": t.CohereConfig(**COMMON, logit_scale=0.25),
    "granite": t.GraniteConfig(**COMMON, logits_scaling=3.0),
    "minicpm3": t.MiniCPM3Config(
        **{**COMMON, "num_key_value_heads": 4}, dim_model_base=8, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8,
    ),
    "phi_with_bias": t.PhiConfig(**COMMON),
    "qwen3_moe": t.Qwen3MoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    loss: torch.Tensor
    scores: PairScores
    gradients: dict[str, torch.Tensor]


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(
        CONFIGS[name], attn_implementation="eager", experts_implementation="eager"
    )
    model = model.to(dtype)
    with torch.no_grad():  # larger than initialised, so that scale and softcap matter
        model.get_output_embeddings().weight.mul_(30)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    model.set_attn_implementation(PACKED_ATTENTION)
    return model.eval()


def batch(nll_scope: str = "sequence") -> dict:
    inputs = PackedCollator(True, nll_scope)(rows(VOCAB))
    inputs["orpo_layout"].tokens = torch.tensor(200.0, dtype=torch.float64)
    inputs["orpo_layout"].pairs = torch.tensor(16.0, dtype=torch.float64)
    return inputs


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def from_logits(model: nn.Module, nll_scope: str = "sequence", aux_coef: float = 0.0) -> Result:
    """The same loss from full logits. For models without install_head."""
    inputs = batch(nll_scope)
    layout = inputs["orpo_layout"]
    outputs = model(**inputs, use_cache=False, **({"output_router_logits": True} if aux_coef else {}))
    logits = outputs.logits[0, layout.rows]
    logps = torch.log_softmax(logits, 1).gather(1, layout.targets[:, None])[:, 0]
    parts = [
        (p, z) for p, z in zip(*(x.split([s.scored for s in layout.segments]) for x in (logps, logits)), strict=True)
    ]
    split = [
        [x.split([s.nll_prompt, s.chosen, s.rejected]) for x in part]
        for part, s in zip(parts, layout.segments, strict=True)
    ]
    scores = PairScores(
        chosen_logps=torch.stack([p[1].mean() for p, _ in split]),
        rejected_logps=torch.stack([p[2].mean() for p, _ in split]),
        nll_sum=-torch.stack([p[0].sum() + p[1].sum() for p, _ in split]),
        nll_tokens=torch.tensor([s.nll_prompt + s.chosen for s in layout.segments], dtype=logps.dtype),
        chosen_logits=torch.stack([z[1].mean() for _, z in split]),
        rejected_logits=torch.stack([z[2].mean() for _, z in split]),
        weight=layout.weight.to(logps.dtype),
    )
    loss = orpo_loss(scores, OBJECTIVE, layout.tokens, layout.pairs)
    if aux_coef:
        loss = loss + aux_coef * scores.nll_tokens.sum() / layout.tokens * outputs.aux_loss
    loss.backward()
    return Result(loss.detach(), scores, gradients_of(model))


def from_head(model: nn.Module, nll_scope: str = "sequence") -> Result:
    inputs = batch(nll_scope)
    loss = model(**inputs)
    loss.backward()
    return Result(loss.detach(), inputs["orpo_layout"].scores, gradients_of(model))


def assert_equal(ours: Result, theirs: Result, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=tolerance, atol=tolerance)
    for name, value in vars(theirs.scores).items():
        torch.testing.assert_close(getattr(ours.scores, name), value.detach(), rtol=tolerance, atol=tolerance, msg=name)
    assert ours.gradients.keys() == theirs.gradients.keys() and theirs.gradients
    for name, expected in theirs.gradients.items():
        close = (ours.gradients[name] - expected).abs().max() <= tolerance * (1 + expected.abs().max())
        assert close, (name, (ours.gradients[name] - expected).abs().max(), expected.abs().max())


@pytest.mark.parametrize("nll_scope", ["sequence", "completion"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_full_logits(name, nll_scope):
    model = build(name)
    expected = from_logits(model, nll_scope)
    install_head(model, OBJECTIVE, chunk_rows=5)
    assert_equal(from_head(model, nll_scope), expected)


def test_load_balancing_loss_joins_by_share_of_tokens():
    model = build("qwen3_moe")
    expected = from_logits(model, aux_coef=0.3)
    install_head(model, OBJECTIVE, router_aux_loss_coef=0.3)
    assert_equal(from_head(model), expected)


def test_without_the_keyword_nothing_changes():
    model = build("gemma2")
    model.set_attn_implementation("eager")
    names, ids = list(model.state_dict()), torch.arange(3, 20)[None]
    before = model(ids).logits
    install_head(model, OBJECTIVE)
    assert list(model.state_dict()) == names
    assert torch.equal(model(ids).logits, before)
    model.set_attn_implementation(PACKED_ATTENTION)
    from_head(model)
    model.set_attn_implementation("eager")
    assert list(model.state_dict()) == names
    assert torch.equal(model(ids).logits, before)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 19)


LORA = {
    "all_linear": dict(target_modules="all-linear"),
    "on_the_head": dict(target_modules=["q_proj", "lm_head"], use_rslora=True),
    "head_as_module_to_save": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("first", ["head first", "adapter first"])
@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi_with_bias"])
def test_adapters(name, kind, first):
    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **LORA[kind])
        return get_peft_model(model, config).double()

    expected = from_logits(adapted(build(name)))
    model = build(name)
    if first == "head first":
        install_head(model, OBJECTIVE, chunk_rows=5)
        model = adapted(model)
    else:
        model = adapted(model)
        install_head(model, OBJECTIVE, chunk_rows=5)
    assert_equal(from_head(model), expected)
    if kind == "on_the_head":
        assert {"lora_A", "lora_B"} <= {
            part for key in expected.gradients if "lm_head" in key for part in key.split(".")
        }


def test_disabled_and_merged_adapters():
    model = build("llama")
    bare = from_logits(copy.deepcopy(model)).loss
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(model, config).double()
    install_head(model, OBJECTIVE)
    with torch.no_grad():
        adapted = model(**batch())
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch()), bare)
        assert abs(adapted - bare) > 1e-3
        model.merge_adapter()
        torch.testing.assert_close(model(**batch()), adapted)


def test_gradient_checkpointing():
    model = build("llama").train()
    expected = from_logits(model)
    # renamed in transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    install_head(model, OBJECTIVE)
    assert_equal(from_head(model), expected)


def test_evaluation_forms_no_gradients():
    model = build("llama")
    expected = from_logits(model)
    install_head(model, OBJECTIVE)
    inputs = batch()
    with torch.no_grad():
        loss = model(**inputs)
    assert not loss.requires_grad
    assert_equal(Result(loss, inputs["orpo_layout"].scores, expected.gradients), expected)


def test_a_second_install_replaces_the_first():
    model = build("llama")
    expected = from_logits(model)
    install_head(model, Objective(beta=5.0))
    assert abs(from_head(model).loss - expected.loss) > 1e-2
    install_head(model, OBJECTIVE)
    assert_equal(from_head(model), expected)


@pytest.mark.parametrize("kind", ["plain", "on_the_head"])
def test_weights_are_read_where_hooks_have_gathered_them(kind):
    """As under ZeRO-3: outside the calls of their module, the weights are not there."""
    model = build("llama")
    install_head(model, OBJECTIVE)
    if kind == "on_the_head":
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head"])).double()
    expected = from_head(model)
    whole, calls = {}, []
    for name, module in model.named_modules():
        if "lm_head" in name and "weight" in module._parameters:
            whole[module] = module.weight.data

            def gather(module, args, name=name):
                calls.append(name)
                module.weight.data = whole[module]

            def release(module, args, output):
                module.weight.data = torch.empty(0, dtype=torch.float64)

            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
            module.weight.data = torch.empty(0, dtype=torch.float64)
    inputs = batch()
    loss = model(**inputs)
    assert sorted(calls) == sorted(name for name, m in model.named_modules() if m in whole)  # each one once
    for module, weight in whole.items():
        module.weight.data = weight  # as ZeRO-3 does before the backward
    loss.backward()
    assert_equal(Result(loss.detach(), inputs["orpo_layout"].scores, gradients_of(model)), expected)


def test_statistics_are_float32_in_a_half_precision_model():
    model = build("llama", torch.bfloat16)
    install_head(model, OBJECTIVE)
    result = from_head(model)
    assert all(value.dtype == torch.float32 for value in vars(result.scores).values())
    assert {g.dtype for g in result.gradients.values()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [dict(use_dora=True), dict(lora_bias=True)], ids=["dora", "lora_bias"])
def test_other_adapters_on_the_head_are_refused(config):
    model = build("phi_with_bias")
    install_head(model, OBJECTIVE)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], **config)).double()
    with pytest.raises(PackedLayoutError, match="not plain LoRA"):
        model(**batch())


def test_quantised_head_is_refused():
    model = build("llama")
    install_head(model, OBJECTIVE)
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(PackedLayoutError, match="quantised"):
        model(**batch())


def test_model_without_output_layer_is_refused():
    with pytest.raises(PackedLayoutError, match="no output layer"):
        install_head(build("llama").model, OBJECTIVE)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda z: z, LogitTransform(1.0, None)),
        (lambda z: z / 8.0, LogitTransform(0.125, None)),
        (lambda z: 30.0 * torch.tanh(z * 0.0625 / 30.0), LogitTransform(0.0625, 30.0)),
        (lambda z: 50.0 * torch.tanh((z / 50.0).float()), LogitTransform(1.0, 50.0)),
    ],
)
def test_measured_transform(function, expected):
    probe = torch.linspace(-40, 40, VOCAB, dtype=torch.float64)
    probe[0], probe[1] = 2.0**-20, 3.0e4
    got = measure_transform(probe, function(probe.expand(1, 1, -1)))
    assert got.scale == pytest.approx(expected.scale, rel=1e-7)
    assert got.softcap == (expected.softcap and pytest.approx(expected.softcap, rel=1e-7))


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z[..., :90],
        lambda z: z.clone().index_fill_(2, torch.tensor([5, 6]), -1e9),
        lambda z: z + 1,
        lambda z: z.clamp(-10, 10),
    ],
    ids=["cut", "masked", "shifted", "clamped"],
)
def test_other_changes_of_the_logits_are_refused(function):
    probe = torch.linspace(-40, 40, VOCAB, dtype=torch.float64)
    probe[0], probe[1] = 2.0**-20, 3.0e4
    with pytest.raises(PackedLayoutError, match="factor and a softcap"):
        measure_transform(probe, function(probe.expand(1, 1, -1)))
