"""What a subclass may override: honoured, or refused at construction by name."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, WeightedRandomSampler
from transformers import Trainer

from orpo_dist import ORPOTrainer
from orpo_dist.errors import UserError
from orpo_dist.training.overrides import REFUSED
from tests.trainer_runs import assert_same_weights, config, pairs, weights


@pytest.fixture
def build(tmp_path, chat_tokenizer, tiny_llama):
    def build(trainer_class, rows=None, eval_rows=None, **more):
        return trainer_class(
            tiny_llama(len(chat_tokenizer)),
            config(tmp_path / "run", **more),
            train_dataset=rows or pairs(16, len(chat_tokenizer)),
            eval_dataset=eval_rows,
            processing_class=chat_tokenizer,
        )

    return build


class Seeing(ORPOTrainer):
    """Keeps the pairs of every optimizer step."""

    def get_batch_samples(self, *args):
        batches, tokens = super().get_batch_samples(*args)
        self.steps = [*getattr(self, "steps", []), sorted(i for batch in batches for i in batch["orpo_layout"].index)]
        return batches, tokens


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_nothing_would_call_is_refused_by_name(build, name):
    with pytest.raises(UserError, match=rf"Mine\.{name} would never be called"):
        build(type("Mine", (ORPOTrainer,), {name: lambda self, *args, **kwargs: None}))


def test_nothing_of_our_own_is_refused():
    assert [name for name in REFUSED if name in vars(ORPOTrainer)] == []


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("strategy, in_order", [("sequential", True), ("random", False), ("batch_rebalance", False)])
def test_the_sampling_strategy_is_honoured(build, strategy, in_order):
    trainer = build(Seeing, train_sampling_strategy=strategy, max_steps=4)
    trainer.train()
    assert (trainer.steps == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(4)]) == in_order
    assert sorted(pair for step in trainer.steps for pair in step) == list(range(16))


class Backwards(Seeing):
    def _get_train_sampler(self, *args):
        return list(reversed(range(len(self.train_dataset))))


def test_a_sampler_of_a_subclass_gives_the_order(build):
    trainer = build(Backwards, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2)
    trainer.train()
    assert trainer.steps == [[12, 13, 14, 15], [8, 9, 10, 11]]


class Oversampling(Seeing):
    def _get_train_sampler(self, *args):
        return WeightedRandomSampler([1.0] + [0.0] * (len(self.train_dataset) - 1), num_samples=8)


def test_a_sampler_may_be_shorter_than_the_rows(build):
    trainer = build(Oversampling, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.steps == [[0] * 4] * 4


class NoSampler(Seeing):
    def _get_train_sampler(self, *args):
        return None


def test_no_sampler_is_the_order_of_the_rows(build):
    trainer = build(NoSampler, max_steps=2)
    trainer.train()
    assert trainer.steps == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    "sampler, named",
    [
        (lambda rows: BatchSampler(SequentialSampler(rows), 2, False), "batch sampler"),
        (lambda rows: [[0, 1], [2, 3]], "positions of rows"),
        (lambda rows: DistributedSampler(rows, num_replicas=2, rank=0), "DistributedSampler"),
    ],
)
def test_a_sampler_that_gives_no_order_is_refused(build, sampler, named):
    mine = type("Mine", (ORPOTrainer,), {"_get_train_sampler": lambda self, *args: sampler(self.train_dataset)})
    with pytest.raises(UserError, match=named):
        build(mine).train()


# ---------------------------------------------------------------- loaders


class OwnLoader(Seeing):
    """In the order of the rows, as people write it."""

    def get_train_dataloader(self):
        loader = DataLoader(self.train_dataset, batch_size=self._train_batch_size, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_loader_of_a_subclass_trains_the_same_pairs_to_the_same_weights(build, padding_free):
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, padding_free=padding_free)
    theirs = build(OwnLoader, **options)
    theirs.train()
    ours = build(Seeing, train_sampling_strategy="sequential", **options)
    ours.train()
    assert len(theirs.steps) == len(ours.steps) == 3
    assert_same_weights(weights(theirs), weights(ours))


class Half(ORPOTrainer):
    def get_eval_dataloader(self, rows=None):
        return super().get_eval_dataloader(self.eval_dataset[:2])


class OwnEvaluationLoader(ORPOTrainer):
    def get_eval_dataloader(self, rows=None):
        return DataLoader(self.eval_dataset, batch_size=2, collate_fn=self.data_collator)


def test_an_evaluation_loader_is_ours_or_refused_before_the_first_step(build, chat_tokenizer):
    rows = pairs(4, len(chat_tokenizer), seed=1)
    half, whole = build(Half, eval_rows=rows), build(ORPOTrainer, eval_rows=rows)
    assert half.evaluate()["eval_loss"] == pytest.approx(whole.evaluate(rows[:2])["eval_loss"])
    trainer = build(OwnEvaluationLoader, eval_rows=rows, eval_strategy="steps", eval_steps=2)
    with pytest.raises(UserError, match="get_eval_dataloader"):
        trainer.train()
    assert trainer.state.global_step == 0


# ---------------------------------------------------------------- compute_loss


class Penalised(ORPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        penalty = 0.5 * model.get_input_embeddings().weight.square().sum()
        self.store_metrics({"penalty": penalty.item()})
        return loss + penalty


def test_a_penalty_counts_once_per_optimizer_step_for_any_accumulation(build, chat_tokenizer):
    runs = []
    for size, accumulation in ((8, 1), (1, 8), (3, 3)):
        trainer = build(
            Penalised,
            pairs(8, len(chat_tokenizer)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            learning_rate=0.01,
        )
        trainer.train()
        runs.append(trainer)
    plain = build(ORPOTrainer, pairs(8, len(chat_tokenizer)), per_device_train_batch_size=8, max_steps=2)
    plain.train()
    first = runs[0].state.log_history[0]
    assert first["loss"] == pytest.approx(plain.state.log_history[0]["loss"] + first["penalty"], rel=1e-5)
    for cut in runs[1:]:
        assert_same_weights(weights(cut), weights(runs[0]))
        for name in ("loss", "grad_norm", "penalty"):
            assert cut.state.log_history[0][name] == pytest.approx(first[name], rel=1e-4)


class Own(ORPOTrainer):
    """Says that its loss is summed over the micro-batches of a step, and is so: the Trainer does not divide it."""

    loss_is_scaled_for_ga = True


def test_a_subclass_says_how_its_loss_is_scaled(build):
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    own, plain = build(Own, **options), build(ORPOTrainer, **options)
    own.train()
    plain.train()
    assert_same_weights(weights(own), weights(plain))


def test_stored_metrics_of_an_evaluation_are_in_its_line(build, chat_tokenizer):
    class Storing(ORPOTrainer):
        def prediction_step(self, *args, **kwargs):
            self.store_metrics({"eval_mine": torch.tensor(2.0)}, train_eval="eval")
            return super().prediction_step(*args, **kwargs)

    trainer = build(Storing, eval_rows=pairs(4, len(chat_tokenizer)))
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_mine"] == 2.0


def test_every_refused_name_of_the_trainer_exists_there():
    """Else a renamed one would no longer be refused."""
    theirs = {name for name in REFUSED if name.startswith("_")} - {"_shift_right"}
    assert [name for name in theirs if not hasattr(Trainer, name)] == []
