"""A loaded model becomes the one that trains."""

import pytest
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from orpo_dist import ORPOTrainer
from orpo_dist.errors import UserError
from orpo_dist.training.adapting import adapted_model
from orpo_dist.training.borrowed import BorrowedModel
from tests.trainer_runs import config, pairs


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


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("adapted", [False, True], ids=["peft_config", "model"])
def test_adapters_that_add_tokens_are_refused_by_name(tmp_path, tiny_llama, chat_tokenizer, kind, adapted):
    settings = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = tiny_llama(len(chat_tokenizer))
    given = {"model": get_peft_model(model, settings)} if adapted else {"model": model, "peft_config": settings}
    with pytest.raises(UserError, match=f"{kind.__name__} cannot be trained here"):
        ORPOTrainer(
            **given,
            args=config(tmp_path),
            train_dataset=[{"not": "looked at"}],
            processing_class=chat_tokenizer,
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefix_tuning_trains_in_the_padded_layout(trained, chat_tokenizer, caplog, checkpointing):
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    rows = pairs(8, len(chat_tokenizer))
    if checkpointing:
        with pytest.raises(UserError, match="gradient_checkpointing"):
            trained(rows, peft_config=settings, gradient_checkpointing=True)
        return
    trainer = trained(rows, peft_config=settings, max_steps=1)
    assert not trainer.layout.is_packed and "Padded layout: prefix tuning" in caplog.text
    (event,) = [event for event in trainer.state.log_history if "loss" in event]
    assert event["grad_norm"] > 0
