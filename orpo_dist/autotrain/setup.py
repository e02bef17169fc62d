"""What an AutoTrain run needs beyond its recipe: credentials, the decision about the chat template, and notes.

Secrets travel in environment variables only, so that no file of the run holds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from orpo_dist.autotrain.ignored_options import warn_of
from orpo_dist.autotrain.params import LLMTrainingParams
from orpo_dist.data.chat_template import CHAT_TEMPLATES
from orpo_dist.data.detect import column_strings
from orpo_dist.data.messages import decode
from orpo_dist.data.rendered import RenderedMarkers
from orpo_dist.errors import UserError

# Option -> what must be on for it to matter.
_NEEDS = {
    "target_modules": "peft",
    "lora_r": "peft",
    "lora_alpha": "peft",
    "lora_dropout": "peft",
    "merge_adapter": "peft",
    "username": "push_to_hub",
    "repo_id": "push_to_hub",
    "hub_private": "push_to_hub",
    "eval_strategy": "valid_split",
    "eval_batch_size": "valid_split",
}


@dataclass(frozen=True)
class Setup:
    """A run that is ready to start.

    Attributes:
        recipe: flat mapping for `Recipe.from_mapping`.
        environment: variables for the training processes; may hold secrets.
        notes: one-line messages for the person who started the run.
    """

    recipe: dict[str, Any]
    environment: dict[str, str] = field(repr=False)
    notes: list[str]


def set_up(params: LLMTrainingParams, *, trains_here: bool = True) -> Setup:
    """Recipe, environment and notes of a run; neither data nor model is read.

    Args:
        trains_here: whether this machine's GPUs, or their absence, are the run's.

    Raises:
        UserError: fp16 without a GPU, contradicting token limits.
    """
    recipe, environment = params.to_recipe_mapping(), dict[str, str]()
    notes = [warn_of(params.ignored)] if params.ignored else []
    notes += _without_effect(params)
    notes += _saving_notes(params, recipe)
    if params.token:
        environment["HF_TOKEN"] = params.token
    if params.log == "wandb" and params.wandb_token:
        environment["WANDB_API_KEY"] = params.wandb_token
    if params.log == "wandb" and params.wandb_run_id:
        environment |= {"WANDB_RUN_ID": params.wandb_run_id, "WANDB_RESUME": "allow"}
    if trains_here and params.mixed_precision and not torch.accelerator.is_available():
        if params.mixed_precision == "fp16":
            raise UserError("mixed_precision=fp16 needs a GPU, and none was found: use bf16 or leave it out.")
        recipe["use_cpu"] = True  # transformers refuses bf16 on a CPU that was not asked for
    if not params.mixed_precision and (torch.cuda.is_available() or not trains_here):
        notes.append("mixed_precision is not set: training in float32; --mixed-precision bf16 is faster.")
    return Setup(recipe, environment, notes)


def with_chat_template(setup: Setup, params: LLMTrainingParams) -> Setup:
    """Decide about the chat template where the user did not, by the tokenizer and the first rows.

    Raises:
        UserError: the data or the tokenizer cannot be loaded.
    """
    if params.chat_template == "none" or params.apply_chat_template is not None:
        return setup
    from orpo_dist.data.chat_template import resolve_chat_template
    from orpo_dist.data.detect import SAMPLE
    from orpo_dist.data.sources import load_rows
    from orpo_dist.model.loading.processor import load_processing_class, tokenizer_of

    rows = load_rows(params.data_path, split=params.train_split, max_samples=SAMPLE, token=params.token)
    loaded = load_processing_class(params.model, trust_remote_code=params.trust_remote_code, token=params.token)
    tokenizer = tokenizer_of(loaded)
    tokenizer.chat_template = resolve_chat_template(None, loaded)  # a processor may be the one that has it
    choice = choose_chat_template(params, tokenizer, list(rows))
    if choice is None:
        return setup
    recipe = setup.recipe | {"apply_chat_template": choice.apply}
    return Setup(recipe, setup.environment, [*setup.notes, choice.reason])


@dataclass(frozen=True)
class TemplateChoice:
    """Whether strings are put into turns, and why, in one line."""

    apply: bool
    reason: str


def choose_chat_template(
    params: LLMTrainingParams, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]
) -> TemplateChoice | None:
    """AutoTrain's default, once instead of twice: string prompts and answers become a user and an assistant turn if
    the tokenizer has a chat template and they are not rendered already. What most of the rows are decides. None:
    message lists, the data step knows."""
    prompt_column = params.prompt_text_column or "prompt"
    answer_column = params.text_column if params.rejected_text_column else "chosen"
    rejected_column = params.rejected_text_column or "rejected"
    columns = (prompt_column, answer_column, rejected_column)
    if not any(prompt_column in row for row in rows):
        return None
    if any(kind != "text" for kind in column_strings(rows, *columns).values()):
        return None
    texts = [[_text(row.get(name)) for name in columns] for row in rows]
    template = CHAT_TEMPLATES.get(params.chat_template or "", tokenizer.chat_template)
    markers = RenderedMarkers(tokenizer, template if isinstance(template, str) else None)
    found = [_rendered(markers, dict(zip(columns, values, strict=True))) for values in texts]
    rendered = [sign for sign in found if sign is not None]
    if len(rendered) * 2 > len(rows):
        column, marker = rendered[0]
        return TemplateChoice(
            False,
            f"column {column!r} holds {marker} in {len(rendered)} of the first {len(rows)} rows: they are rendered "
            "already, and no chat template is applied.",
        )
    if params.chat_template in (None, "tokenizer") and tokenizer.chat_template is None:
        return TemplateChoice(
            False,
            f"{params.model} has no chat template: prompts and answers are trained on as they are "
            "(--chat-template chatml puts them into turns).",
        )
    return TemplateChoice(
        True, "string prompts and answers become a user and an assistant turn (--chat-template none keeps them as is)."
    )


def _text(value: Any) -> str:
    value = decode(value)  # stored as JSON where one value of the column is not text
    return value if isinstance(value, str) else ""


def _rendered(markers: RenderedMarkers, texts: dict[str, str]) -> tuple[str, str] | None:
    """Column and marker of the first sign of a chat template in a row."""
    prompt, *answers = texts.values()
    for column, text in texts.items():
        if marker := markers.find(text):
            return column, marker
    marker = next((found for answer in answers if (found := markers.find(f"{prompt}\n{answer}"))), None)
    return None if marker is None else (next(iter(texts)), marker)


def _without_effect(params: LLMTrainingParams) -> list[str]:
    defaults = {option.name: option.default for option in fields(params)}
    changed = {name for name, default in defaults.items() if getattr(params, name) != default}
    notes = [
        f"{name} has no effect without {needed}."
        for name, needed in _NEEDS.items()
        if name in changed and not getattr(params, needed)
    ]
    if params.log != "wandb":
        notes += [
            f"{name} has no effect without log=wandb." for name in ("wandb_token", "wandb_run_id") if name in changed
        ]
    if "save_steps" in changed and "steps" not in (params.save_strategy, params.eval_strategy):
        notes.append("save_steps has no effect without save_strategy=steps.")
    if params.padding == "left":
        notes.append("padding=left changes nothing: ORPO scores every token by itself, whichever side is padded.")
    return notes


def _saving_notes(params: LLMTrainingParams, recipe: dict[str, Any]) -> list[str]:
    notes = []
    if params.save_total_limit == 1 and params.save_strategy != "no":
        notes.append(
            "save_total_limit=1: the last checkpoint is removed only after the next one is complete, so there must be "
            "room for two."
        )
    if recipe.get("load_best_model_at_end"):
        notes.append("the model that is kept is the checkpoint with the lowest eval loss, as in AutoTrain.")
    return notes
