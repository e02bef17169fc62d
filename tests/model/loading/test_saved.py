"""What is wrong with a saved folder is found without loading it, on the folders that transformers and peft write."""

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from orpo_dist.model.loading.saved import weight_times, why_unloadable
from tests.model.tiny_models import tiny_model

# Tied and untied, converted at loading (experts), with parts, with buffers.
FAMILIES = ("llama", "gemma2", "qwen3_moe", "qwen3_5", "llava")


@pytest.mark.filterwarnings("ignore:.*falling back to its reference PyTorch implementation")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_loadable_and_every_tensor_counts(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    assert why_unloadable(model, tmp_path, {}) is None
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    for name in whole:
        save_file({key: tensor for key, tensor in whole.items() if key != name}, file)
        assert why_unloadable(model, tmp_path, {}) == f"{file} lacks {name}"
    name, tensor = next((name, tensor) for name, tensor in whole.items() if tensor.dim() == 2)
    save_file({**whole, name: tensor[1:].clone()}, file)
    assert f"other shapes: {name}" in why_unloadable(model, tmp_path, {})


def test_shards_and_a_missing_one(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and why_unloadable(model, tmp_path, {}) is None
    shards[1].unlink()
    assert why_unloadable(model, tmp_path, {}) == f"{shards[1]} is missing"


def test_a_broken_file(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert f"{file} cannot be read" in why_unloadable(model, tmp_path, {})


def test_no_weights_and_no_config(tmp_path):
    model = tiny_model("llama")
    assert "config cannot be read" in why_unloadable(model, tmp_path, {})
    model.config.save_pretrained(tmp_path)
    assert "neither model.safetensors nor" in why_unloadable(model, tmp_path, {})


def test_the_weights_of_an_earlier_run(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    before = weight_times(tmp_path)
    assert "is of another run" in why_unloadable(model, tmp_path, before)
    model.save_pretrained(tmp_path)
    assert why_unloadable(model, tmp_path, before) is None


def test_an_adapter_left_beside_a_model(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "would load that adapter on top" in why_unloadable(model, tmp_path, {})


@pytest.mark.parametrize("name", ["default", "tone"])
def test_adapters(name, tmp_path):
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear"), adapter_name=name)
    folder = tmp_path if name == "default" else tmp_path / name
    assert f"the adapter {name} has no adapter_config.json" in why_unloadable(model, tmp_path, {})
    model.save_pretrained(tmp_path)
    assert why_unloadable(model, tmp_path, {}) is None
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    dropped = next(iter(whole))
    save_file({key: tensor for key, tensor in whole.items() if key != dropped}, file)
    assert why_unloadable(model, tmp_path, {}) == f"{file} lacks {dropped}"
    save_file({**whole, dropped: torch.zeros(1, 1)}, file)
    assert "other shapes" in why_unloadable(model, tmp_path, {})
    file.unlink()
    assert why_unloadable(model, tmp_path, {}) == f"{file} is missing"


def test_modules_to_save_count_too(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model("llama"), config)
    model.save_pretrained(tmp_path)
    assert why_unloadable(model, tmp_path, {}) is None
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "lm_head" not in key}, file)
    assert "lacks base_model.model.lm_head" in why_unloadable(model, tmp_path, {})
