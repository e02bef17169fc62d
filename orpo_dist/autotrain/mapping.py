"""The translation of AutoTrain's parameters into a recipe of `orpo-dist train`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orpo_dist.errors import UserError


@dataclass(frozen=True)
class Lengths:
    """Token limits of a row; None: no limit of its own."""

    block_size: int
    max_prompt_length: int | None
    max_completion_length: int | None


def recipe_mapping(
    values: Mapping[str, Any], given: frozenset[str], renamed: Mapping[str, str], model_max_length: int
) -> dict[str, Any]:
    """The flat mapping for `Recipe.from_mapping`, under TRL's names; without secrets, and without what is unset.

    Args:
        values: every option of AutoTrain under its name.
        given: the options that the user set; the default limit on tokens does not hold for vision-language models.
        renamed: AutoTrain's name -> the recipe's, where the value passes unchanged.
        model_max_length: the default of that option: left there, it does not cap an explicit block_size.
    """
    params = SimpleNamespace(**values)
    lengths = token_lengths(params, model_max_length)
    recipe = {theirs: values[ours] for ours, theirs in renamed.items()}
    recipe |= {
        # The recipe's own default is the same number, and knows that it holds for text alone.
        "max_length": lengths.block_size if given & {"block_size", "model_max_length"} else None,
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


def token_lengths(params: SimpleNamespace, default_model_max_length: int) -> Lengths:
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
    elif params.model_max_length != default_model_max_length:
        block_size = min(block_size, params.model_max_length)
    return Lengths(block_size, limits["max_prompt_length"], limits["max_completion_length"])


def _evaluation_and_saving(params: SimpleNamespace) -> dict[str, Any]:
    recipe: dict[str, Any] = {"eval_strategy": params.eval_strategy if params.valid_split else "no"}
    if params.save_strategy == "steps":
        recipe["save_steps"] = params.save_steps
    if recipe["eval_strategy"] == "steps":
        recipe["eval_steps"] = params.save_steps
    if recipe["eval_strategy"] == params.save_strategy != "no":
        recipe["load_best_model_at_end"] = True
    return recipe


def _adapter(params: SimpleNamespace) -> dict[str, Any]:
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


def _hub(params: SimpleNamespace) -> dict[str, Any]:
    if not params.push_to_hub:
        return {}
    name = Path(params.project_name).name
    owned = f"{params.username}/{name}" if params.username else name
    return {"push_to_hub": True, "hub_model_id": params.repo_id or owned, "hub_private_repo": params.hub_private}
