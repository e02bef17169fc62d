"""AutoTrain's face: defaults, the recipe each option becomes, both spellings, errors, launching, and one real run."""

import copy
import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from orpo_dist.autotrain import local as autotrain_launch
from orpo_dist.autotrain.ignored_options import FOREIGN
from orpo_dist.autotrain.local import (
    Attempt,
    Relay,
    TrainingFailed,
    accelerate_config,
    launch_command,
    smaller_batches,
)
from orpo_dist.autotrain.project import AutoTrainProject, LLMTrainingParams, main
from orpo_dist.autotrain.setup import choose_chat_template, set_up
from orpo_dist.errors import UserError
from orpo_dist.options.data import asked_length
from orpo_dist.recipe.recipe import Recipe

DOCS = Path(__file__).parents[2] / "docs" / "autotrain.md"
BASE = {"model": "m", "data_path": "rows.jsonl", "project_name": "runs/p", "log": "none"}


@pytest.fixture(autouse=True)
def clean_machine(monkeypatch):
    """No GPU and no token, whatever this machine has."""
    for name in ("HF_TOKEN", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(autotrain_launch, "gpu_count", lambda: 0)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def params(**values):
    return LLMTrainingParams(**{**BASE, **values})


def recipe(**values):
    return params(**values).to_recipe_mapping()


# ---------------------------------------------------------------- defaults and the recipe


def test_the_defaults_are_autotrains():
    expected = {
        "train_split": "train", "valid_split": None, "max_samples": None, "prompt_text_column": None,
        "text_column": "text", "rejected_text_column": None, "image_column": None, "block_size": 1024,
        "model_max_length": 2048, "padding": "right", "add_eos_token": True, "chat_template": None, "dpo_beta": 0.1,
        "max_prompt_length": None, "max_completion_length": None, "lr": 3e-5, "epochs": 1, "batch_size": 2,
        "gradient_accumulation": 4, "warmup_ratio": 0.1, "optimizer": "adamw_torch", "scheduler": "linear",
        "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42, "peft": False, "quantization": None,
        "target_modules": "all-linear", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "merge_adapter": True,
        "mixed_precision": None, "distributed_backend": None, "ddp_timeout": 7200, "use_flash_attention_2": False,
        "attn_implementation": None, "disable_gradient_checkpointing": False, "auto_find_batch_size": False,
        "resume_from_checkpoint": None, "log": "wandb", "logging_steps": -1, "eval_strategy": "epoch",
        "save_strategy": "epoch", "save_steps": 500, "save_total_limit": 1, "push_to_hub": False, "username": None,
        "token": None, "repo_id": None, "hub_private": True, "wandb_token": None, "wandb_run_id": None,
        "trust_remote_code": False,
    }  # fmt: skip
    made = LLMTrainingParams()
    assert {name: getattr(made, name) for name in expected} == expected


def test_a_default_run_is_a_valid_recipe():
    training = Recipe.from_mapping(recipe()).training
    assert (training.max_length, training.max_prompt_length, training.max_completion_length) == (1024, None, None)
    assert (training.learning_rate, training.warmup_steps, training.beta) == (3e-5, 0.1, 0.1)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 8
    assert not training.bf16 and not training.fp16 and training.gradient_checkpointing


# One changed value per option, what else must be on for it to matter, and what the recipe then says.
MAPPED = {
    "model": ("other", {}, {"model_name_or_path": "other"}),
    "project_name": ("runs/q", {}, {"output_dir": "runs/q"}),
    "trust_remote_code": (True, {}, {"trust_remote_code": True}),
    "data_path": ("folder", {}, {"dataset_name": "folder"}),
    "train_split": ("en:train", {}, {"dataset_train_split": "en:train"}),
    "valid_split": ("validation", {}, {"dataset_test_split": "validation", "eval_strategy": "epoch"}),
    "max_samples": (5, {}, {"max_samples": 5}),
    "prompt_text_column": ("question", {}, {"prompt_column": "question"}),
    "text_column": ("good", {"rejected_text_column": "bad"}, {"chosen_column": "good"}),
    "rejected_text_column": ("bad", {}, {"chosen_column": "text", "rejected_column": "bad"}),
    "image_column": ("photo", {}, {"image_column": "photo"}),
    "image_folder": ("photos", {}, {"image_folder": "photos"}),
    "allow_image_urls": (True, {}, {"allow_image_urls": True}),
    "allow_outside_image_folder": (True, {}, {"allow_outside_image_folder": True}),
    "chat_template": ("chatml", {}, {"chat_template": "chatml"}),
    "apply_chat_template": (True, {}, {"apply_chat_template": True}),
    "add_eos_token": (False, {}, {"add_eos_token": False}),
    "block_size": (512, {}, {"max_length": 512}),
    "model_max_length": (512, {}, {"max_length": 512}),
    "max_prompt_length": (128, {}, {"max_prompt_length": 128}),
    "max_completion_length": (64, {}, {"max_completion_length": 64}),
    "truncation_side": ("right", {}, {"truncation_side": "right"}),
    "on_bad_row": ("error", {}, {"on_bad_row": "error"}),
    "max_bad_rows": (0.5, {}, {"max_bad_rows": 0.5}),
    "dpo_beta": (0.2, {}, {"beta": 0.2}),
    "lr": (1e-4, {}, {"learning_rate": 1e-4}),
    "epochs": (3, {}, {"num_train_epochs": 3}),
    "batch_size": (4, {}, {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}),
    "gradient_accumulation": (8, {}, {"gradient_accumulation_steps": 8}),
    "warmup_ratio": (0.2, {}, {"warmup_steps": 0.2}),
    "optimizer": ("sgd", {}, {"optim": "sgd"}),
    "scheduler": ("cosine", {}, {"lr_scheduler_type": "cosine"}),
    "weight_decay": (0.1, {}, {"weight_decay": 0.1}),
    "max_grad_norm": (0.5, {}, {"max_grad_norm": 0.5}),
    "seed": (7, {}, {"seed": 7}),
    "auto_find_batch_size": (True, {}, {"auto_find_batch_size": True}),
    "peft": (True, {}, {"use_peft": True, "merge_adapter": True, "lora_r": 16}),
    "quantization": ("int4", {"peft": True}, {"load_in_4bit": True, "load_in_8bit": False}),
    "target_modules": ("q_proj, v_proj", {"peft": True}, {"lora_target_modules": ["q_proj", "v_proj"]}),
    "lora_r": (8, {"peft": True}, {"lora_r": 8}),
    "lora_alpha": (8, {"peft": True}, {"lora_alpha": 8}),
    "lora_dropout": (0.1, {"peft": True}, {"lora_dropout": 0.1}),
    "merge_adapter": (False, {"peft": True}, {"merge_adapter": False}),
    "mixed_precision": ("bf16", {}, {"bf16": True, "use_cpu": True}),
    "ddp_timeout": (60, {}, {"ddp_timeout": 60}),
    "use_flash_attention_2": (True, {}, {"attn_implementation": "flash_attention_2"}),
    "attn_implementation": ("sdpa", {}, {"attn_implementation": "sdpa"}),
    "disable_gradient_checkpointing": (True, {}, {"gradient_checkpointing": False}),
    "resume_from_checkpoint": ("auto", {}, {"resume_from_checkpoint": "auto"}),
    "log": ("tensorboard", {}, {"report_to": "tensorboard"}),
    "logging_steps": (3, {}, {"logging_steps": 3}),
    "eval_strategy": ("steps", {"valid_split": "test"}, {"eval_strategy": "steps", "eval_steps": 500}),
    "eval_batch_size": (16, {}, {"per_device_eval_batch_size": 16}),
    "save_strategy": ("steps", {}, {"save_strategy": "steps", "save_steps": 500}),
    "save_steps": (20, {"save_strategy": "steps"}, {"save_steps": 20}),
    "save_total_limit": (3, {}, {"save_total_limit": 3}),
    "push_to_hub": (True, {"token": "t"}, {"push_to_hub": True, "hub_model_id": "p", "hub_private_repo": True}),
    "username": ("me", {"push_to_hub": True, "token": "t"}, {"hub_model_id": "me/p"}),
    "repo_id": ("org/x", {"push_to_hub": True, "token": "t", "username": "me"}, {"hub_model_id": "org/x"}),
    "hub_private": (False, {"push_to_hub": True, "token": "t"}, {"hub_private_repo": False}),
}  # fmt: skip
# Options that act elsewhere; each has a test of its own below.
ELSEWHERE = {
    "trainer": "refused unless orpo",
    "padding": "a note",
    "distributed_backend": "chooses the accelerate config",
    "token": "environment",
    "wandb_token": "environment",
    "wandb_run_id": "environment",
}


def test_every_option_has_a_row_in_the_table():
    assert {option.name for option in fields(LLMTrainingParams)} == MAPPED.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", MAPPED)
def test_an_option_changes_the_recipe(name):
    value, others, expected = MAPPED[name]
    changed, before = set_up(params(**others, **{name: value})).recipe, set_up(params(**others)).recipe
    assert {key: changed.get(key) for key in expected} == expected
    assert changed != before


@pytest.mark.parametrize("name", MAPPED)
def test_every_key_of_the_recipe_exists(name):
    value, others, _ = MAPPED[name]
    if name == "use_flash_attention_2":
        pytest.skip("the same key as attn_implementation")
    Recipe.from_mapping(set_up(params(**others, **{name: value})).recipe)


# ---------------------------------------------------------------- lengths, columns, adapters


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"block_size": -1}, (2048, None, None)),
        ({"block_size": -1, "model_max_length": 4096}, (4096, None, None)),
        ({"block_size": 4096}, (4096, None, None)),
        ({"block_size": 4096, "model_max_length": 3000}, (3000, None, None)),
        ({"block_size": [1024]}, (1024, None, None)),
        ({"block_size": [1024, 512]}, (1024, 512, None)),
        ({"block_size": "1024, 512, 256"}, (1024, 512, 256)),
        ({"block_size": [1024, 512], "max_completion_length": 99}, (1024, 512, 99)),
    ],
)
def test_block_size(values, expected):
    mapping = recipe(**values)
    assert tuple(mapping.get(f"max_{part}length") for part in ("", "prompt_", "completion_")) == expected


