"""What is saved, evaluated and left on the model are the averaged weights, and a resumed run ends bit by bit alike."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from orpo_dist import ORPOTrainer
from orpo_dist.distributed.environment import Sharding
from orpo_dist.errors import UserError
from orpo_dist.training.optimizer_modes import refuse_modes_under_zero
from tests.trainer_runs import config, pairs


class Averaging(torch.optim.Optimizer):
    """Schedule-free SGD: z takes the steps, x is the average of all z, and the gradient is taken at y between them.
    https://arxiv.org/abs/2405.15682 (section 2)"""

    def __init__(self, params, lr, beta=0.5):
        super().__init__(params, {"lr": lr, "beta": beta, "train_mode": False, "steps": 0})

    @torch.no_grad()
    def _move(self, group, weight):
        for p in group["params"]:
            if "z" in self.state[p]:
                p.lerp_(self.state[p]["z"], weight)

    def eval(self):
        for group in self.param_groups:
            if group["train_mode"]:
                self._move(group, 1 - 1 / group["beta"])
            group["train_mode"] = False

    def train(self):
        for group in self.param_groups:
            if not group["train_mode"]:
                self._move(group, 1 - group["beta"])
            group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "a step in evaluation mode"
            group["steps"] += 1
            share, beta = 1 / group["steps"], group["beta"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                x = (p - (1 - beta) * z) / beta
                z -= group["lr"] * p.grad
                x.lerp_(z, share)
                p.copy_(beta * x + (1 - beta) * z)

    def averages(self):
        """x, whatever the mode."""
        found = []
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p]["z"]
                found.append((p - (1 - group["beta"]) * z) / group["beta"] if group["train_mode"] else p.clone())
        return found


@pytest.fixture
def made(tmp_path, chat_tokenizer, tiny_llama):
    """`made(name, **config)`: a trainer with that optimizer, whose steps change the weights well above rounding."""

    def build(name, **more):
        model = tiny_llama(len(chat_tokenizer))
        optimizer = Averaging(model.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        return ORPOTrainer(
            model,
            config(tmp_path / name, max_steps=4, **more),
            train_dataset=pairs(16, len(chat_tokenizer)),
            eval_dataset=pairs(4, len(chat_tokenizer), seed=1) if "eval_strategy" in more else None,
            processing_class=chat_tokenizer,
            optimizers=(optimizer, schedule),
        )

    return build


def optimizer_of(trainer):
    return trainer.optimizer.optimizer


def largest(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def loaded(folder):
    return list(AutoModelForCausalLM.from_pretrained(folder).parameters())


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_average_is_saved(made, tmp_path, evaluates):
    more = {"eval_strategy": "steps", "eval_steps": 3} if evaluates else {}
    trainer = made("run", save_strategy="steps", save_steps=2, **more)
    trainer.train()
    assert not optimizer_of(trainer).param_groups[0]["train_mode"], "the model is left with the average"
    average = optimizer_of(trainer).averages()
    trainer.save_model(str(tmp_path / "saved"))
    assert largest(loaded(tmp_path / "saved"), average) == 0
    assert largest(loaded(tmp_path / "run" / "checkpoint-4"), average) == 0
    assert largest(loaded(tmp_path / "run" / "checkpoint-2"), average) > 1e-3
    optimizer_of(trainer).train()
    assert largest(trainer.model.parameters(), average) > 1e-3, "the two points differ, so the test can fail"


def test_the_average_is_evaluated(made, tmp_path):
    trainer = made("run", eval_strategy="no")
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    optimizer_of(trainer).train()
    assert trainer.evaluate()["eval_loss"] == after


def test_a_resumed_run_ends_alike(made):
    whole = made("whole", save_strategy="steps", save_steps=2)
    whole.train()
    cut = made("cut", save_strategy="steps", save_steps=2)
    cut.args.max_steps = 2
    cut.train()
    resumed = made("cut", save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 4
    assert largest(resumed.model.parameters(), whole.model.parameters()) == 0


def test_the_best_model_is_not_averaged_with_the_last(made, tmp_path):
    trainer = made(
        "run", save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    trainer.save_model(str(tmp_path / "saved"))
    assert largest(loaded(tmp_path / "saved"), loaded(best)) == 0


def test_under_zero_it_is_refused():
    averaging = Averaging([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    plain = torch.optim.SGD(averaging.param_groups[0]["params"], lr=0.1)
    with pytest.raises(UserError, match="Averaging averages weights, and under ZeRO"):
        refuse_modes_under_zero("adamw_torch", averaging, Sharding.ZERO2)
    with pytest.raises(UserError, match="schedule_free_adamw averages weights"):
        refuse_modes_under_zero("schedule_free_adamw", None, Sharding.ZERO3)
    refuse_modes_under_zero("adamw_torch", plain, Sharding.ZERO2)
    refuse_modes_under_zero("schedule_free_adamw", None, Sharding.FSDP)
