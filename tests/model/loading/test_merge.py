import json
import os
import shutil
import socket
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations import deepspeed as deepspeed_integration

from orpo_dist.commands.merge import main
from orpo_dist.errors import UserError
from orpo_dist.model.loading import merge
from orpo_dist.model.loading.adapters import add_adapter, lora_config, record_base
from orpo_dist.model.loading.load import load_model, quantization_config
from orpo_dist.model.loading.merge import merge_run
from orpo_dist.model.loading.trained import TRAINED_NAME, record_trained
from orpo_dist.options.model import ModelArguments

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.arange(5, 29).view(2, 12)
SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def base(tmp_path, tiny_llama, chat_tokenizer) -> Path:
    tiny_llama(512).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _train(base: Path | str, run: Path, dtype: torch.dtype = torch.float32, size: float = 0.05, **arguments) -> Path:
    """A run's folder with an adapter whose weights are far from their initial values, and the tokenizer."""
    settings = ModelArguments(use_peft=True, **arguments)
    model = load_model(str(base), dtype=dtype, quantization_config=quantization_config(settings, dtype))
    torch.manual_seed(0)
    model = add_adapter(model, lora_config(settings, is_encoder_decoder=model.config.is_encoder_decoder))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn_like(parameter)
    model.save_pretrained(run)
    AutoTokenizer.from_pretrained(base).save_pretrained(run)
    return run


@torch.no_grad()
def _adapter_logits(base: Path, run: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype).float(), run)
    return model.eval()(IDS).logits


@torch.no_grad()
def _merged_logits(folder: Path | str) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "use_dora": True},
        {"load_in_8bit": True},
        {"lora_modules_to_save": ["lm_head"]},
        {"lora_target_modules": ["q_proj", "lm_head"]},
    ],
    ids=lambda arguments: "+".join(arguments) or "lora",
)
def test_merged_model_has_the_logits_of_full_precision_base_and_adapter(base, tmp_path, arguments):
    run = _train(base, tmp_path / "run", **arguments)
    report = merge_run(run)
    assert report.verified
    expected, merged = _adapter_logits(base, run), _merged_logits(report.path)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert report.max_logit_difference < 1e-5 < 0.05 < report.adapter_effect
    assert not list(Path(report.path).glob("*adapter*"))


def test_tied_embeddings_stay_tied(tmp_path, chat_tokenizer):
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    report = merge_run(_train(tmp_path / "base", tmp_path / "run"))
    merged = AutoModelForCausalLM.from_pretrained(report.path)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_experts_of_a_mixture_are_merged(tmp_path, chat_tokenizer):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    run = _train(tmp_path / "base", tmp_path / "run", lora_target_parameters=experts, lora_dropout=0.0)
    report = merge_run(run)
    torch.testing.assert_close(
        _merged_logits(report.path), _adapter_logits(tmp_path / "base", run), rtol=1e-4, atol=1e-5
    )


def test_encoder_decoder_is_merged(tmp_path, chat_tokenizer):
    config = T5Config(vocab_size=512, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    chat_tokenizer.save_pretrained(tmp_path / "base")
    report = merge_run(_train(tmp_path / "base", tmp_path / "run"))
    assert report.verified
    assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(report.path), T5ForConditionalGeneration)