def test_only_a_block_size_that_was_asked_for_bounds_images():
    """The default of 1024 is less than one image of Qwen2-VL."""
    assert "max_length" not in recipe(image_column="images")
    default = Recipe.from_mapping(recipe(image_column="images")).training.max_length
    assert (asked_length(default, reads_images=True), asked_length(default, reads_images=False)) == (None, 1024)
    for values in ({"block_size": 1024}, {"block_size": "1024"}, {"model_max_length": 1024}):
        asked = Recipe.from_mapping(recipe(image_column="images", **values)).training.max_length
        assert asked_length(asked, reads_images=True) == 1024


def test_without_columns_the_data_step_detects_them():
    assert not {"chosen_column", "rejected_column", "prompt_column"} & recipe().keys()


def test_message_lists_need_no_prompt_column():
    mapping = recipe(text_column="chosen", rejected_text_column="rejected")
    assert mapping["chosen_column"] == "chosen" and "prompt_column" not in mapping


@pytest.mark.parametrize(
    ("value", "expected"),
    [("all-linear", None), (None, None), ("", None), ("q_proj", [r"(.*\.)?q_proj"]), ("a,b", ["a", "b"])],
)
def test_target_modules(value, expected):
    assert recipe(peft=True, target_modules=value).get("lora_target_modules") == expected


