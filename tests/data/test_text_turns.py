"""Turns of the user in completions that are text."""

import pytest

from orpo_dist.data.prepare import prepare_pairs
from orpo_dist.data.text_turns import NOTE, TURNS, user_turns
from orpo_dist.errors import BadRow
from orpo_dist.options.data import PrepareOptions


@pytest.mark.parametrize("user, assistant", TURNS)
def test_the_user_is_found(user, assistant):
    prompt = f"{user} One?{assistant}"
    completion = f" Two.{user} Three?{assistant} Four.{user} Five?{assistant} Six."
    written = "".join(completion[start:stop] for start, stop in user_turns(prompt, completion, "chosen"))
    assert written == f"{user} Three?{assistant}{user} Five?{assistant}"
    assert user_turns(prompt.lstrip(), " Two.", "chosen") == []
    assert user_turns("Write a dialogue.", completion, "chosen") == []
    with pytest.raises(BadRow, match="ends with a turn"):
        user_turns(prompt, f" Two.{user} Three?", "chosen")


def test_dialogues_that_part_early(plain_tokenizer):
    """Both sides are in the loss with the assistant's words alone."""
    one = "\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: Three?\n\nAssistant: Four."
    other = "\n\nHuman: One?\n\nAssistant: No."
    prepared = prepare_pairs([{"chosen": one, "rejected": other}], plain_tokenizer, PrepareOptions())
    (row,) = prepared.dataset
    start, stop = row["chosen_context"]
    # Stripped: the tokenizer merges white space with the words before and after.
    assert plain_tokenizer.decode(row["chosen_ids"][start:stop]).strip() == "Human: Three?\n\nAssistant:"
    assert row["rejected_context"] == []
    assert [note.kind for note in prepared.notes if note.kind == NOTE] == [NOTE]
