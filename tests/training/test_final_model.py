"""The end of a run writes a loadable model or fails; with several processes in tests/topologies/test_final_model.py."""

import pytest
from transformers import AutoModelForCausalLM

from orpo_dist.errors import SaveError
from tests.trainer_runs import pairs


def test_saving_checks_what_it_wrote(trained, chat_tokenizer, tmp_path):
    trainer = trained(pairs(8, len(chat_tokenizer)), max_steps=1)
    trainer.save_model(str(tmp_path / "out"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_folder_without_a_model_fails(trained, chat_tokenizer, tmp_path, monkeypatch):
    """A model that saves only its config, as transformers' does for a state dict that was never gathered."""
    trainer = trained(pairs(8, len(chat_tokenizer)), max_steps=1)
    monkeypatch.setattr(
        trainer.model, "save_pretrained", lambda folder, **_: trainer.model.config.save_pretrained(folder)
    )
    with pytest.raises(SaveError, match="could be loaded: there is neither model"):
        trainer.save_model(str(tmp_path / "out"))


def test_an_earlier_model_in_the_folder_does_not_pass_for_this_one(trained, chat_tokenizer, tmp_path, monkeypatch):
    trainer = trained(pairs(8, len(chat_tokenizer)), max_steps=1)
    trainer.save_model(str(tmp_path / "out"))
    monkeypatch.setattr(trainer.model, "save_pretrained", lambda *_, **__: None)
    with pytest.raises(SaveError, match="is of another run"):
        trainer.save_model(str(tmp_path / "out"))
