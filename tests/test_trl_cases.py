"""What TRL's own tests of its ORPO trainer ask for, on small models and rows of our own, with our import.

https://github.com/huggingface/trl/blob/main/tests/experimental/test_orpo_trainer.py, of July 2026. The one
difference: tokenised rows have the columns prompt_ids, chosen_ids and rejected_ids.
"""

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from orpo_dist import ORPOConfig, ORPOTrainer

ASKED = [
    ("Which river runs through Vienna?", "The Danube.", "The Thames, I think."),
    ("Name a prime above ten.", "Eleven is one.", "Twelve."),
    ("How long is a fortnight?", "Two weeks.", "Forty nights."),
    ("What melts at zero degrees?", "Ice does.", "Iron."),
    ("Who wrote Emma?", "Jane Austen did.", "Emma herself."),
    ("What is the opposite of early?", "Late.", "Earlier."),
    ("Which planet has rings?", "Saturn has.", "The moon."),
    ("What do bees make?", "Honey.", "Bees."),
]


def says(role, text):
    return {"role": role, "content": text}


KINDS = {
    "standard": lambda q, yes, no: {"prompt": q, "chosen": f" {yes}", "rejected": f" {no}"},
    "standard, implicit prompt": lambda q, yes, no: {"chosen": f"{q} {yes}", "rejected": f"{q} {no}"},
    "conversational": lambda q, yes, no: {
        "prompt": [says("user", q)],
        "chosen": [says("assistant", yes)],
        "rejected": [says("assistant", no)],
    },
    "conversational, implicit prompt": lambda q, yes, no: {
        "chosen": [says("user", q), says("assistant", yes)],
        "rejected": [says("user", q), says("assistant", no)],
    },
}


def rows(kind: str) -> DatasetDict:
    made = [KINDS[kind](*asked) for asked in ASKED]
    return DatasetDict(train=Dataset.from_list(made * 2), test=Dataset.from_list(made[:3]))


@pytest.fixture
def tokenizer(chat_tokenizer, tmp_path):
    """A copy that uses EOS as its pad token, as is usual for causal models."""
    chat_tokenizer.save_pretrained(tmp_path / "model")
    copy = AutoTokenizer.from_pretrained(tmp_path / "model")
    copy.pad_token = copy.eos_token
    copy.save_pretrained(tmp_path / "model")
    return copy


@pytest.fixture
def qwen(tokenizer, tmp_path):
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **small))
    model.save_pretrained(tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")


@pytest.fixture
def t5(tokenizer):
    torch.manual_seed(0)
    small = dict(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, pad_token_id=0, **small)
    )


def before(trainer):
    return {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}


def assert_trained(trainer, weights, named=""):
    """The run has ended with a loss, and every weight that is not all zero has moved."""
    assert trainer.state.log_history[-1]["train_loss"] is not None
    for name, weight in weights.items():
        if named in name and weight.sum() != 0:
            assert not torch.equal(weight, trainer.model.get_parameter(name)), name


REMOTE_CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM


class RemoteConfig(Qwen2Config):
    model_type = "remote_qwen"


class RemoteForCausalLM(Qwen2ForCausalLM):
    config_class = RemoteConfig
"""


def test_code_of_a_repository_runs_only_if_asked_for(tmp_path, qwen, tokenizer):
    folder = tmp_path / "model"
    (folder / "modeling_remote.py").write_text(REMOTE_CODE)
    config = qwen.config
    config.auto_map = {
        "AutoConfig": "modeling_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    config.save_pretrained(folder)
    text = (folder / "config.json").read_text().replace('"model_type": "qwen2"', '"model_type": "remote_qwen"')
    (folder / "config.json").write_text(text)

    def build(**more):
        return ORPOTrainer(
            model=str(folder),
            args=ORPOConfig(output_dir=str(tmp_path / "run"), report_to="none", **more),
            processing_class=tokenizer,
            train_dataset=rows("standard")["train"],
        )

    with pytest.raises(ValueError, match="custom code"):
        build()
    assert type(build(trust_remote_code=True).model).__name__ == "RemoteForCausalLM"


@pytest.mark.parametrize(
    "family, kind",
    [("qwen", "standard"), ("t5", "standard, implicit prompt"), ("qwen", "conversational")],
)
def test_every_weight_trains(tmp_path, request, tokenizer, family, kind):
    args = ORPOConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=2,
        max_steps=3,
        remove_unused_columns=False,
        gradient_accumulation_steps=1,
        learning_rate=9e-1,
        eval_strategy="steps",
        beta=0.1,
        report_to="none",
    )
    if family == "t5":
        args.is_encoder_decoder = True
    data = rows(kind)
    trainer = ORPOTrainer(
        model=request.getfixturevalue(family),
        args=args,
        processing_class=tokenizer,
        train_dataset=data["train"],
        eval_dataset=data["test"],
    )
    weights = before(trainer)
    trainer.train()
    assert_trained(trainer, weights)


@pytest.mark.parametrize("given", ["one set", "two sets", "none"])
def test_evaluation_sets_are_tokenised_at_construction(tmp_path, qwen, tokenizer, given):
    data = rows("standard")
    sets = {
        "one set": data["test"],
        "two sets": DatasetDict(first=data["test"], second=data["test"]),
        "none": None,
    }
    trainer = ORPOTrainer(
        model=qwen,
        args=ORPOConfig(output_dir=str(tmp_path / "run"), report_to="none"),
        processing_class=tokenizer,
        train_dataset=data["train"],
        eval_dataset=sets[given],
    )
    if given == "none":
        assert trainer.eval_dataset is None
        return
    made = trainer.eval_dataset if given == "two sets" else {"": trainer.eval_dataset}
    assert set(made) == ({"first", "second"} if given == "two sets" else {""})
    assert all("chosen_ids" in next(iter(each)) for each in made.values())


def test_the_tokenizer_is_loaded_with_the_model(tmp_path, qwen):
    trainer = ORPOTrainer(
        model=qwen,
        args=ORPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            max_steps=3,
            remove_unused_columns=False,
            beta=0.1,
            report_to="none",
        ),
        train_dataset=rows("standard")["train"],
    )
    assert trainer.processing_class is not None
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_an_adapter_trains(tmp_path, qwen, tokenizer, kind):
    data = rows(kind)
    trainer = ORPOTrainer(
        model=qwen,
        args=ORPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            max_steps=3,
            remove_unused_columns=False,
            gradient_accumulation_steps=4,
            learning_rate=9e-1,
            eval_strategy="steps",
            beta=0.1,
            report_to="none",
        ),
        processing_class=tokenizer,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"),
    )
    weights = before(trainer)
    trainer.train()
    assert_trained(trainer, weights, named="lora")


def test_metrics_of_the_user_are_in_the_log(tmp_path, qwen, tokenizer):
    data = rows("standard")
    trainer = ORPOTrainer(
        model=qwen,
        args=ORPOConfig(
            output_dir=str(tmp_path / "run"),
            remove_unused_columns=False,
            per_device_train_batch_size=2,
            do_eval=True,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=2,
            num_train_epochs=1,
            report_to="none",
        ),
        processing_class=tokenizer,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=lambda *args, **kwargs: {"test": 0.0},
    )
    trainer.train()
    assert trainer.state.log_history[-2]["eval_test"] == 0.0
