"""Logits recorded at the end of training, and what a merge makes of them."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from orpo_dist.errors import UserError
from orpo_dist.model.loading.merge import merge_run
from orpo_dist.model.loading.trained import read_trained, record_trained

VOCAB = 64
CPU = torch.device("cpu")


@pytest.fixture
def adapted(tiny_llama, tmp_path, chat_tokenizer):
    """`adapted()`: a model with an adapter far from its beginning, on a base that lies in a folder; it is saved."""

    def build(dtype=torch.float32):
        tiny_llama(VOCAB).save_pretrained(tmp_path / "base")
        chat_tokenizer.save_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        base = type(tiny_llama(VOCAB)).from_pretrained(tmp_path / "base", dtype=dtype)
        settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base, settings)
        model.save_pretrained(tmp_path / "run")
        return model

    return build


def record(model, folder):
    recorded = record_trained(model, CPU, base_changed=False, half=False)
    recorded.save(folder)
    return recorded


def test_what_is_recorded(adapted, tmp_path):
    model = adapted().train()
    recorded = record(model, tmp_path / "run")
    assert model.training
    assert recorded.with_adapters.shape == (2, 4, VOCAB) and recorded.most_noise == 0.01
    assert (recorded.with_adapters - recorded.without).abs().max() > 0.1
    read = read_trained(tmp_path / "run")
    assert torch.equal(read.with_adapters, recorded.with_adapters) and read.adapters == ["default"]
    assert read_trained(tmp_path) is None
    assert record_trained(model, CPU, base_changed=False, half=True).most_noise == 0.1
    assert record_trained(model, CPU, base_changed=True, half=False).without is None


def test_other_models_have_nothing_to_record(tiny_llama):
    assert record_trained(tiny_llama(VOCAB), CPU, base_changed=False, half=False) is None
    prompts = get_peft_model(tiny_llama(VOCAB), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert record_trained(prompts, CPU, base_changed=False, half=False) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trained_model_is_merged(adapted, tmp_path, dtype):
    record(adapted(dtype), tmp_path / "run")
    report = merge_run(tmp_path / "run")
    assert report.from_training < (1e-4 if dtype == torch.float32 else 0.3 * report.adapter_effect)
    assert "From those at the end of training they differ by" in report.lines()[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["adapter", "base"])
def test_files_that_are_not_the_trained_model(adapted, tiny_llama, tmp_path, dtype, what):
    """The reloaded pair agrees with its own merge: only the record tells."""
    model = adapted(dtype)
    record(model, tmp_path / "run")
    if what == "adapter":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-1)
        model.save_pretrained(tmp_path / "run")
    else:
        base = tiny_llama(VOCAB)
        with torch.no_grad():
            base.model.embed_tokens.weight.mul_(-1)
        base.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="is not the model that was trained"):
        merge_run(tmp_path / "run")
    assert not (tmp_path / "run" / "merged").exists()
