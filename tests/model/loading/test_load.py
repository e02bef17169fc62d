import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from orpo_dist.errors import UserError
from orpo_dist.model.loading.load import base_identity, load_config, load_model, quantization_config
from orpo_dist.model.loading.processor import load_processing_class
from orpo_dist.options.model import ModelArguments, resolve_dtype

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path, tiny_llama, plain_tokenizer) -> Path:
    tiny_llama(512).save_pretrained(tmp_path / "model")
    plain_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub_cache(tmp_path, folder, monkeypatch) -> Path:
    """A hub cache that holds `folder` as `some-org/tiny`, at COMMIT."""
    repository = tmp_path / "hub" / "models--some-org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_float16_weights_cannot_be_trained():
    with pytest.raises(UserError, match="float16 weights cannot be trained"):
        resolve_dtype(ModelArguments("m", dtype="float16"), fp16=True)


@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_quantisation_without_an_adapter_is_refused(option):
    with pytest.raises(UserError, match=f"{option} without an adapter: quantised weights .* cannot be trained"):
        ModelArguments("m", **{option: True})


def test_two_quantisations_are_refused():
    with pytest.raises(UserError, match="choose one"):
        ModelArguments("m", use_peft=True, load_in_4bit=True, load_in_8bit=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bit_weights_are_stored_in_the_dtype_of_all_other_weights(folder, dtype):
    arguments = ModelArguments(str(folder), use_peft=True, load_in_4bit=True)
    settings = quantization_config(arguments, dtype)
    assert settings.bnb_4bit_use_double_quant and settings.bnb_4bit_quant_type == "nf4"
    model = load_model(str(folder), dtype=dtype, quantization_config=settings)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_state.nested
    assert layer.weight.numel() * layer.weight.element_size() == 32 * 64 // 2
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_quant_storage_can_be_chosen(folder):
    arguments = ModelArguments(str(folder), use_peft=True, load_in_4bit=True, bnb_4bit_quant_storage="uint8")
    model = load_model(str(folder), quantization_config=quantization_config(arguments, torch.float32))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8


def test_eight_bit_model(folder):
    arguments = ModelArguments(str(folder), use_peft=True, load_in_8bit=True)
    model = load_model(str(folder), quantization_config=quantization_config(arguments, torch.float32))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    ids = torch.arange(12).view(1, -1)
    exact = load_model(str(folder))
    difference = (model(ids).logits - exact(ids).logits).abs().max().item()
    assert 0 < difference < 0.05 * exact(ids).logits.abs().max().item()


@pytest.mark.parametrize(("option", "strategy"), [("load_in_8bit", "FSDP"), ("load_in_8bit", "ZeRO-3")])
def test_eight_bits_cannot_be_sharded(folder, monkeypatch, option, strategy):
    _pretend_sharding(monkeypatch, strategy)
    arguments = ModelArguments(str(folder), use_peft=True, **{option: True})
    with pytest.raises(UserError, match=f"8-bit weights cannot be sharded by {strategy}: use load_in_4bit"):
        load_model(str(folder), quantization_config=quantization_config(arguments, torch.float32))


def test_checkpoint_of_four_bit_bytes_cannot_be_sharded(tmp_path, folder, monkeypatch):
    arguments = ModelArguments(str(folder), use_peft=True, load_in_4bit=True, bnb_4bit_quant_storage="uint8")
    stored = tmp_path / "stored"
    load_model(str(folder), quantization_config=quantization_config(arguments, torch.float32)).save_pretrained(stored)
    load_model(str(stored))
    _pretend_sharding(monkeypatch, "FSDP")
    with pytest.raises(UserError, match="stored as 4-bit bytes, which FSDP cannot shard"):
        load_model(str(stored))


def _pretend_sharding(monkeypatch, strategy: str) -> None:
    if strategy == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        config = {"zero_optimization": {"stage": 3}}
        monkeypatch.setattr("transformers.integrations.deepspeed.deepspeed_config", lambda: config)


def test_missing_bitsandbytes_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("orpo_dist.model.loading.load.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'orpo-dist\[qlora\]'"):
        quantization_config(ModelArguments("m", use_peft=True, load_in_4bit=True), torch.float32)


def test_kind_of_model_follows_its_config(tmp_path, folder):
    small = T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0)
    T5ForConditionalGeneration(small).save_pretrained(tmp_path / "t5")
    assert isinstance(load_model(str(tmp_path / "t5")), T5ForConditionalGeneration)
    assert isinstance(load_model(str(folder)), LlamaForCausalLM)