def test_one_target_module_is_found_by_peft(tiny_llama, chat_tokenizer):
    from peft import LoraConfig, get_peft_model

    pattern = recipe(peft=True, target_modules="q_proj")["lora_target_modules"][0]
    model = get_peft_model(tiny_llama(len(chat_tokenizer)), LoraConfig(target_modules=pattern))
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj"}


def test_the_best_checkpoint_is_kept_only_when_saving_and_evaluating_go_together():
    assert recipe(valid_split="test")["load_best_model_at_end"] is True
    assert "load_best_model_at_end" not in recipe()
    assert "load_best_model_at_end" not in recipe(valid_split="test", save_strategy="no")
    assert recipe(eval_strategy="steps")["eval_strategy"] == "no"  # nothing to evaluate on


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainer": "sft"}, "trainer='sft' is not in orpo_dist"),
        ({"quantization": "int4"}, r"quantization=int4 needs peft: quantised weights .* cannot be trained"),
        ({"quantization": "int3", "peft": True}, "is not one of int4, int8"),
        ({"log": "mlflow"}, "log='mlflow' is not one of wandb, tensorboard"),
        ({"distributed_backend": "horovod"}, "is not one of ddp, deepspeed"),
        ({"use_flash_attention_2": True, "attn_implementation": "sdpa"}, "contradict each other"),
        ({"chat_template": "none", "apply_chat_template": True}, "contradict each other"),
        ({"auto_find_batch_size": True, "distributed_backend": "zero3"}, "cannot be used with ZeRO-3"),
        ({"text_column": "chosen"}, "rejected_text_column is missing"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"warmup_ratio": 10}, "warmup_ratio=10.0 is a share"),
        ({"logging_steps": 0}, "logging_steps=0"),
        ({"block_size": 0}, "block_size=0 is not a number of tokens"),
        ({"block_size": "a,b"}, "block_size='a,b' is not"),
        ({"project_name": ""}, "project_name is empty"),
        ({"lr": "fast"}, "lr='fast' is not a number"),
        ({"epochs": True}, "epochs=True is not a number"),
        ({"seed": 1.5}, "seed=1.5 is not a whole number"),
        ({"peft": "maybe"}, "peft='maybe' is not true or false"),
        ({"model": 3}, "model=3 is not text"),
        ({"btach_size": 2}, r"btach_size is not an option: did you mean batch_size\?"),
        ({"learning_rate": 1e-4}, "it is called lr here"),
        ({"evaluation_strategy": "epoch"}, "it is called eval_strategy here"),
    ],
)
def test_bad_parameters(values, message):
    with pytest.raises(UserError, match=message):
        params(**values)


