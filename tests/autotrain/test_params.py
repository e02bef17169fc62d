"""AutoTrain's parameters: the defaults, and one clear error for each wrong value."""

import copy
import dataclasses
import pickle
from dataclasses import fields

import pytest

from orpo_dist.autotrain.project import LLMTrainingParams
from orpo_dist.errors import UserError
from tests.autotrain.options import DOCS, ELSEWHERE, MAPPED, params


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


def test_every_option_has_a_row_in_the_table():
    assert {option.name for option in fields(LLMTrainingParams)} == MAPPED.keys() | ELSEWHERE.keys()


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


def test_the_docs_list_every_option_with_its_default():
    rows = [line.split("|") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    documented = {row[1].strip(" `"): row[2].strip(" `") for row in rows}
    expected = {option.name: str(option.default).lower() for option in fields(LLMTrainingParams)}
    assert {name: value.lower() for name, value in documented.items()} == expected


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
    for name, value in (("batch_size", 0), ("lr", "fast"), ("learning_rate", 1.0), ("quantization", "int3")):
        with pytest.raises(UserError, match=name):
            setattr(made, name, value)
    assert made == params()


def test_two_assignments_that_belong_together_may_come_in_any_order():
    made = params()
    made.quantization = "int4"
    with pytest.raises(UserError, match="quantization=int4 needs peft"):
        made.to_recipe_mapping()
    made.peft = True
    assert made.to_recipe_mapping()["load_in_4bit"] is True