def test_dtype_of_the_loaded_model(folder):
    assert load_model(str(folder)).dtype == torch.float32
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16


def test_pad_token_is_eos_where_there_is_none(folder, tmp_path, plain_tokenizer):
    assert load_processing_class(str(folder)).pad_token == "<pad>"
    files = tmp_path / "no_pad"
    plain_tokenizer.save_pretrained(files)
    settings = json.loads((files / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (files / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_processing_class(str(files))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert len(tokenizer) == len(plain_tokenizer)
    settings.pop("eos_token")
    (files / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="neither a pad nor an EOS token"):
        load_processing_class(str(files))


def test_base_from_the_hub_is_named_by_id_and_commit(hub_cache):
    by_name = load_model("some-org/tiny")
    assert base_identity(by_name).name == "some-org/tiny"
    assert base_identity(by_name).revision == COMMIT
    by_path = load_model(str(hub_cache / "models--some-org--tiny" / "snapshots" / COMMIT))
    assert base_identity(by_path) == base_identity(by_name)


def test_base_from_a_folder_is_named_by_its_absolute_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    identity = base_identity(load_model("model"))
    assert identity.name == str(folder)
    assert identity.revision is None


def test_model_not_in_the_cache_offline():
    with pytest.raises(UserError, match=r"some-org/absent is neither .* run `hf download some-org/absent`") as caught:
        load_model("some-org/absent")
    assert "\n" not in str(caught.value)


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="neither an existing folder nor the name of a model"):
        load_model(str(tmp_path / "absent"))


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"The folder .* cannot be loaded: .*model.safetensors"):
        load_model(str(folder))


def test_folder_of_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, not a model"):
        load_config(str(tmp_path))


def test_unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "from_the_future"}))
    with pytest.raises(UserError, match="does not know the model's architecture: pip install -U transformers"):
        load_model(str(folder))


def test_code_of_a_repository_runs_only_when_asked(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    marker = folder / "ran"
    (folder / "own.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(marker)!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    with pytest.raises(UserError, match="set trust_remote_code=true if you trust it"):
        load_config(str(folder))
    assert not marker.exists()
    assert load_config(str(folder), trust_remote_code=True).model_type == "own"
    assert marker.exists()


def test_pickled_weights_do_not_run_code(folder):
    """torch.load with weights_only: a checkpoint in the old format is data or is refused."""
    marker = folder / "ran"
    (folder / "model.safetensors").unlink()
    write = (
        "import torch, pathlib\n"
        "class Evil:\n"
        f"    def __reduce__(self): return pathlib.Path.touch, (pathlib.Path({str(marker)!r}),)\n"
        f"torch.save({{'model.embed_tokens.weight': Evil()}}, {str(folder / 'pytorch_model.bin')!r})\n"
    )
    subprocess.run([sys.executable, "-c", write], check=True)
    with pytest.raises(Exception, match=r"(?i)weights"):
        load_model(str(folder))
    assert not marker.exists()


def test_a_package_that_code_of_the_repository_needs_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("import no_such_package\nfrom transformers import LlamaConfig as OwnConfig\n")
    with pytest.raises(UserError, match=r"cannot be loaded: .*packages that were not found.*no_such_package"):
        load_config(str(folder), trust_remote_code=True)


def test_an_attention_that_does_not_exist_is_the_users(folder):
    with pytest.raises(UserError, match="attn_implementation"):
        load_model(str(folder), attn_implementation="no_such_attention")
