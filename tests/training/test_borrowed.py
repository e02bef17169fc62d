"""The caller's model during training and after it: it generates, is copied, merged and trained by others as before."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments

from orpo_dist import ORPOTrainer
from orpo_dist.training.borrowed import BorrowedModel
from tests.model.tiny_models import VOCAB, tiny_model
from tests.trainer_runs import assert_same_weights, config, pairs, weights

IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
# A window and a softcap; a mixer that runs on unshared rows.
FAMILIES = ("gemma2", "qwen3_5")
pytestmark = pytest.mark.filterwarnings("ignore:.*falling back to its reference PyTorch implementation")


def uses(model):
    """What users do with a model: each result must be that of the plain model with the same weights."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = [
            model(input_ids=IDS, attention_mask=MASK).logits,
            model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss,
            model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False),
        ]
    model.train(was_training)
    return found


def assert_plain(model, plain):
    """plain: as `model` came, never given to a trainer."""
    plain.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.get_output_embeddings().weight.zero_()  # a copy whose forward ran the original would not notice
    assert not uses(copied)[0].any()
    # A hook that transformers adds for gradient checkpointing cannot be pickled.
    pickled = [] if model.is_gradient_checkpointing else [pickle.loads(pickle.dumps(model))]
    for one in (model, copy.deepcopy(model), *pickled):
        for ours, theirs in zip(uses(one), uses(plain), strict=True):
            torch.testing.assert_close(ours, theirs)


class Uses(TrainerCallback):
    """Uses the model at every event of a step; training must not notice."""

    def __init__(self, check):
        self.check, self.times = check, 0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        with torch.random.fork_rng():
            self.check(model)
        self.times += 1

    on_pre_optimizer_step = on_step_end = on_log = on_step_begin


def trainer_of(model, folder, tokenizer, callbacks=(), peft_config=None, **more):
    return ORPOTrainer(
        model,
        config(folder, learning_rate=0.01, max_steps=2, **more),
        train_dataset=pairs(8, VOCAB),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


def names(module):
    """What hangs on a model besides its weights."""
    return {
        name: (
            "forward" in vars(one),
            len(one._forward_hooks),
            len(one._forward_pre_hooks),
            vars(one).get("p"),
            vars(one).get("_no_split_modules"),
        )
        for name, one in module.named_modules()
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_callbacks_and_afterwards(family, checkpointing, tmp_path, chat_tokenizer):
    undisturbed = tiny_model(family)
    trainer_of(undisturbed, tmp_path / "a", chat_tokenizer, gradient_checkpointing=checkpointing).train()
    model, plain = tiny_model(family), tiny_model(family)
    callback = Uses(lambda model: assert_plain(model, plain))
    trainer = trainer_of(model, tmp_path / "b", chat_tokenizer, [callback], gradient_checkpointing=checkpointing)
    trainer.train()
    assert trainer.layout.is_packed and callback.times >= 6
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert_plain(model, plain)


def test_an_adapter_in_callbacks_and_afterwards(tmp_path, chat_tokenizer):
    def check(model):
        merged = copy.deepcopy(model).merge_and_unload()
        for ours, theirs in zip(uses(model)[:2], uses(merged)[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert not any("lora" in name for name in merged.state_dict())

    trainer = trainer_of(tiny_model("llama"), tmp_path, chat_tokenizer, [Uses(check)], peft_config=LORA)
    trainer.train()
    check(trainer.model)
    check(pickle.loads(pickle.dumps(trainer.model)))


def test_mixed_precision_in_callbacks_and_afterwards(tmp_path, chat_tokenizer):
    """accelerate wraps the model's forward, and leaves that wrapper on it."""
    found = []
    check = lambda model: found.append(uses(model)[2].shape[1])  # noqa: E731
    trainer = trainer_of(tiny_model("llama"), tmp_path, chat_tokenizer, [Uses(check)], bf16=True)
    trainer.train()
    check(trainer.model)
    assert set(found) == {11}
    assert trainer.model._original_forward.__func__ is type(trainer.model).forward  # accelerate wrapped it, not ours


def test_nothing_is_left_on_the_model(tmp_path, chat_tokenizer):
    model = tiny_model("qwen3_5")
    model.config.attention_dropout = 0.25
    before, attention = names(model), model.config._attn_implementation
    trainer = trainer_of(model, tmp_path, chat_tokenizer)
    assert model.config.attention_dropout == 0.0
    trainer.train()
    assert names(model) == before
    assert (model.config.attention_dropout, model.config._attn_implementation) == (0.25, attention)


def test_an_interrupted_run_gives_it_back_too(tmp_path, chat_tokenizer):
    def stop(model):
        raise KeyboardInterrupt

    model = tiny_model("qwen3_5")
    before = names(model)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(model, tmp_path, chat_tokenizer, [Uses(stop)]).train()
    assert names(model) == before


def test_other_trainers_go_on_with_it(tmp_path, chat_tokenizer):
    model = tiny_model("gemma2")
    trainer_of(model, tmp_path / "first", chat_tokenizer).train()
    fresh = tiny_model("gemma2")
    fresh.load_state_dict(model.state_dict())
    second = trainer_of(model, tmp_path / "second", chat_tokenizer)
    second.train()
    expected = trainer_of(fresh, tmp_path / "fresh", chat_tokenizer)
    expected.train()
    assert second.layout.is_packed
    assert_same_weights(weights(second), weights(expected), 0.0)
    rows = [{"input_ids": IDS[1].tolist(), "labels": IDS[1].tolist()}] * 4
    options = TrainingArguments(
        str(tmp_path / "plain"), use_cpu=True, max_steps=1, report_to="none", save_strategy="no"
    )
    Trainer(model=model, args=options, train_dataset=rows).train()
    second.train()
    assert set(second.evaluate(pairs(3, VOCAB, seed=1))) >= {"eval_loss", "eval_rewards/margins"}


# ---------------------------------------------------------------- the parts


class Handle:
    """Of a change to a list; `patches.Patched` as far as it is used."""

    def __init__(self, on):
        self.on = on
        on.append(self)

    def undo(self):
        self.on.remove(self)
        return True


def test_changes_are_on_from_the_start_and_in_every_use():
    on: list = []
    borrowed = BorrowedModel()
    borrowed.change(lambda: [Handle(on)])
    borrowed.change(lambda: [Handle(on)])
    assert len(on) == 2
    for _ in range(2):
        with borrowed.in_use():
            assert len(on) == 2
            with borrowed.in_use():
                assert len(on) == 2
            assert len(on) == 2
        assert not on


def test_another_model_within_a_use():
    """model_init makes one inside train()."""
    first: list = []
    second: list = []
    borrowed = BorrowedModel()
    borrowed.change(lambda: [Handle(first)])
    with borrowed.in_use():
        borrowed.another()
        borrowed.change(lambda: [Handle(second)])
        assert not first and second
    assert not second
    with borrowed.in_use():
        assert not first and second
