"""The recipe that each of AutoTrain's options becomes."""

import pytest

from orpo_dist.autotrain.setup import set_up
from orpo_dist.errors import UserError
from orpo_dist.options.data import asked_length
from orpo_dist.recipe.recipe import Recipe
from tests.autotrain.options import MAPPED, params, recipe


def test_a_default_run_is_a_valid_recipe():
    training = Recipe.from_mapping(recipe()).training
    assert (training.max_length, training.max_prompt_length, training.max_completion_length) == (1024, None, None)
    assert (training.learning_rate, training.warmup_steps, training.beta) == (3e-5, 0.1, 0.1)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 8
    assert not training.bf16 and not training.fp16 and training.gradient_checkpointing


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


def test_lengths_that_contradict_each_other():
    with pytest.raises(UserError, match="says max_prompt_length=512, but max_prompt_length=100"):
        recipe(block_size=[1024, 512], max_prompt_length=100)
    with pytest.raises(UserError, match="has 4 numbers"):
        recipe(block_size=[1, 2, 3, 4])