def test_dtype_is_that_of_the_base_or_as_asked(base, tmp_path, tiny_llama):
    run = _train(base, tmp_path / "run")
    assert merge_run(run).dtype == "float32"
    tiny_llama(512).bfloat16().save_pretrained(base)
    report = merge_run(run)
    assert report.dtype == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(report.path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert 0 < report.max_logit_difference < 0.1 * report.adapter_effect
    float16 = AutoModelForCausalLM.from_pretrained(merge_run(run, dtype="float16").path, dtype="auto")
    assert {parameter.dtype for parameter in float16.parameters()} == {torch.float16}
    with pytest.raises(UserError, match="dtype='int3' is not one of bfloat16, float16, float32"):
        merge_run(run, dtype="int3")


def test_base_that_exists_in_four_bits_alone_is_dequantised(base, tmp_path):
    settings = ModelArguments(use_peft=True, load_in_4bit=True)
    stored = tmp_path / "stored"
    load_model(str(base), quantization_config=quantization_config(settings, torch.float32)).save_pretrained(stored)
    AutoTokenizer.from_pretrained(base).save_pretrained(stored)
    report = merge_run(_train(stored, tmp_path / "run"), dtype="float32")
    assert report.verified
    config = json.loads((Path(report.path) / "config.json").read_text())
    assert "quantization_config" not in config


def test_tokenizer_template_and_generation_config_are_written(base, tmp_path, chat_tokenizer):
    run = _train(base, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.chat_template = "{{ 'of the run' }}"
    tokenizer.save_pretrained(run)
    GenerationConfig(max_new_tokens=77, do_sample=True, temperature=0.3).save_pretrained(run)
    report = merge_run(run)
    assert AutoTokenizer.from_pretrained(report.path).chat_template == "{{ 'of the run' }}"
    assert GenerationConfig.from_pretrained(report.path).max_new_tokens == 77
    (run / "tokenizer_config.json").unlink()
    report = merge_run(run)
    assert AutoTokenizer.from_pretrained(report.path).chat_template == chat_tokenizer.chat_template


def test_base_is_loaded_at_the_recorded_revision(base, tmp_path, monkeypatch, tiny_llama, chat_tokenizer):
    """`main` has moved on since the training: the merge takes the commit that the adapter was trained on."""
    repository = tmp_path / "hub" / "models--some-org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    run = _train("some-org/tiny", tmp_path / "run")
    newer = tiny_llama(512)
    newer.lm_head.weight.data.zero_()
    newer.save_pretrained(repository / "snapshots" / COMMIT[::-1])
    chat_tokenizer.save_pretrained(repository / "snapshots" / COMMIT[::-1])
    (repository / "refs" / "main").write_text(COMMIT[::-1])
    report = merge_run(run)
    assert (report.base, report.base_revision) == ("some-org/tiny", COMMIT)
    torch.testing.assert_close(_merged_logits(report.path), _adapter_logits(snapshot, run), rtol=1e-4, atol=1e-5)


def test_wrong_merge_is_refused_and_leaves_nothing(base, tmp_path, monkeypatch):
    run = _train(base, tmp_path / "run")
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **kwargs: self.unload())
    with pytest.raises(UserError, match="Merge refused: the logits of merged weights"):
        merge_run(run)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == []


def test_damaged_file_is_refused(base, tmp_path, monkeypatch):
    """What counts is the model as it is read back, not the one in memory."""
    run = _train(base, tmp_path / "run")
    write = merge._write

    def damages(model, run_folder, settings, folder, trust_remote_code):
        write(model, run_folder, settings, folder, trust_remote_code)
        damaged = AutoModelForCausalLM.from_pretrained(folder)
        damaged.model.layers[1].mlp.up_proj.weight.data[0] += 1.0
        damaged.save_pretrained(folder)

    monkeypatch.setattr(merge, "_write", damages)
    with pytest.raises(UserError, match="the logits of the written model and the merged weights differ"):
        merge_run(run)
    assert not (run / "merged").exists()


def test_rounding_that_hides_the_training_is_reported(base, tmp_path):
    run = _train(base, tmp_path / "run", size=1e-4)
    assert merge_run(run, dtype="bfloat16").lines()[-1].startswith("Warning: rounding to bfloat16 hides much")
    assert merge_run(run, dtype="float32").lines()[-1].startswith("Verified")


def test_output_is_replaced_only_if_it_is_a_merge(base, tmp_path):
    run = _train(base, tmp_path / "run")
    first = merge_run(run)
    (Path(first.path) / "stale").touch()
    second = merge_run(run)
    assert second.path == first.path and not (Path(second.path) / "stale").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    with pytest.raises(UserError, match="exists and is not an earlier merge"):
        merge_run(run, output=other)
    assert (other / "precious").exists()
    with pytest.raises(UserError, match="is the folder of the adapter"):
        merge_run(run, output=run)


def test_folders_that_cannot_be_merged(base, tmp_path):
    with pytest.raises(UserError, match="absent does not exist"):
        merge_run(tmp_path / "absent")
    with pytest.raises(UserError, match="holds a whole model, not an adapter"):
        merge_run(base)
    empty = tmp_path / "empty"
    (empty / "checkpoint-5").mkdir(parents=True)
    (empty / "checkpoint-5" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no adapter .* its newest checkpoint is .*checkpoint-5"):
        merge_run(empty)


def test_base_that_has_gone_is_named(base, tmp_path):
    run = _train(base, tmp_path / "run")
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="neither an existing folder nor the name of a model"):
        merge_run(run)


def test_merge_inside_a_sharded_training_loads_whole_models(base, tmp_path, monkeypatch):
    """One rank merges after a ZeRO-3 or FSDP run: with sharded loading armed it would wait for the others forever."""

    class Zero3:
        def is_zero3(self):
            raise AssertionError("asked to partition the weights")

    run, armed = _train(base, tmp_path / "run"), Zero3()
    reference = weakref.ref(armed)
    monkeypatch.setattr(deepspeed_integration, "_hf_deepspeed_config_weak_ref", reference)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert merge_run(run).verified
    assert deepspeed_integration._hf_deepspeed_config_weak_ref is reference
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_command_line(base, tmp_path, capsys):
    run = _train(base, tmp_path / "run")
    assert main([str(run), "--output", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "Verified: logits differ from base + adapter by at most" in capsys.readouterr().out
    torch.testing.assert_close(_merged_logits(tmp_path / "out"), _adapter_logits(base, run), rtol=1e-4, atol=1e-5)
    assert main([str(run), "--no-verify"]) == 0
    assert "Not verified." in capsys.readouterr().out
    assert json.loads((run / "merged" / "merge_report.json").read_text())["verified"] is False
    torch.testing.assert_close(_merged_logits(run / "merged"), _adapter_logits(base, run), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- several adapters, resized vocabularies


def _named(base: Path, run: Path, active: str | list[str]) -> PeftModel:
    """`tone` and `style` far from their beginning, saved; what was recorded names the active ones."""
    torch.manual_seed(0)
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings, adapter_name="tone")
    model.add_adapter("style", settings)
    model.base_model.set_adapter(active)
    model.save_pretrained(run)
    recorded = record_trained(model, torch.device("cpu"), base_changed=False, half=False)
    assert recorded is not None
    recorded.save(run)
    return model.eval()


@pytest.mark.parametrize("active", ["tone", "style", ["tone", "style"]])
def test_the_active_adapters_are_merged(base, tmp_path, active):
    model = _named(base, tmp_path / "run", active)
    with torch.no_grad():
        expected = model(IDS).logits
    report = merge_run(tmp_path / "run")
    assert report.adapters == ([active] if isinstance(active, str) else active)
    torch.testing.assert_close(_merged_logits(tmp_path / "run" / "merged"), expected, rtol=1e-4, atol=1e-4)
    assert "Merged tone" in report.lines()[0] or "Merged style" in report.lines()[0]


def test_several_adapters_without_a_record(base, tmp_path):
    _named(base, tmp_path / "run", "tone")
    (tmp_path / "run" / TRAINED_NAME).unlink()
    with pytest.raises(UserError, match=r"several adapters \(style, tone\)"):
        merge_run(tmp_path / "run")
    assert merge_run(tmp_path / "run" / "tone").adapters == ["default"]
    shutil.rmtree(tmp_path / "run" / "style")
    shutil.rmtree(tmp_path / "run" / "tone" / "merged")
    assert merge_run(tmp_path / "run").adapters == ["tone"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_new_tokens(tmp_path, chat_tokenizer, tied, settings):
    if tied and settings:
        settings = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(517)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **settings))
    record_base(adapted)
    adapted.save_pretrained(tmp_path / "run")
    chat_tokenizer.save_pretrained(tmp_path / "run")
    recorded = record_trained(adapted, torch.device("cpu"), base_changed=False, half=False)
    assert recorded is not None
    recorded.save(tmp_path / "run")
    ids = torch.tensor([[5, 513, 7, 516]])
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
    merge_run(tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").eval()
    assert merged.config.vocab_size == 517
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_killed_merges_have_left_is_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    host, output = socket.gethostname(), tmp_path / "merged[1]"
    dead, alive, elsewhere, other = (
        tmp_path / f"{name}.partial-{whose}-{pid}"
        for name, whose, pid in (
            (output.name, host, ended.pid),
            (output.name, host, os.getpid()),
            (output.name, "another", ended.pid),
            ("other", host, ended.pid),
        )
    )
    for folder in (dead, alive, elsewhere, other):
        folder.mkdir()
    merge._sweep(output)
    assert not dead.exists() and alive.exists() and elsewhere.exists() and other.exists()
