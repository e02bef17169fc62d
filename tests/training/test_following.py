"""Options that change between construction and train(): by the user, and by the trials of a search."""

import pytest
from transformers import LlamaForCausalLM, TrainerCallback

from orpo_dist import ORPOTrainer
from orpo_dist.errors import UserError
from tests.trainer_runs import assert_same_weights, config, pairs, weights

SPACE = [
    {"beta": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 0.1},
    {"beta": 0.9, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 0.2},
    {"beta": 0.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 0.05},
    {"beta": 0.5, "nll_scope": "completion", "disable_dropout": False, "padding_free": False, "seed": 7},
]


class Recorder(TrainerCallback):
    """The weights, the log and the losses at the end of every train()."""

    def __init__(self):
        self.runs = []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.runs.append(({name: p.detach().clone() for name, p in model.named_parameters()}, state.log_history))


@pytest.fixture
def build(tmp_path, chat_tokenizer, tiny_llama):
    rows = pairs(16, len(chat_tokenizer))

    def build(folder, recorder, model=None, **more):
        options = {"is_encoder_decoder": False, "num_train_epochs": 1, "max_steps": -1, **more}
        made = dict(model=model) if model is not None else dict(model_init=lambda: dropping(tiny_llama, chat_tokenizer))
        return ORPOTrainer(
            **made,
            args=config(tmp_path / folder, **options),
            train_dataset=rows,
            eval_dataset=rows[:4],
            processing_class=chat_tokenizer,
            callbacks=[recorder],
        )

    return build


def dropping(tiny_llama, tokenizer):
    """With dropout in attention, which disable_dropout switches off."""
    model = tiny_llama(len(tokenizer))
    model.config.attention_dropout = 0.3
    other = LlamaForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.slow
def test_every_trial_of_a_search_is_the_run_of_its_own_options(build):
    pytest.importorskip("optuna", reason="no optuna: pip install optuna")
    searched = Recorder()
    trainer = build("search", searched, eval_strategy="epoch", save_strategy="epoch")

    def space(trial):
        trial.suggest_categorical("number", [0])
        return SPACE[trial.number]

    best = trainer.hyperparameter_search(
        space, n_trials=len(SPACE), backend="optuna", direction="minimize", compute_objective=lambda m: m["eval_loss"]
    )
    assert len(searched.runs) == len(SPACE)
    expected, options = [], {}
    for number, values in enumerate(SPACE):
        options = {**options, **values}  # the Trainer's args keep what an earlier trial has set
        alone = Recorder()
        run = build(f"alone{number}", alone, **options)
        run.train()
        assert_same_weights(searched.runs[number][0], alone.runs[0][0])
        assert searched.runs[number][1][0]["loss"] == pytest.approx(alone.runs[0][1][0]["loss"], rel=1e-6)
        expected.append(run.evaluate()["eval_loss"])
        assert len(list((run._run_folder.parent / "search" / f"run-{number}").glob("checkpoint-*"))) == 1
    assert best.objective == pytest.approx(min(expected), rel=1e-6)
    assert int(best.run_id) == expected.index(min(expected))
    trainer.train()  # with the options of the last trial, as transformers leaves them
    assert_same_weights(searched.runs[-1][0], alone.runs[0][0])


@pytest.mark.parametrize("init", [True, False])
def test_what_args_say_when_training_begins_holds(build, tiny_llama, chat_tokenizer, init):
    def model():
        return None if init else tiny_llama(len(chat_tokenizer))

    changes = dict(beta=0.7, per_device_train_batch_size=2, gradient_accumulation_steps=4, nll_scope="completion")
    changes |= dict(learning_rate=0.05, loss_chunk_size=3, prefix_sharing=False, label_smoothing=0.1)
    later, at_once = build("later", Recorder(), model()), build("at_once", Recorder(), model(), **changes)
    for name, value in changes.items():
        setattr(later.args, name, value)
    later.train()
    at_once.train()
    assert_same_weights(weights(later), weights(at_once))
    assert later.state.global_step == at_once.state.global_step == 2
    assert later.evaluate()["eval_loss"] == pytest.approx(at_once.evaluate()["eval_loss"], rel=1e-5)
    assert not later.layout.prefix_sharing


@pytest.mark.parametrize(
    "name, value", [("max_length", 7), ("truncation_side", "right"), ("fp16", True), ("report_to", ["wandb"])]
)
def test_what_is_fixed_by_then_is_refused_by_name(build, name, value):
    trainer = build("fixed", Recorder())
    setattr(trainer.args, name, value)
    with pytest.raises(UserError, match=f"{name} was .* when the trainer was made"):
        trainer.train()


def test_options_of_a_model_that_was_given_are_fixed(build, tiny_llama, chat_tokenizer):
    trainer = build("given", Recorder(), tiny_llama(len(chat_tokenizer)))
    trainer.args.disable_dropout = False
    with pytest.raises(UserError, match="disable_dropout"):
        trainer.train()


def test_a_value_set_later_is_checked_as_one_set_at_once(build):
    trainer = build("checked", Recorder())
    trainer.args.beta = -1.0
    with pytest.raises(UserError, match="beta"):
        trainer.train()


@pytest.mark.slow
def test_a_second_training_keeps_the_global_batch_that_was_asked_for(build, tiny_llama, chat_tokenizer, monkeypatch):
    """auto_find_batch_size sets more accumulation steps, which is not a larger batch."""
    step = ORPOTrainer.training_step

    def runs_out_of_memory(self, model, inputs, *args):
        if len(inputs["orpo_layout"].index) > 3:
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, *args)

    monkeypatch.setattr(ORPOTrainer, "training_step", runs_out_of_memory)
    more = dict(per_device_train_batch_size=8, auto_find_batch_size=True, max_steps=1)
    trainer = build("smaller", Recorder(), **more)
    trainer.train()
    trainer.args.beta = 0.3
    trainer.train()
    assert trainer._global_batch == 8
