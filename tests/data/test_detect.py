"""Where the pair lies in a row, from column names and first rows. More formats: test_prepare, test_bad_inputs."""

import pytest

from orpo_dist.data.detect import detect_format
from orpo_dist.errors import UserError
from orpo_dist.options.data import PrepareOptions

TEXT = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
MESSAGES = {
    "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
    "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}],
}


def detected(row, **options):
    return detect_format(list(row), [row], PrepareOptions(**options))


def test_text_columns():
    found = detected(TEXT)
    assert (found.prompt, found.chosen, found.rejected) == ("prompt", "chosen", "rejected")
    assert not found.repeats_prompt and not found.has_images


def test_named_columns_win():
    row = {**TEXT, "question": "Which?", "good": "This.", "bad": "That."}
    found = detected(row, prompt_column="question", chosen_column="good", rejected_column="bad")
    assert (found.prompt, found.chosen, found.rejected) == ("question", "good", "bad")


def test_an_empty_name_means_no_such_column():
    row = {"prompt": "x", "chosen": "Why? Because.", "rejected": "Why? No."}
    assert detected(row, prompt_column="").prompt is None


def test_completions_that_repeat_the_prompt():
    row = {"prompt": "Why?", "chosen": "Why? Because.", "rejected": "Why? No."}
    assert detected(row).repeats_prompt
    assert not detect_format(list(row), [row, TEXT], PrepareOptions()).repeats_prompt  # one row does not


def test_messages_hold_their_prompt():
    assert detected(MESSAGES).prompt is None


def test_swift_names():
    row = {"messages": MESSAGES["chosen"], "rejected_response": "No."}
    found = detected(row)
    assert (found.chosen, found.rejected) == ("messages", "rejected_response")


def test_images_count_only_where_a_row_has_one():
    assert detected({**TEXT, "images": ["a.png"]}).has_images
    assert not detected({**TEXT, "images": []}).has_images
    assert not detected({**TEXT, "images": ["a.png"]}, image_column="").has_images


def test_columns_that_tell_the_model_something_are_named():
    found = detected({**TEXT, "system_prompt": "Be brief.", "chatHistory": [], "id": 1})
    assert found.description.endswith(", not read: `system_prompt`, not read: `chatHistory`")
    assert "not read" not in detected({**TEXT, "system_prompt": "x"}, system_column="system_prompt").description


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"chosen": "a"}, {}, "No column `rejected`. The columns are `chosen`"),
        (TEXT, {"chosen_column": "rejected"}, "are both `rejected`: a pair needs two columns"),
        (TEXT, {"prompt_column": "question"}, "prompt_column=question: no such column"),
        ({"question": "Why?", "chosen": "a", "rejected": "b"}, {}, "set prompt_column=question"),
        ({"chosen": "a", "rejected": "b"}, {"apply_chat_template": True}, "there is no prompt column"),
        (MESSAGES, {"apply_chat_template": False}, "which only a chat template can render"),
        ({**TEXT, "images": ["a"], "rejected_images": ["b"]}, {}, "`rejected_images`: the images of a pair belong"),
    ],
)
def test_what_is_not_a_format(row, options, message):
    with pytest.raises(UserError, match=message):
        detected(row, **options)
