"""Token ids that the model does not have: refused before training, never put there by the trainer itself."""

import copy

import pytest

from orpo_dist import ORPOTrainer
from orpo_dist.errors import UserError
from orpo_dist.training.vocabulary import filler_token
from tests.trainer_runs import config, pairs


@pytest.fixture
def with_an_added_pad(chat_tokenizer):
    """Its pad token is new, and the model has not been resized."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    assert tokenizer.pad_token_id == len(chat_tokenizer)
    return tokenizer


@pytest.mark.parametrize("place", ["train", "eval_second", "test"])
def test_a_token_without_an_embedding_is_named(tmp_path, with_an_added_pad, tiny_llama, place):
    vocabulary = len(with_an_added_pad) - 1
    good, bad = pairs(6, vocabulary), pairs(6, vocabulary)
    bad[3]["rejected_ids"][-1] = vocabulary

    def trainer(train, evaluation):
        args = config(tmp_path / "run")
        return ORPOTrainer(
            tiny_llama(vocabulary),
            args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=with_an_added_pad,
        )

    with pytest.raises(UserError) as caught:
        if place == "test":
            trainer(good, None).predict(bad)
        else:
            trainer(bad if place == "train" else good, {"first": good, "second": bad})
    assert f"{place}, pair 3, rejected: token id {vocabulary} ('<new pad>') is not in" in str(caught.value)
    assert f"model.resize_token_embeddings({vocabulary + 1})" in str(caught.value)


@pytest.mark.parametrize("layout", [{}, {"padding_free": False, "prefix_sharing": False}], ids=["packed", "padded"])
def test_fillers_padding_and_replies_use_tokens_of_the_model(tmp_path, with_an_added_pad, tiny_llama, layout):
    vocabulary = len(with_an_added_pad) - 1
    model = tiny_llama(vocabulary)
    assert filler_token(model.config, with_an_added_pad) == with_an_added_pad.eos_token_id
    rows = pairs(5, vocabulary)
    trainer = ORPOTrainer(
        model,
        config(tmp_path / "run", generate_during_eval=True, max_completion_length=8, max_steps=1, **layout),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=with_an_added_pad,
    )
    trainer.train()
    trainer.evaluate()
    assert next(iter(trainer.loaders.of(rows, [[-1]])))["input_ids"].max() < vocabulary
    assert (tmp_path / "run" / "samples.jsonl").is_file()
