"""What the rows of a run mean for its layout."""

from types import SimpleNamespace

import pytest

from orpo_dist.distributed.environment import Environment, Sharding
from orpo_dist.errors import UserError
from orpo_dist.loss import Objective
from orpo_dist.training.layout_options import layout_options
from tests.trainer_runs import config

ALONE = Environment(0, 1, 0, 0, 1, Sharding.REPLICATED)


def row(prompt, chosen, rejected, **more):
    return {"prompt_ids": [5] * prompt, "chosen_ids": [6] * chosen, "rejected_ids": [7] * rejected, **more}


def options_of(folder, train, evaluation=None, max_length=None, **more):
    preparation = SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=0),
        options=SimpleNamespace(max_length=max_length),
        processing_class=object(),
    )
    return layout_options(config(folder, **more), Objective(), preparation, ALONE, None, train, evaluation)


@pytest.mark.parametrize(
    ("evaluation", "longest"),
    [(None, 10), ([row(9, 2, 8)], 17), ({"a": [row(1, 1, 1)], "b": [row(3, 30, 2)]}, 33)],
)
def test_the_longest_sequence_is_of_all_sets(tmp_path, evaluation, longest):
    """Frequencies of some rotary embeddings are fixed from it, for evaluation too."""
    assert options_of(tmp_path, [row(4, 6, 2), row(2, 1, 3)], evaluation).max_length == longest


def test_max_length_goes_before(tmp_path):
    assert options_of(tmp_path, [row(4, 6, 2)], max_length=512).max_length == 512


def test_sharing_is_off_where_it_gains_under_5_percent(tmp_path, caplog):
    assert options_of(tmp_path, [row(8, 4, 4)]).prefix_sharing
    assert not options_of(tmp_path, [row(1, 40, 40)]).prefix_sharing
    assert "prefix_sharing is off: it would save a factor of 1.012" in caplog.text
    assert not options_of(tmp_path, [row(8, 4, 4)], prefix_sharing=False).prefix_sharing


def test_padding_value_goes_before_the_tokenizers(tmp_path):
    assert options_of(tmp_path, [row(4, 6, 2)]).pad_token_id == 0
    assert options_of(tmp_path, [row(4, 6, 2)], padding_value=9).pad_token_id == 9


def test_images_need_a_processor(tmp_path):
    assert options_of(tmp_path, [row(4, 6, 2, images=None)]).images is None
    with pytest.raises(UserError, match="processing class is a tokenizer"):
        options_of(tmp_path, [row(4, 6, 2)], [row(4, 6, 2, images=[b"png"])])