def test_lengths_that_contradict_each_other():
    with pytest.raises(UserError, match="says max_prompt_length=512, but max_prompt_length=100"):
        recipe(block_size=[1024, 512], max_prompt_length=100)
    with pytest.raises(UserError, match="has 4 numbers"):
        recipe(block_size=[1, 2, 3, 4])


def test_unknown_backend_is_a_clear_error():
    with pytest.raises(UserError, match="backend='spaces' is not in this version"):
        AutoTrainProject(params(), backend="spaces")
    with pytest.raises(UserError, match="is for backend='slurm'"):
        AutoTrainProject(params(), slurm="--nodes 2")


# ---------------------------------------------------------------- notes: nothing is ignored in silence


def test_options_of_other_trainers_are_named():
    made = params(rl_gamma=0.9, use_sweep=True, unsloth=True, rl_top_k=3)
    note = set_up(made).notes[0]
    assert "rl_gamma, rl_top_k (PPO and GRPO)" in note and "use_sweep (sweeps)" in note and "unsloth" in note
    assert made.to_recipe_mapping() == recipe()


def test_foreign_and_own_options_do_not_overlap():
    assert not FOREIGN.keys() & {option.name for option in fields(LLMTrainingParams)}


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"lora_r": 8}, "lora_r has no effect without peft."),
        ({"username": "me"}, "username has no effect without push_to_hub."),
        ({"eval_batch_size": 4}, "eval_batch_size has no effect without valid_split."),
        ({"wandb_run_id": "x"}, "wandb_run_id has no effect without log=wandb."),
        ({"save_steps": 20}, "save_steps has no effect without save_strategy=steps."),
        ({"padding": "left"}, "padding=left changes nothing: "),
        ({}, "save_total_limit=1: the last checkpoint is removed only after the next one is complete"),
        ({"valid_split": "test"}, "the checkpoint with the lowest eval loss"),
    ],
)
def test_notes(values, note):
    assert any(line.startswith(note) or note in line for line in set_up(params(**values)).notes)


def test_a_plain_run_has_no_notes():
    assert set_up(params(save_total_limit=2)).notes == []


# ---------------------------------------------------------------- trackers, tokens, precision


def test_a_wandb_run_is_continued():
    environment = set_up(params(log="wandb", wandb_run_id="abc")).environment
    assert environment == {"WANDB_RUN_ID": "abc", "WANDB_RESUME": "allow"}


def test_tokens_are_in_the_environment_only():
    made = params(token="hf_secret", wandb_token="wandb_secret", log="wandb", push_to_hub=True)
    setup = set_up(made)
    assert setup.environment == {"HF_TOKEN": "hf_secret", "WANDB_API_KEY": "wandb_secret"}
    for text in (repr(made), repr(setup), json.dumps(setup.recipe), " ".join(setup.notes)):
        assert "secret" not in text


def test_precision_without_a_gpu():
    assert set_up(params(mixed_precision="bf16")).recipe["use_cpu"] is True
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        set_up(params(mixed_precision="fp16"))


# ---------------------------------------------------------------- the chat template


ROW = {"prompt": "What is six times seven?", "chosen": "42", "rejected": "41"}
COLUMNS = {"prompt_text_column": "prompt", "text_column": "chosen", "rejected_text_column": "rejected"}


