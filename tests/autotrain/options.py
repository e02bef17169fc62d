"""AutoTrain's parameters as the tests of this folder make them, and one changed value for each of them."""

from pathlib import Path

from orpo_dist.autotrain.project import LLMTrainingParams

DOCS = Path(__file__).parents[2] / "docs" / "autotrain.md"
BASE = {"model": "m", "data_path": "rows.jsonl", "project_name": "runs/p", "log": "none"}


def params(**values):
    return LLMTrainingParams(**{**BASE, **values})


def recipe(**values):
    return params(**values).to_recipe_mapping()


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
    "allow_template_drops": (True, {}, {"allow_template_drops": True}),
    "split_special_tokens": (True, {}, {"split_special_tokens": True}),
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
