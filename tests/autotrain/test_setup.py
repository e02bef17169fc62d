"""What a run needs beside its recipe: notes, tokens in the environment, precision, the chat template."""

import json

import pytest

from orpo_dist.autotrain.setup import choose_chat_template, set_up
from orpo_dist.errors import UserError
from orpo_dist.recipe.recipe import Recipe
from tests.autotrain.options import params


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


ROW = {"prompt": "What is six times seven?", "chosen": "42", "rejected": "41"}


COLUMNS = {"prompt_text_column": "prompt", "text_column": "chosen", "rejected_text_column": "rejected"}


def test_strings_get_the_chat_template_of_a_tokenizer_that_has_one(chat_tokenizer):
    assert choose_chat_template(params(**COLUMNS), chat_tokenizer, [ROW]).apply is True


def test_strings_without_a_chat_template_stay_as_they_are(plain_tokenizer):
    choice = choose_chat_template(params(**COLUMNS), plain_tokenizer, [ROW])
    assert choice.apply is False and "has no chat template" in choice.reason


def test_a_named_template_is_applied_to_any_tokenizer(plain_tokenizer):
    assert choose_chat_template(params(**COLUMNS, chat_template="chatml"), plain_tokenizer, [ROW]).apply is True


def test_rendered_strings_are_not_rendered_again(chat_tokenizer):
    row = ROW | {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}
    choice = choose_chat_template(params(**COLUMNS), chat_tokenizer, [row])
    assert choice.apply is False and "rendered already" in choice.reason


@pytest.mark.parametrize(
    "odd",
    [
        {"chosen": 42},
        {"chosen": None},
        {"prompt": '[{"role": "user", "content": "x"}]'},
        {"prompt": "[INST] x [/INST]"},
        {"chosen": '[{"role": "assistant", "content": "x"}]'},
        {"chosen": {"__json__": "42"}},
    ],
)
@pytest.mark.parametrize("place", [0, 39])
def test_one_odd_value_changes_nothing(chat_tokenizer, odd, place):
    rows = [ROW] * 40
    rows[place] = ROW | odd
    assert choose_chat_template(params(**COLUMNS), chat_tokenizer, rows).apply is True


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": "[INST] hi [/INST]"},
        {"prompt": "\n\nHuman: hi\n\nAssistant:"},
        {"prompt": "### Human: hi", "chosen": "### Assistant: hello"},
        {"chosen": "42<|im_end|>"},
        {"prompt": {"__json__": '"<|im_start|>user\\nhi<|im_end|>"'}},
    ],
)
def test_most_rows_say_that_they_are_rendered(chat_tokenizer, changed):
    choice = choose_chat_template(params(**COLUMNS), chat_tokenizer, [ROW, *[ROW | changed] * 5])
    assert choice.apply is False and "in 5 of the first 6 rows: they are rendered already" in choice.reason


def test_messages_that_came_through_csv_are_messages(chat_tokenizer):
    row = {
        "prompt": "hi",
        "chosen": "{'role': 'assistant', 'content': 'a'}",
        "rejected": "{'role': 'assistant', 'content': 'b'}",
    }
    assert choose_chat_template(params(**COLUMNS), chat_tokenizer, [row] * 3) is None


def test_the_prompt_is_written_once(chat_tokenizer):
    from orpo_dist.data.prepare import prepare_pairs

    made = params(**COLUMNS)
    mapping = made.to_recipe_mapping() | {
        "apply_chat_template": choose_chat_template(made, chat_tokenizer, [ROW]).apply
    }
    options = Recipe.from_mapping(mapping).training.prepare_options(is_encoder_decoder=False)
    pair = prepare_pairs([ROW], chat_tokenizer, options).dataset[0]
    chosen = chat_tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"])
    rendered = "<|im_start|>user\nWhat is six times seven?<|im_end|>\n<|im_start|>assistant\n42<|im_end|>\n"
    assert chosen == rendered


def test_message_lists_are_left_to_the_data_step(chat_tokenizer):
    row = {"chosen": [{"role": "user", "content": "hi"}], "rejected": [{"role": "user", "content": "hi"}]}
    assert choose_chat_template(params(**COLUMNS), chat_tokenizer, [row]) is None