def test_strings_get_the_chat_template_of_a_tokenizer_that_has_one(chat_tokenizer):
    assert choose_chat_template(params(**COLUMNS), chat_tokenizer, ROW).apply is True


def test_strings_without_a_chat_template_stay_as_they_are(plain_tokenizer):
    choice = choose_chat_template(params(**COLUMNS), plain_tokenizer, ROW)
    assert choice.apply is False and "has no chat template" in choice.reason


def test_a_named_template_is_applied_to_any_tokenizer(plain_tokenizer):
    assert choose_chat_template(params(**COLUMNS, chat_template="chatml"), plain_tokenizer, ROW).apply is True


def test_rendered_strings_are_not_rendered_again(chat_tokenizer):
    row = ROW | {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}
    choice = choose_chat_template(params(**COLUMNS), chat_tokenizer, row)
    assert choice.apply is False and "rendered already" in choice.reason


def test_the_prompt_is_written_once(chat_tokenizer):
    from orpo_dist.data.prepare import prepare_pairs

    made = params(**COLUMNS)
    mapping = made.to_recipe_mapping() | {"apply_chat_template": choose_chat_template(made, chat_tokenizer, ROW).apply}
    options = Recipe.from_mapping(mapping).training.prepare_options(is_encoder_decoder=False)
    pair = prepare_pairs([ROW], chat_tokenizer, options).dataset[0]
    chosen = chat_tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"])
    rendered = "<s><|im_start|>user\nWhat is six times seven?<|im_end|>\n<|im_start|>assistant\n42<|im_end|>\n"
    assert chosen == rendered


def test_message_lists_are_left_to_the_data_step(chat_tokenizer):
    row = {"chosen": [{"role": "user", "content": "hi"}], "rejected": [{"role": "user", "content": "hi"}]}
    assert choose_chat_template(params(**COLUMNS), chat_tokenizer, row) is None


# ---------------------------------------------------------------- the command line


@pytest.fixture
def created(monkeypatch):
    """The parameters of the projects that the command line creates, instead of training them."""
    made = []
    monkeypatch.setattr(AutoTrainProject, "create", lambda self: made.append(self.params))
    return made


REQUIRED = ["--train", "--model", "m", "--data-path", "d", "--project-name", "p"]


@pytest.mark.parametrize("spelling", [lambda flag: flag, lambda flag: "--" + flag[2:].replace("-", "_")])
def test_both_spellings_of_every_flag(spelling, created):
    argv, expected = [*REQUIRED], {"model": "m", "data_path": "d", "project_name": "p"}
    skip = {"trainer", "attn_implementation", *expected}
    values = {name: value for name, (value, _, _) in MAPPED.items()} | {"padding": "left", "token": "t"}
    for name, value in values.items():
        if name in skip:
            continue
        flag = spelling("--" + name.replace("_", "-"))
        if value is True:
            argv.append(flag)
        elif value is False:
            argv.append(flag.replace("--", "--no_" if "_" in flag or flag == "--" else "--no-", 1))
        else:
            argv += [flag, str(value)]
        expected[name] = value
    assert main(argv) == 0
    assert {name: getattr(created[0], name) for name in expected} == expected


def test_flags_take_true_and_false_too(created):
    main([*REQUIRED, "--peft", "true", "--merge-adapter=false", "--add_eos_token", "False"])
    assert (created[0].peft, created[0].merge_adapter, created[0].add_eos_token) == (True, False, False)


def test_autotrains_own_example(created):
    """The command of DESIGN's and AutoTrain's documentation."""
    argv = "--trainer orpo --prompt-text-column prompt --text-column chosen --rejected-text-column rejected --peft"
    assert main([*REQUIRED, *argv.split()]) == 0
    assert created[0].peft and created[0].rejected_text_column == "rejected"


