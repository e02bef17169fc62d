"""A loaded model becomes the one that trains."""

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from orpo_dist.training.adapting import adapted_model
from orpo_dist.training.borrowed import BorrowedModel
from tests.trainer_runs import config


def test_without_an_adapter_the_whole_model_trains(tmp_path, tiny_llama):
    model = tiny_llama(64)
    model.config.attention_dropout = 0.3
    borrowed = BorrowedModel()
    adapted = adapted_model(model, config(tmp_path), None, borrowed)
    assert adapted is model and all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.attention_dropout == 0.0
    borrowed.give_back()
    assert model.config.attention_dropout == 0.3


def test_dropout_stays_when_asked_for(tmp_path, tiny_llama):
    model = tiny_llama(64)
    model.config.attention_dropout = 0.3
    adapted_model(model, config(tmp_path, disable_dropout=False), None, BorrowedModel())
    assert model.config.attention_dropout == 0.3


def test_a_new_adapter_keeps_its_dropout(tmp_path, tiny_llama):
    adapted = adapted_model(
        tiny_llama(64), config(tmp_path), LoraConfig(r=2, lora_dropout=0.25, target_modules=["q_proj"]), BorrowedModel()
    )
    assert isinstance(adapted, PeftModel)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    dropouts = {module.p for name, module in adapted.named_modules() if name.endswith("lora_dropout.default")}
    assert dropouts == {0.25}


@pytest.mark.parametrize(("given", "settled"), [(None, False), (True, True)])
def test_ddp_does_not_search_under_checkpointing_unless_asked(tmp_path, tiny_llama, given, settled):
    args = config(tmp_path, gradient_checkpointing=True, ddp_find_unused_parameters=given)
    adapted_model(tiny_llama(64), args, None, BorrowedModel())
    assert args.ddp_find_unused_parameters is settled


def test_vision_options_beside_an_adapter_that_is_there_are_named(tmp_path, tiny_llama, caplog):
    model = get_peft_model(tiny_llama(64), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted_model(model, config(tmp_path, train_projector=True), None, BorrowedModel())
    assert "train_vision_tower and train_projector have no effect" in caplog.text
