"""Every topology trains like one process: the same losses, metrics, gradient norms and final weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.model.tiny_models import VOCAB, tiny_model
from tests.topologies.runs import CONFIG, GENTLE, GENTLE_SPLIT, LORA, SPLIT, assert_same, pairs, run


@pytest.fixture(scope="module")
def reference(setting):
    return run(setting, "one", CONFIG)


@pytest.fixture(scope="module")
def qlora_reference(setting):
    return run(setting, "one_qlora", GENTLE, lora=LORA, load_in_4bit=True)


def test_ddp(setting, reference):
    outcome = run(setting, "ddp", SPLIT, "torchrun")
    assert outcome.facts["distributed_type"].endswith("MULTI_CPU")
    assert_same(outcome, reference)


@pytest.mark.topology
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(setting, reference, stage):
    outcome = run(setting, f"zero{stage}", SPLIT, f"zero{stage}")
    assert outcome.facts["zero_stage"] == stage
    assert (outcome.facts["partitioned_parameters"] > 0) == (stage == 3)
    assert_same(outcome, reference)
    assert_reloads(outcome, reference)


@pytest.mark.topology
def test_fsdp2(setting, reference):
    outcome = run(setting, "fsdp2", SPLIT, "fsdp2")
    assert outcome.facts["distributed_type"].endswith("FSDP")
    assert outcome.facts["sharded_parameters"] > 0
    assert_same(outcome, reference)
    assert_reloads(outcome, reference)


@pytest.mark.topology
@pytest.mark.parametrize("launcher", ["torchrun", "zero2", "zero3", "fsdp2"])
def test_lora(setting, lora_reference, launcher):
    outcome = run(setting, f"lora_{launcher}", GENTLE_SPLIT, launcher, lora=LORA)
    assert_same(outcome, lora_reference)


@pytest.mark.topology
@pytest.mark.parametrize("launcher", ["torchrun", "zero3_qlora", "fsdp2_qlora"])
def test_4bit_lora(setting, qlora_reference, launcher):
    outcome = run(setting, f"qlora_{launcher}", GENTLE_SPLIT, launcher, lora=LORA, load_in_4bit=True)
    assert outcome.facts["quantized_layers"] > 0
    assert_same(outcome, qlora_reference, weight_tolerance=1e-4)


@pytest.mark.topology
def test_collectives(setting):
    """One reduction per optimizer step and two per log line; a micro-step asks for none (DDP's own reducer aside)."""
    config = {**SPLIT, "max_steps": 6, "logging_steps": 3, "eval_strategy": "no"}
    asked = run(setting, "collectives", config, "torchrun", count_collectives=True).facts["collectives"]
    ours = {what: number for what, number in asked.items() if not what.startswith("elsewhere")}
    assert ours == {"get_batch_samples all_reduce": 6, "log all_reduce": 2 * 2}


FAMILIES = {"gemma2": "window and softcap", "qwen3_moe": "experts and routers"}


@pytest.fixture(scope="module")
def padded_references(setting):
    """One process, one micro-batch, padded: TRL's layout."""
    outcomes = {}
    for family in FAMILIES:
        tiny_model(family).save_pretrained(setting["folder"] / family)
        outcomes[family] = run_family(setting, f"{family}_padded", family, {**FAMILY, "padding_free": False})
    return outcomes


# The weights of these models are large (see tiny_model): a step of 0.1 would be chaos.
FAMILY = {**CONFIG, "learning_rate": 1e-3, "router_aux_loss_coef": 0.0}
FAMILY_SPLIT = {**FAMILY, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def run_family(setting, name, family, config, launcher=None):
    settings = {**setting, "model": str(setting["folder"] / family), "train": pairs(60, VOCAB, 0)}
    return run({**settings, "eval": pairs(7, VOCAB, 1)}, name, config, launcher)


@pytest.mark.topology
@pytest.mark.parametrize("launcher", ["zero3", "fsdp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_shards_equal_one_padded_process(setting, padded_references, family, launcher):
    assert not padded_references[family].facts["is_packed"]
    outcome = run_family(setting, f"{family}_{launcher}", family, FAMILY_SPLIT, launcher)
    assert outcome.facts["is_packed"]
    assert outcome.facts["partitioned_parameters"] > 0 or outcome.facts["sharded_parameters"] > 0
    assert_same(outcome, padded_references[family])


@pytest.mark.topology
def test_padded_shards_equal_one_padded_process(setting, padded_references):
    """The loss head of padded rows, whose weight is gathered, with a softcap of the logits."""
    padded = {**FAMILY_SPLIT, "padding_free": False, "loss_chunk_size": 16}
    outcome = run_family(setting, "gemma2_padded_zero3", "gemma2", padded, "zero3")
    assert not outcome.facts["is_packed"]
    assert_same(outcome, padded_references["gemma2"])


@pytest.mark.topology
def test_padded_shards_with_lora_and_a_trained_head(setting):
    """FSDP2 shards peft's wrapper of the head in one group with the last norm."""
    lora = {**LORA, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
    reference = run(setting, "one_saved_head", GENTLE, lora=lora)
    padded = {**GENTLE_SPLIT, "padding_free": False}
    assert_same(run(setting, "saved_head_padded", padded, "fsdp2", lora=lora), reference)


def assert_reloads(outcome, reference):
    """The saved model is a plain transformers model with the reference's logits."""
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(outcome.saved)(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(reference.saved)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