def test_foreign_flags_on_the_command_line(created):
    main([*REQUIRED, "--rl-gamma", "0.9", "--use_sweep", "--no-wandb-visualizer", "--block-size", "1024,512"])
    assert created[0].ignored == ["rl_gamma", "use_sweep", "wandb_visualizer"]
    assert created[0].block_size == (1024, 512)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Say what to do: orpo-dist llm --train"),
        (["--train"], "--model, --data-path, --project-name missing"),
        (["--train", "--model", "m", "--data_path", "d"], "--project-name missing"),
        ([*REQUIRED, "--batch-sise", "2"], r"--batch_sise is not an option: did you mean batch_size\?"),
        ([*REQUIRED, "--learning-rate", "2"], "--learning_rate is not an AutoTrain option: it is called lr here"),
        ([*REQUIRED, "--epoch", "2"], r"--epoch is not an option: did you mean epochs\?"),
        ([*REQUIRED, "stray"], "'stray' belongs to no flag"),
        ([*REQUIRED, "--lr"], "expected one argument"),
        ([*REQUIRED, "--lr", "fast"], "lr='fast' is not a number"),
        ([*REQUIRED, "--backend", "spaces-a10g-large"], "is not in this version"),
        (["--inference", "--model", "m"], "--inference is not part of orpo-dist"),
    ],
)
def test_wrong_command_lines(argv, message, created):
    with pytest.raises(UserError, match=message):
        main(argv)
    assert not created


@pytest.mark.parametrize(("code", "expected", "lines"), [(2, 2, 0), (1, 1, 1), (-9, 1, 1)])
def test_failed_processes_give_their_exit_code(code, expected, lines, monkeypatch, capsys):
    def fail(self):
        raise TrainingFailed(code)

    monkeypatch.setattr(AutoTrainProject, "create", fail)
    assert main(REQUIRED) == expected
    assert capsys.readouterr().err.count("\n") == lines


def test_help_imports_no_torch():
    code = "import sys; from orpo_dist.autotrain.project import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--rejected-text-column" in result.stdout and "--rl-gamma" not in result.stdout


# ---------------------------------------------------------------- starting processes


@pytest.mark.parametrize(
    ("backend", "quantised", "name"),
    [
        (None, False, "ddp"),
        ("ddp", True, "ddp"),
        ("deepspeed", True, "zero2"),
        ("zero3", False, "zero3"),
        ("zero3", True, "zero3_qlora"),
    ],
)
def test_the_accelerate_config_of_a_backend(backend, quantised, name):
    path = accelerate_config(backend, quantised)
    assert path.name == f"{name}.yaml" and path.is_file()


def test_accelerate_understands_the_command():
    from accelerate.commands.launch import launch_command_parser

    command = launch_command({"bf16": True, "fp16": False}, Path("r.yaml"), accelerate_config("deepspeed"), 4)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    parsed = launch_command_parser().parse_args(command[3:])
    assert (parsed.num_processes, parsed.mixed_precision, parsed.main_process_port) == (4, "bf16", 0)
    assert (parsed.module, parsed.training_script) == (True, "orpo_dist.cli")
    assert parsed.training_script_args == ["train", "r.yaml"]


def two_gpus(monkeypatch, outcomes):
    """Two GPUs, and processes that end as told; returns the recipes they are started with."""
    started, outcomes = [], iter(outcomes)

    def start(recipe, environment, config, processes):
        started.append({**recipe, "config": config.name, "processes": processes, "environment": environment})
        return next(outcomes)

    monkeypatch.setattr(autotrain_launch, "gpu_count", lambda: 2)
    monkeypatch.setattr(autotrain_launch, "_start", start)
    return started


def test_as_many_processes_as_gpus(monkeypatch):
    started = two_gpus(monkeypatch, [Attempt(0, False)])
    autotrain_launch.run(set_up(params(token="t")), "deepspeed")
    assert (started[0]["processes"], started[0]["config"]) == (2, "zero2.yaml")
    assert started[0]["environment"] == {"HF_TOKEN": "t"}
    assert "auto_find_batch_size" not in started[0]  # the trainer searches in one process only


def test_out_of_memory_keeps_the_global_batch(monkeypatch, capsys):
    started = two_gpus(monkeypatch, [Attempt(1, True), Attempt(1, True), Attempt(0, False)])
    autotrain_launch.run(set_up(params(auto_find_batch_size=True, batch_size=6, gradient_accumulation=2)), "ddp")
    sizes = [(r["per_device_train_batch_size"], r["gradient_accumulation_steps"]) for r in started]
    assert sizes == [(6, 2), (3, 4), (1, 12)]
    assert "batch_size=3, gradient_accumulation=4 (the same global batch)" in capsys.readouterr().err


@pytest.mark.parametrize("attempt", [Attempt(1, False), Attempt(1, True)])
def test_other_failures_are_not_tried_again(attempt, monkeypatch):
    started = two_gpus(monkeypatch, [attempt])
    with pytest.raises(TrainingFailed):
        autotrain_launch.run(set_up(params(auto_find_batch_size=not attempt.out_of_memory)), None)
    assert len(started) == 1


