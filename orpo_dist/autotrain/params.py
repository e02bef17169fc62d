"""AutoTrain's parameters for ORPO: their names, types, defaults and what contradicts what.

Names and defaults follow monostate/aitraining (src/autotrain/trainers/clm/params.py), the fork of Hugging Face's
AutoTrain; docs/autotrain.md lists every one with its difference.
https://github.com/monostate/aitraining/blob/main/src/autotrain/trainers/clm/params.py
"""

import difflib
import os
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from orpo_dist.autotrain.ignored_options import IGNORED
from orpo_dist.autotrain.mapping import recipe_mapping
from orpo_dist.errors import UserError
from orpo_dist.options.data import DataOptions, Unasked

CHOICES = {
    "trainer": ("orpo",),
    "padding": ("right", "left"),
    "quantization": ("int4", "int8"),
    "mixed_precision": ("bf16", "fp16"),
    "distributed_backend": ("ddp", "deepspeed", "zero3"),
    "log": ("wandb", "tensorboard", "trackio", "none"),
    "eval_strategy": ("epoch", "steps", "no"),
    "save_strategy": ("epoch", "steps", "no"),
}
NONE_WORDS = ("none", "null", "no", "")

_DATA_OPTIONS = {option.name: option for option in fields(DataOptions)}
MODEL_MAX_LENGTH = Unasked(2048)  # left at this default it does not cap an explicit block_size
_AT_LEAST_ONE = ("batch_size", "gradient_accumulation", "lora_r", "save_steps", "save_total_limit", "ddp_timeout")


def _option(default: Any, help: str, *, recipe: str | None = None, **options: Any) -> Any:
    """`recipe`: the recipe's name of an option whose value passes unchanged."""
    return field(default=default, metadata={"help": help, "recipe": recipe}, **options)


def _data_option(name: str) -> Any:
    """An option that AutoTrain's users set under the recipe's own name."""
    declared = _DATA_OPTIONS[name]
    return _option(declared.default, declared.metadata["help"], recipe=name)


