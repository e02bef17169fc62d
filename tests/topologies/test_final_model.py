"""A finished run holds a whole model, whatever form its checkpoints have."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orpo_dist.model.loading.trained import TRAINED_NAME
from tests.topologies.runs import GENTLE, GENTLE_SPLIT, LORA, run

SHORT = {"max_steps": 1, "eval_strategy": "no"}
ONE_STEP = {**GENTLE_SPLIT, **SHORT, "save_strategy": "steps", "save_steps": 1}
SHARDED_CHECKPOINTS = {
    "fsdp2": {"fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}},  # accelerate's default
    "zero3": {"deepspeed_config": {"zero3_save_16bit_model": False}},  # DeepSpeed's default
}


@pytest.mark.topology
@pytest.mark.parametrize("launcher", SHARDED_CHECKPOINTS)
def test_a_whole_model_beside_sharded_checkpoints(setting, launcher):
    reference = run(setting, f"one_{launcher}", {**GENTLE, **SHORT})
    outcome = run(setting, f"whole_{launcher}", ONE_STEP, launcher, SHARDED_CHECKPOINTS[launcher])
    (checkpoint,) = (outcome.saved.parent / f"whole_{launcher}.run").glob("checkpoint-*")
    assert not list(checkpoint.glob("*.safetensors")), "the checkpoint was to keep its sharded form"
    assert outcome.weights.keys() == reference.weights.keys()
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(outcome.saved)(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(reference.saved)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.topology
@pytest.mark.parametrize("launcher", SHARDED_CHECKPOINTS)
def test_an_adapter_beside_sharded_checkpoints(setting, launcher):
    outcome = run(setting, f"adapter_{launcher}", ONE_STEP, launcher, SHARDED_CHECKPOINTS[launcher], lora=LORA)
    assert any("lora_B" in name for name in load_file(outcome.saved / "adapter_model.safetensors"))
    assert (outcome.saved / "tokenizer_config.json").is_file()
    assert (outcome.saved / TRAINED_NAME).is_file()  # what a merge compares with, also of partitioned weights


@pytest.mark.topology
@pytest.mark.parametrize(
    "trained", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.long])], ids=["frozen", "trained"]
)
def test_an_adapter_of_zero3_holds_the_embeddings_of_new_tokens(setting, trained):
    base = AutoModelForCausalLM.from_pretrained(setting["model"])
    old = base.get_input_embeddings().weight.detach().clone()
    vocabulary = len(old) + 9  # odd, so that ranks hold unequal parts
    lora = {**LORA, "target_modules": ["q_proj"]}
    if trained:
        lora["modules_to_save"] = ["embed_tokens", "lm_head"]
    name = f"new_tokens_{trained}"
    outcome = run(setting, name, {**GENTLE_SPLIT, **SHORT}, "zero3", lora=lora, vocabulary=vocabulary)
    base.resize_token_embeddings(vocabulary, mean_resizing=False)
    model = PeftModel.from_pretrained(base, outcome.saved)
    for layer, path in (
        (model.get_input_embeddings(), "model.embed_tokens"),
        (model.get_output_embeddings(), "lm_head"),
    ):
        saved = outcome.weights[f"base_model.model.{path}.weight"]
        loaded = layer.modules_to_save["default"] if trained else layer
        assert saved.shape[0] == vocabulary
        assert torch.equal(loaded.weight, saved)
        assert saved[len(old) :].abs().max() > 0
    embeddings = outcome.weights["base_model.model.model.embed_tokens.weight"][: len(old)]
    assert torch.equal(embeddings, old) is not trained
    assert torch.isfinite(model(torch.arange(vocabulary - 9, vocabulary)[None]).logits).all()
