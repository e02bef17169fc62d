"""A subclass with a sampler, a penalty and NEFTune trains the same on two ranks as on one."""

import pytest

from tests.launching.launch import run_worker
from tests.trainer_runs import assert_same_weights, pairs

pytestmark = pytest.mark.topology


def test_two_ranks_are_one(tmp_path, chat_tokenizer, tiny_llama):
    tiny_llama(len(chat_tokenizer)).save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    runs = []
    for launcher, per_device, accumulation in ((None, 8, 1), ("torchrun", 1, 4)):
        options = dict(
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            neftune_noise_alpha=5.0,
            num_train_epochs=2,
            learning_rate=0.05,
            optim="sgd",
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            gradient_checkpointing=False,
        )
        settings = {"model": str(tmp_path / "model"), "tokenizer": str(tmp_path / "tokenizer"), "config": options}
        settings["train"] = pairs(19, len(chat_tokenizer))  # 8 + 8 + 3
        runs.append(run_worker(settings, tmp_path / f"{launcher}", launcher, worker="subclass_worker"))
    one, two = runs
    assert (one.facts["world_size"], two.facts["world_size"]) == (1, 2)
    assert [line["step"] for line in two.log] == [line["step"] for line in one.log]
    assert_same_weights(two.weights, one.weights)
    for ours, theirs in zip(two.log[:-1], one.log[:-1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