@dataclass(init=False)
class LLMTrainingParams:
    """What AutoTrain's `LLMTrainingParams` says about an ORPO run.

    Takes keyword arguments under AutoTrain's names. Options of AutoTrain's other trainers are kept out and remembered
    in `ignored`: `AutoTrainProject.create` warns of them by name. The default limit on tokens does not
    hold for vision-language models. Assignments are checked as the arguments are.

    Raises:
        UserError: an unknown name, a value of the wrong type, options that contradict each other.
    """

    model: str = _option("google/gemma-3-270m", "Model on the hub, or a folder.", recipe="model_name_or_path")
    project_name: str = _option(
        "project-name", "Folder of the run, and the model's name on the hub.", recipe="output_dir"
    )
    trainer: str = _option("orpo", "Only orpo.")
    trust_remote_code: bool = _option(
        False, "Run Python code that the model's repository ships.", recipe="trust_remote_code"
    )

    data_path: str = _option(
        "data", "A file (JSONL, JSON, CSV, Parquet), a folder of them, or a dataset on the hub.", recipe="dataset_name"
    )
    train_split: str = _option(
        "train",
        "Split to train on; `config:split` on the hub, `<split>.jsonl` in a folder.",
        recipe="dataset_train_split",
    )
    valid_split: str | None = _option(None, "Split to evaluate on. Unset: no evaluation.", recipe="dataset_test_split")
    max_samples: int | None = _option(None, "Use only this many rows.", recipe="max_samples")
    prompt_text_column: str | None = _option(
        None, "Column of the prompt. Unset: detected, or part of the messages.", recipe="prompt_column"
    )
    text_column: str = _option("text", "Column of the chosen answer.")
    rejected_text_column: str | None = _option(None, "Column of the rejected answer.")
    image_column: str | None = _data_option("image_column")
    image_folder: str | None = _data_option("image_folder")
    allow_image_urls: bool = _data_option("allow_image_urls")
    allow_outside_image_folder: bool = _data_option("allow_outside_image_folder")
    chat_template: str | None = _option(
        None, "tokenizer (the model's own), chatml, zephyr, a Jinja file or template, or none."
    )
    apply_chat_template: bool | None = _option(
        None, "Put string prompts and answers into turns. Unset: where the tokenizer has a chat template."
    )
    allow_template_drops: bool = _data_option("allow_template_drops")
    split_special_tokens: bool = _data_option("split_special_tokens")
    add_eos_token: bool = _data_option("add_eos_token")
    padding: str = _option("right", "Side of the padding; ORPO's loss does not depend on it.")
    block_size: int | tuple[int, ...] = _option(
        Unasked(1024), "Most tokens of prompt + answer; -1: model_max_length; or a list."
    )
    model_max_length: int = _option(MODEL_MAX_LENGTH, "Longest input of the model: caps block_size.")
    max_prompt_length: int | None = _option(None, "Most tokens of the prompt. Unset: prompts are never cut.")
    max_completion_length: int | None = _option(None, "Most tokens of an answer.")
    truncation_side: str = _data_option("truncation_side")
    on_bad_row: str = _data_option("on_bad_row")
    max_bad_rows: float = _data_option("max_bad_rows")

    dpo_beta: float = _option(0.1, "Weight of the odds-ratio term.", recipe="beta")
    lr: float = _option(3e-5, "Learning rate.", recipe="learning_rate")
    epochs: float = _option(1, "Passes over the training rows.", recipe="num_train_epochs")
    batch_size: int = _option(2, "Pairs per device and micro-batch.", recipe="per_device_train_batch_size")
    gradient_accumulation: int = _option(4, "Micro-batches per optimizer step.", recipe="gradient_accumulation_steps")
    warmup_ratio: float = _option(0.1, "Share of the steps in which the learning rate rises.", recipe="warmup_steps")
    optimizer: str = _option("adamw_torch", "Optimizer, as in transformers.", recipe="optim")
    scheduler: str = _option("linear", "Learning rate schedule, as in transformers.", recipe="lr_scheduler_type")
    weight_decay: float = _option(0.0, "Weight decay.", recipe="weight_decay")
    max_grad_norm: float = _option(1.0, "Gradient clipping.", recipe="max_grad_norm")
    seed: int = _option(42, "Random seed.", recipe="seed")
    auto_find_batch_size: bool = _option(
        False, "Halve batch_size after running out of memory; same global batch.", recipe="auto_find_batch_size"
    )

    peft: bool = _option(False, "Train a LoRA adapter instead of all weights.")
    quantization: str | None = _option(None, "int4 or int8 base weights; needs peft.")
    target_modules: str | None = _option("all-linear", "Modules that get an adapter, separated by commas.")
    lora_r: int = _option(16, "Rank of LoRA.")
    lora_alpha: int = _option(32, "LoRA alpha.")
    lora_dropout: float = _option(0.05, "Dropout of LoRA.")
    merge_adapter: bool = _option(True, "Merge the adapter into its base after training.")

    mixed_precision: str | None = _option(None, "bf16 or fp16. Unset: float32.")
    distributed_backend: str | None = _option(None, "With several GPUs: ddp, deepspeed (ZeRO-2) or zero3.")
    ddp_timeout: int = _option(7200, "Seconds a process waits for the others.", recipe="ddp_timeout")
    use_flash_attention_2: bool = _option(False, "Short for attn_implementation=flash_attention_2.")
    attn_implementation: str | None = _option(None, "Attention implementation, as in transformers.")
    disable_gradient_checkpointing: bool = _option(False, "Keep activations: faster, more memory.")
    resume_from_checkpoint: str | None = _option(
        None, "auto: the newest checkpoint of project_name; or a path.", recipe="resume_from_checkpoint"
    )

    log: str = _option("wandb", "Experiment tracker: wandb, tensorboard, trackio or none.", recipe="report_to")
    logging_steps: int = _option(-1, "Log every so many optimizer steps; -1: about a hundred times a run.")
    eval_strategy: str = _option("epoch", "When to evaluate: epoch, steps (every save_steps) or no.")
    eval_batch_size: int | None = _option(None, "Pairs per device in evaluation. Unset: batch_size.")
    save_strategy: str = _option("epoch", "When to save: epoch, steps or no.", recipe="save_strategy")
    save_steps: int = _option(500, "Optimizer steps between checkpoints with save_strategy=steps.")
    save_total_limit: int = _option(1, "Checkpoints to keep.", recipe="save_total_limit")
    wandb_token: str | None = _option(None, "W&B key; passed on in the environment, never stored.", repr=False)
    wandb_run_id: str | None = _option(None, "W&B run to continue.")

    push_to_hub: bool = _option(False, "Upload the model to the hub.")
    username: str | None = _option(None, "Owner of the model on the hub.")
    token: str | None = _option(None, "Hub token; passed on in the environment, never stored.", repr=False)
    repo_id: str | None = _option(None, "Full name on the hub. Unset: username/project_name.")
    hub_private: bool = _option(True, "Create the hub repository as a private one.")

    def __init__(self, **values: Any) -> None:
        self.ignored: list[str] = [name for name in values if name in IGNORED]
        unknown = [name for name in values if name not in IGNORED and name not in FIELD_TYPES]
        if unknown:
            raise UserError("\n".join(explain_unknown(name) for name in unknown))
        for option in fields(self):
            vars(self)[option.name] = convert(option.name, values.get(option.name, option.default))
        self._check_values()
        self._check_combinations()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "ignored":  # not an option
            super().__setattr__(name, value)
            return
        if name not in FIELD_TYPES:
            raise UserError(explain_unknown(name))
        before = dict(vars(self))
        vars(self).update({name: convert(name, value)})
        try:
            self._check_values()  # combinations are checked by to_recipe_mapping(): one of two may be assigned first
        except UserError:
            vars(self).update(before)
            raise

    @property
    def given(self) -> frozenset[str]:
        """The options whose value is not a default that nobody asked for (`Unasked`). The value itself carries this, so
        it survives `dataclasses.replace`, which passes every field, and copies and pickles."""
        return frozenset(name for name in FIELD_TYPES if not isinstance(getattr(self, name), Unasked))

    def _check_values(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if name == "trainer" and value not in allowed:
                raise UserError(f"trainer={value!r} is not in orpo_dist, which trains ORPO only: use trainer=orpo.")
            if value is not None and value not in allowed:
                raise UserError(f"{name}={value!r} is not one of {', '.join(allowed)}.")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"warmup_ratio={self.warmup_ratio} is a share of the steps: between 0 and 1.")
        if self.logging_steps < 1 and self.logging_steps != -1:
            raise UserError(f"logging_steps={self.logging_steps} must be at least 1, or -1.")
        if not self.project_name:
            raise UserError("project_name is empty: it is the folder of the run.")

    def _check_combinations(self) -> None:
        if self.quantization and not self.peft:
            raise UserError(
                f"quantization={self.quantization} needs peft: quantised weights are rounded to a few levels and "
                "cannot be trained, only a LoRA adapter on top of them can. Add peft (--peft), or drop quantization."
            )
        if self.use_flash_attention_2 and self.attn_implementation not in (None, "flash_attention_2"):
            raise UserError(
                f"use_flash_attention_2 and attn_implementation={self.attn_implementation!r} contradict each other: "
                "leave one out."
            )
        if self.apply_chat_template and self.chat_template == "none":
            raise UserError("apply_chat_template and chat_template=none contradict each other: leave one out.")
        if self.auto_find_batch_size and self.distributed_backend == "zero3":
            raise UserError(
                "auto_find_batch_size cannot be used with ZeRO-3: its memory depends on how weights are gathered, and "
                "a rank that runs out of memory leaves the others waiting. Set batch_size and gradient_accumulation."
            )
        if self.rejected_text_column is None and self.text_column != "text":
            raise UserError(
                f"text_column={self.text_column!r} names the chosen answers, but rejected_text_column is missing: "
                "ORPO needs both (--rejected-text-column)."
            )

    def to_recipe_mapping(self) -> dict[str, Any]:
        """The flat mapping for `Recipe.from_mapping`, under TRL's names; without secrets, and without what is unset.

        Raises:
            UserError: options that contradict each other.
        """
        self._check_combinations()
        values = {name: getattr(self, name) for name in FIELD_TYPES}
        return recipe_mapping(values, self.given, RENAMED, MODEL_MAX_LENGTH)


