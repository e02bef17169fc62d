"""The FLOPs of a model by formula, against PyTorch's own count."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MixtralConfig

from orpo_dist.loss import Objective
from orpo_dist.model.flops import ModelFlops
from orpo_dist.model.forward import PairForward
from orpo_dist.model.packed.asked_layout import LayoutOptions
from orpo_dist.model.packed.choose_layout import LayoutChoice
from orpo_dist.packing.lengths import PairLengths
from tests.model.tiny_models import tiny_model

LENGTHS = [PairLengths(60, 30, 41), PairLengths(9, 50, 12), PairLengths(80, 20, 33)]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def packed_layout(model):
    layout = LayoutChoice(
        LayoutOptions(
            objective=Objective(),
            padding_free=True,
            prefix_sharing=True,
            verify_layout=False,
            loss_chunk_size=None,
            nll_scope="sequence",
            pad_token_id=0,
            max_length=None,
            compute_dtype=torch.float32,
        )
    )
    layout.choose(model, router_aux_loss_coef=0.0)
    return layout


@pytest.mark.parametrize("family", ["llama", "llama with LoRA", "gpt2"])
def test_linear_layers_and_head_cost_what_the_formula_says(tiny_llama, family):
    if family == "gpt2":
        model = tiny_model("gpt2")
    else:
        # Twelve layers: with LoRA the first one's input needs no gradient, which the formula does not know.
        model = LlamaForCausalLM(LlamaConfig(**{**tiny_llama(512).config.to_dict(), "num_hidden_layers": 12}))
    if family == "llama with LoRA":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    choice = packed_layout(model)
    rows = [
        {"prompt_ids": [5] * p.prompt, "chosen_ids": [6] * p.chosen, "rejected_ids": [7] * p.rejected} for p in LENGTHS
    ]
    batch = choice.collator([{**row, "weight": 1.0, "index": i} for i, row in enumerate(rows)])
    layout = batch["orpo_layout"]
    layout.tokens, layout.pairs = layout.counts().float().unbind()
    with FlopCounterMode(display=False) as counter:
        PairForward(choice, Objective())(model, batch, torch.device("cpu")).loss.backward()
    counted = counter.get_flop_counts()["Global"]
    matmuls = sum(n for op, n in counted.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    flops = ModelFlops.of(model)
    tokens = sum(pair.shared_tokens for pair in LENGTHS)
    scored = sum(pair.prompt - 1 + pair.chosen + pair.rejected for pair in LENGTHS)
    expected = flops.per_token * tokens + flops.per_scored_row * scored
    assert matmuls == pytest.approx(expected, rel=0.02)


def test_only_attention_counts_query_keys():
    """One layer in four of this hybrid is attention; the others are linear in the length."""
    model = tiny_model("qwen3_5")
    assert model.config.layer_types.count("full_attention") == 1 and model.config.num_hidden_layers == 4
    assert ModelFlops.of(model).per_query_key == 12 * 4 * 8  # four heads of size 8


@pytest.mark.parametrize(
    ("family", "experts", "used"),
    [
        ("qwen3_moe", {"num_experts": 4}, "num_experts_per_tok"),
        ("mixtral", {"num_local_experts": 4}, "num_experts_per_tok"),
        ("deepseek_v3", {"n_routed_experts": 4, "n_group": 1, "first_k_dense_replace": 0}, "num_experts_per_tok"),
        ("gemma4_text", {"num_experts": 4, "enable_moe_block": True}, "top_k_experts"),
        ("hunyuan_v1_moe", {"num_experts": 4}, "moe_topk"),
        ("ernie4_5_moe", {"moe_num_experts": 4}, "moe_k"),
    ],
)
def test_of_a_mixtures_experts_those_of_a_token_count(family, experts, used, caplog):
    if family not in CONFIG_MAPPING:
        pytest.skip("transformers 5.17 does not have it")
    counted = []
    for number in (1, 3):
        config = CONFIG_MAPPING[family](**SMALL, **experts, **{used: number})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        counted.append(ModelFlops.of(model).per_token)
        stacked = sum(p.numel() for p in model.parameters() if p.dim() == 3 and p.shape[0] == 4)
    assert stacked and counted[1] - counted[0] == pytest.approx(6.0 * stacked * 2 / 4)
    assert "count every expert" not in caplog.text


def test_a_mixture_that_does_not_say_how_many_counts_them_all(caplog):
    class Unknown(MixtralConfig):
        @property
        def num_experts_per_tok(self):
            return None

        @num_experts_per_tok.setter
        def num_experts_per_tok(self, value):
            pass

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=4))
    used = ModelFlops.of(model).per_token
    model.config = Unknown(**SMALL, num_local_experts=4)
    assert ModelFlops.of(model).per_token > used
    assert "count every expert: the config of mixtral" in caplog.text


def test_a_model_without_attention_is_counted():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    flops = ModelFlops.of(model)
    assert flops.per_token > 0 and flops.per_query_key == 0


def test_counting_never_stops_a_run(caplog):
    assert ModelFlops.of(torch.nn.Linear(2, 2)) == ModelFlops(0.0, 0.0, 0.0)
    assert "tflops_per_second, mfu and total_flos are 0: the FLOPs of Linear cannot be counted" in caplog.text
