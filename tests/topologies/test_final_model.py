"""A finished run holds a whole model, whatever form its checkpoints have."""

import pytest
import torch
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