def test_out_of_memory_with_one_pair():
    with pytest.raises(UserError, match="Out of memory with one pair per device"):
        smaller_batches(recipe(batch_size=1))


def test_inside_a_launcher_no_other_is_started(monkeypatch):
    trained = []
    started = two_gpus(monkeypatch, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("orpo_dist.train.train", trained.append)
    autotrain_launch.run(set_up(params()), "ddp")
    assert not started and trained[0].data.dataset_name == "rows.jsonl"


def test_one_process_trains_here_with_the_environment_of_the_run(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("orpo_dist.train.train", lambda recipe: seen.update(token=os.environ.get("HF_TOKEN")))
    autotrain_launch.run(set_up(params(token="t")), "deepspeed")
    assert seen == {"token": "t"} and "HF_TOKEN" not in os.environ
    assert "distributed_backend=deepspeed needs several GPUs" in capsys.readouterr().err


def relay(text, chunk):
    sink, data = io.BytesIO(), text.encode()
    relay = Relay(sink)
    for start in range(0, len(data), chunk):
        relay.feed(data[start : start + chunk])
    during = sink.getvalue().decode()
    return relay, during, relay.close(), sink.getvalue().decode()


REPORT = """E0101 torch/distributed/elastic/multiprocessing/api.py:874] failed (exitcode: {code}) local_rank: 0
Traceback (most recent call last):
  File "x.py", line 1, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
=====
  exitcode  : {code} (pid: 12)
"""


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_a_user_error_of_the_processes_is_one_readable_line(chunk):
    _, _, user_error, shown = relay("error: rows.jsonl is missing\n" + REPORT.format(code=2), chunk)
    assert user_error and shown == "error: rows.jsonl is missing\n"


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_any_other_report_is_passed_on(chunk):
    text = "step 1\n" + REPORT.format(code=-9)
    _, _, user_error, shown = relay(text, chunk)
    assert not user_error and shown == text


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_progress_and_tracebacks_that_end_are_passed_on_at_once(chunk):
    text = 'Traceback (most recent call last):\n  File "x.py"\nValueError: caught\nTraining 10%\rTraining 20%'
    _, during, user_error, shown = relay(text, chunk)
    assert during == shown == text and not user_error


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_running_out_of_memory_is_seen(chunk):
    assert relay("[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried\n", chunk)[0].out_of_memory
    assert not relay("all is well\n", chunk)[0].out_of_memory


# ---------------------------------------------------------------- the documentation


def test_the_docs_list_every_option_with_its_default():
    rows = [line.split("|") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    documented = {row[1].strip(" `"): row[2].strip(" `") for row in rows}
    expected = {option.name: str(option.default).lower() for option in fields(LLMTrainingParams)}
    assert {name: value.lower() for name, value in documented.items()} == expected


def test_the_docs_list_every_foreign_option():
    text = DOCS.read_text()
    assert [name for name in FOREIGN if f"`{name}`" not in text] == []


# ---------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, chat_tokenizer, tiny_llama):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(len(chat_tokenizer)).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data_folder(tmp_path):
    """A folder with a file per split; one answer is the text 42."""
    folder = tmp_path / "data"
    folder.mkdir()
    answers = [
        ("42", "41"),
        ("Open the settings.", "No."),
        ("Paris, of course.", "The river."),
        ("Let me check.", "user"),
    ]
    for split, rows in (("train", answers * 2), ("validation", answers[:2])):
        lines = [
            {"question": f"Question number {row}?", "good": good, "bad": bad} for row, (good, bad) in enumerate(rows)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def llm_command(model_folder, data_folder, run_folder, *flags):
    columns = ["--prompt-text-column", "question", "--text_column", "good", "--rejected-text-column", "bad"]
    return [
        *(sys.executable, "-m", "orpo_dist.cli", "llm", "--train", "--trainer", "orpo", "--model", str(model_folder)),
        *("--data-path", str(data_folder), "--project-name", str(run_folder), *columns, *flags),
    ]


def test_a_run_from_the_command_line(model_folder, data_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run_folder = tmp_path / "run"
    flags = "--valid-split=validation --peft --lora-r=4 --epochs=2 --lr=1e-2 --batch-size=1 --rl-gamma=0.9"
    command = llm_command(model_folder, data_folder, run_folder, *flags.split(), "--token", "hf_abcdefghijklmnop")
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "rl_gamma (PPO and GRPO)" in result.stderr
    assert "wandb" in result.stderr and "Traceback" not in result.stderr
    assert "become a user and an assistant turn" in result.stderr

    summary = json.loads((run_folder / "run_summary.json").read_text())
    assert (summary["pairs"], summary["steps"], summary["world_size"]) == (8, 4, 1)
    assert summary["eval_after"]["nll_loss"] < summary["eval_before"]["nll_loss"]
    assert len(list(run_folder.glob("checkpoint-*"))) <= 2  # the last and the best
    for path in run_folder.rglob("*"):
        assert path.is_dir() or b"hf_abcdefghijklmnop" not in path.read_bytes(), path
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert PeftModel.from_pretrained(base, run_folder).peft_config["default"].r == 4
    assert (run_folder / "merged" / "config.json").is_file()


def test_bad_input_is_one_line_and_exit_code_2(model_folder, data_folder, tmp_path):
    (data_folder / "train.jsonl").write_text('{"question": "q", "good": "a"\n')
    command = llm_command(model_folder, data_folder, tmp_path / "run", "--log", "none")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "train.jsonl" in result.stderr


# Pretends to have two GPUs. On a CPU both the config and the recipe must say so, or accelerate counts one process.
TWO_PROCESSES = """
import sys, yaml
from pathlib import Path
from orpo_dist import cli
from orpo_dist.autotrain import local as autotrain_launch

config, start = autotrain_launch.accelerate_config, autotrain_launch._start

def on_cpu(*arguments):
    path = Path("accelerate.yaml").resolve()
    path.write_text(yaml.safe_dump({**yaml.safe_load(config(*arguments).read_text()), "use_cpu": True}))
    return path

autotrain_launch.gpu_count = lambda: 2
autotrain_launch.accelerate_config = on_cpu
autotrain_launch._start = lambda recipe, *rest: start({**recipe, "use_cpu": True}, *rest)
sys.exit(cli.main(sys.argv[1:]))
"""


def run_two_processes(command, folder):
    (folder / "two.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "two.py", *command[command.index("llm") :]]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(DOCS.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.topology
def test_a_run_in_two_processes(model_folder, data_folder, tmp_path):
    run_folder = tmp_path / "run"
    flags = "--distributed-backend deepspeed --log none --valid-split validation --batch-size 1 --token hf_abcdefghijk"
    result = run_two_processes(llm_command(model_folder, data_folder, run_folder, *flags.split()), tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((run_folder / "run_summary.json").read_text())
    assert (summary["world_size"], summary["global_batch_size"], summary["steps"]) == (2, 8, 1)
    assert not any(b"hf_abcdefghijk" in path.read_bytes() for path in run_folder.rglob("*") if path.is_file())


@pytest.mark.topology
def test_bad_input_in_two_processes_is_one_line_too(model_folder, data_folder, tmp_path):
    (data_folder / "validation.jsonl").write_text('{"question": "q", "good": "a"\n')
    flags = "--distributed-backend deepspeed --log none --valid-split validation"
    result = run_two_processes(llm_command(model_folder, data_folder, tmp_path / "run", *flags.split()), tmp_path)
    assert result.returncode == 2
    assert (
        result.stderr.count("error") == 1 and "validation.jsonl" in result.stderr and "Traceback" not in result.stderr
    )


# ---------------------------------------------------------------- assignment and copies


def test_an_assigned_block_size_counts_as_asked_for():
    made = params()
    assert "max_length" not in made.to_recipe_mapping()
    made.block_size = "512"
    assert made.to_recipe_mapping()["max_length"] == 512


@pytest.mark.parametrize(
    "again",
    [
        lambda made: dataclasses.replace(made, lr=1e-4),
        copy.copy,
        copy.deepcopy,
        lambda made: pickle.loads(pickle.dumps(made)),
    ],
    ids=["replace", "copy", "deepcopy", "pickle"],
)
def test_copies_remember_what_was_asked_for(again):
    assert "max_length" not in again(params()).to_recipe_mapping()
    assert again(params(block_size=1024)).to_recipe_mapping()["max_length"] == 1024


def test_assignments_are_checked():
    made = params()
    for name, value in (("batch_size", 0), ("lr", "fast"), ("learning_rate", 1.0), ("quantization", "int4")):
        with pytest.raises(UserError, match=name):
            setattr(made, name, value)
    assert made == params()
