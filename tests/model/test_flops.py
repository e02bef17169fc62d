"""The FLOPs of a model by formula, against PyTorch's own count."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_dist.loss import Objective
from orpo_dist.model.flops import ModelFlops
from orpo_dist.model.forward import PairForward
from orpo_dist.model.packed.choose_layout import LayoutChoice, LayoutOptions
from orpo_dist.packing.lengths import PairLengths
from tests.model.tiny_models import tiny_model

LENGTHS = [PairLengths(60, 30, 41), PairLengths(9, 50, 12), PairLengths(80, 20, 33)]


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
