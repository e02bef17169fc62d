"""The translation of AutoTrain's parameters into a recipe of `orpo-dist train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_dist.errors import UserError

if TYPE_CHECKING:
    from orpo_dist.autotrain.params import LLMTrainingParams

MODEL_MAX_LENGTH = 2048  # left at this default it does not cap an explicit block_size
# AutoTrain's name -> the recipe's (TRL's and transformers' names), where the value passes unchanged.
RENAMED = {
    "model": "model_name_or_path",
    "project_name": "output_dir",
    "data_path": "dataset_name",
    "train_split": "dataset_train_split",
    "valid_split": "dataset_test_split",
    "max_samples": "max_samples",
    "prompt_text_column": "prompt_column",
    "image_column": "image_column",
    "image_folder": "image_folder",
    "allow_image_urls": "allow_image_urls",
    "allow_outside_image_folder": "allow_outside_image_folder",
    "allow_template_drops": "allow_template_drops",
    "add_eos_token": "add_eos_token",
    "on_bad_row": "on_bad_row",
    "max_bad_rows": "max_bad_rows",
    "truncation_side": "truncation_side",
    "dpo_beta": "beta",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "warmup_ratio": "warmup_steps",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "ddp_timeout": "ddp_timeout",
    "auto_find_batch_size": "auto_find_batch_size",
    "resume_from_checkpoint": "resume_from_checkpoint",
    "log": "report_to",
    "save_strategy": "save_strategy",
    "save_total_limit": "save_total_limit",
    "trust_remote_code": "trust_remote_code",
}


@dataclass(frozen=True)
class Lengths:
    """Token limits of a row; None: no limit of its own."""

    block_size: int
    max_prompt_length: int | None
    max_completion_length: int | None


def recipe_mapping(params: "LLMTrainingParams") -> dict[str, Any]:
    """The flat mapping for `Recipe.from_mapping`, under TRL's names; without secrets, and without what is unset."""
    lengths = token_lengths(params)
    recipe = {theirs: getattr(params, ours) for ours, theirs in RENAMED.items()}
    recipe |= {
        # The recipe's own default is the same number, and knows that it holds for text alone.
        "max_length": lengths.block_size if params.asks_block_size else None,
        "max_prompt_length": lengths.max_prompt_length,
        "max_completion_length": lengths.max_completion_length,
        "logging_steps": 0.01 if params.logging_steps == -1 else params.logging_steps,
        "gradient_checkpointing": not params.disable_gradient_checkpointing,
        "attn_implementation": "flash_attention_2" if params.use_flash_attention_2 else params.attn_implementation,
        "bf16": params.mixed_precision == "bf16",
        "fp16": params.mixed_precision == "fp16",
        "per_device_eval_batch_size": params.eval_batch_size or params.batch_size,
    }
    if params.rejected_text_column is not None:
        recipe |= {"chosen_column": params.text_column, "rejected_column": params.rejected_text_column}
    if params.chat_template not in (None, "none", "tokenizer"):
        recipe["chat_template"] = params.chat_template
    recipe["apply_chat_template"] = False if params.chat_template == "none" else params.apply_chat_template
    recipe |= _evaluation_and_saving(params) | _adapter(params) | _hub(params)
    return {name: value for name, value in recipe.items() if value is not None}


def token_lengths(params: "LLMTrainingParams") -> Lengths:
    """Token limits out of block_size, model_max_length, max_prompt_length and max_completion_length.

    A list is [block_size, max_prompt_length, max_completion_length], as in the DPO and ORPO trainers of Hugging Face's
    AutoTrain.

    Raises:
        UserError: more than three numbers, or a limit that is said twice and differently.
    """
    sizes = params.block_size if isinstance(params.block_size, tuple) else (params.block_size,)
    if len(sizes) > 3:
        raise UserError(
            f"block_size={list(sizes)} has {len(sizes)} numbers: give one (prompt + answer), or up to three: "
            "block_size, max_prompt_length, max_completion_length."
        )
    limits = {name: getattr(params, name) for name in ("max_prompt_length", "max_completion_length")}
    for name, listed in zip(limits, sizes[1:], strict=False):
        if limits[name] not in (None, listed):
            raise UserError(f"block_size={list(sizes)} says {name}={listed}, but {name}={limits[name]} is set too.")
        limits[name] = listed
    block_size = sizes[0]
    if block_size == -1:
        block_size = params.model_max_length
    elif params.model_max_length != MODEL_MAX_LENGTH:
        block_size = min(block_size, params.model_max_length)
    return Lengths(block_size, limits["max_prompt_length"], limits["max_completion_length"])


def _evaluation_and_saving(params: "LLMTrainingParams") -> dict[str, Any]:
    recipe: dict[str, Any] = {"eval_strategy": params.eval_strategy if params.valid_split else "no"}
    if params.save_strategy == "steps":
        recipe["save_steps"] = params.save_steps
    if recipe["eval_strategy"] == "steps":
        recipe["eval_steps"] = params.save_steps
    if recipe["eval_strategy"] == params.save_strategy != "no":
        recipe["load_best_model_at_end"] = True
    return recipe


def _adapter(params: "LLMTrainingParams") -> dict[str, Any]:
    if not params.peft:
        return {}
    modules = [name.strip() for name in (params.target_modules or "").split(",") if name.strip()]
    target: list[str] | None = modules
    if modules in ([], ["all-linear"]):
        target = None  # the recipe's default
    elif len(modules) == 1 and modules[0].isidentifier():
        target = [rf"(.*\.)?{modules[0]}"]  # peft reads a single string as a pattern for the whole path
    return {
        "use_peft": True,
        "lora_target_modules": target,
        "lora_r": params.lora_r,
        "lora_alpha": params.lora_alpha,
        "lora_dropout": params.lora_dropout,
        "merge_adapter": params.merge_adapter,
        "load_in_4bit": params.quantization == "int4",
        "load_in_8bit": params.quantization == "int8",
    }


def _hub(params: "LLMTrainingParams") -> dict[str, Any]:
    if not params.push_to_hub:
        return {}
    name = Path(params.project_name).name
    owned = f"{params.username}/{name}" if params.username else name
    return {"push_to_hub": True, "hub_model_id": params.repo_id or owned, "hub_private_repo": params.hub_private}