FIELD_TYPES = get_type_hints(LLMTrainingParams)
RENAMED: dict[str, str] = {f.name: f.metadata["recipe"] for f in fields(LLMTrainingParams) if f.metadata["recipe"]}

# Names that people know from TRL or older AutoTrain, for the hint in an error.
KNOWN_ELSEWHERE = {theirs: ours for ours, theirs in RENAMED.items() if ours != theirs} | {
    "max_length": "block_size",
    "num_epochs": "epochs",
    "chosen_column": "text_column",
    "rejected_column": "rejected_text_column",
    "use_peft": "peft",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "evaluation_strategy": "eval_strategy",
    "max_target_length": "max_completion_length",
}


def is_flag(name: str) -> bool:
    """Whether the option is a yes/no one, which the command line takes without a value."""
    return bool in _kinds(name)


def convert(name: str, value: Any) -> Any:
    """`value` as the type of the option; text as it comes from a command line included.

    Raises:
        UserError: it cannot be read as that type.
    """
    if isinstance(value, Unasked):
        return value
    kinds = _kinds(name)
    if isinstance(value, str) and value.lower() in NONE_WORDS and NoneType in kinds and name in CHOICES:
        value = None
    if value is None and NoneType in kinds:
        return None
    if name == "block_size":
        return _block_size(value)
    converted: Any
    if bool in kinds:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        converted = words.get(str(value).lower())
        wanted = "true or false"
    elif int in kinds or float in kinds:
        converted = _number(value, int if int in kinds else float)
        wanted = "a whole number" if int in kinds else "a number"
    else:
        converted = os.fspath(value) if isinstance(value, str | os.PathLike) else None
        wanted = "text"
    if converted is None:
        raise UserError(f"{name}={value!r} is not {wanted}.")
    return converted


def explain_unknown(name: str) -> str:
    """One line about an option that does not exist, with the one that was probably meant."""
    if name in KNOWN_ELSEWHERE:
        return f"{name} is not an AutoTrain option: it is called {KNOWN_ELSEWHERE[name]} here."
    close = difflib.get_close_matches(name, [*FIELD_TYPES, *IGNORED], n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else "see docs/autotrain.md for the options there are."
    return f"{name} is not an option: {hint}"


def _kinds(name: str) -> tuple[Any, ...]:
    return get_args(FIELD_TYPES[name]) or (FIELD_TYPES[name],)


def _number(value: Any, kind: type[int] | type[float]) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
        return number if kind is float else int(number) if number == int(number) else None
    except (ValueError, OverflowError):
        return None


def _block_size(value: Any) -> int | tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers = [_number(part, int) for part in parts]
    sizes = tuple(int(number) for number in numbers if number is not None and (number >= 1 or number == -1))
    if len(sizes) != len(numbers) or not sizes:
        raise UserError(f"block_size={value!r} is not a number of tokens, -1, or a list such as 1024,512,256.")
    return sizes[0] if len(sizes) == 1 else sizes
