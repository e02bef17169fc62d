"""Which steps are applied, by hand-made gradient norms."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from orpo_dist.distributed.environment import Environment, Sharding
from orpo_dist.errors import NonFiniteRun
from orpo_dist.training.step_guard import StepGuard
from tests.trainer_runs import config, pairs

ALONE = Environment(0, 1, 0, 0, 1, Sharding.REPLICATED)


@pytest.fixture
def guard(tmp_path):
    args = config(tmp_path, max_nonfinite_steps=2)
    return StepGuard(tmp_path, args, ALONE, Accelerator(cpu=True), lambda index: {"row": 10 + index})


def step(guard, norm, *, number, wants_stop=False, losses=(1.0,), indices=(0, 1)):
    guard.begin(guard.report(wants_stop, torch.device("cpu")), list(indices))
    counted = [guard.count(torch.tensor(loss, requires_grad=True)) for loss in losses]
    guard.judge(torch.tensor(norm), number)
    return counted


def test_a_finite_norm_is_applied_and_a_stop_request_stays(guard):
    step(guard, 0.5, number=1)
    assert not guard.refused and not guard.stops
    step(guard, 0.5, number=2, wants_stop=True)
    step(guard, 0.5, number=3)
    assert guard.stops
    guard.training_begins(Accelerator(cpu=True))
    assert not guard.stops


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_a_bad_norm_is_refused_and_its_pairs_are_written_down(guard, tmp_path, norm):
    step(guard, norm, number=4, losses=(2.0, 3.0), indices=(7, 3))
    assert guard.refused
    (event,) = [json.loads(line) for line in (tmp_path / "nonfinite_steps.jsonl").read_text().splitlines()]
    assert event["step"] == 4 and float(event["loss"]) == 5.0
    assert event["pairs"] == [{"index": 7, "row": 17}, {"index": 3, "row": 13}]


def test_too_many_refused_steps_in_a_row_end_the_run(guard):
    step(guard, math.nan, number=1)
    step(guard, 1.0, number=2)
    step(guard, math.nan, number=3)
    with pytest.raises(NonFiniteRun, match="2 steps in a row"):
        step(guard, math.nan, number=4)


def test_only_a_non_finite_loss_gets_a_gradient_of_nan(guard):
    for value, gradient in ((2.0, 1.0), (math.inf, math.nan)):
        loss = torch.tensor(value, requires_grad=True)
        guard.begin(torch.zeros(2, dtype=torch.float64), [])
        guard.count(loss).backward()
        assert loss.grad.item() == gradient or (math.isnan(gradient) and loss.grad.isnan())


def test_a_refused_step_leaves_the_weights_and_release_gives_step_back(guard):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = Accelerator(cpu=True).prepare_optimizer(torch.optim.SGD([weight], lr=1.0))
    before = dict(vars(optimizer))
    guard.guard(optimizer)
    weight.grad = torch.ones(1)
    step(guard, math.nan, number=1)
    optimizer.step()
    assert weight.item() == 1.0 and optimizer.step_was_skipped
    step(guard, 1.0, number=2)
    optimizer.step()
    assert weight.item() == 0.0 and not optimizer.step_was_skipped
    guard.release()
    assert vars(optimizer).keys() == before.keys()
    guard.refused = True
    optimizer.step()
    assert weight.item() == -1.0  # its own step() again


def test_losses_survive_a_checkpoint(guard, tmp_path):
    for number in range(1, 4):
        step(guard, 1.0, number=number, losses=(float(number),))
    assert guard.losses() == [1.0, 2.0]  # the loss of a step is known with the next one
    other = StepGuard(tmp_path, config(tmp_path), ALONE, Accelerator(cpu=True), lambda index: {})
    other.restore_losses(guard.losses())
    assert other.losses() == [1.0, 2.0]


def test_an_optimizer_that_is_guarded_twice_is_released_at_once(guard):
    """auto_find_batch_size begins a second loop within one train(), with the same optimizer."""
    optimizer = Accelerator(cpu=True).prepare_optimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0))
    before = vars(optimizer).keys() - {"_is_overflow"}
    guard.guard(optimizer)
    guard.guard(optimizer)
    guard.release()
    assert vars(optimizer).keys() - {"_is_overflow"} == before


def test_the_accelerator_of_a_later_trial_is_asked(tmp_path):
    """hyperparameter_search makes a new one per trial, and only that one knows whether DeepSpeed skipped the step."""

    class Skipped(Accelerator):
        optimizer_step_was_skipped = True

    environment = Environment(0, 1, 0, 0, 1, Sharding.ZERO2)
    guard = StepGuard(tmp_path, config(tmp_path), environment, Accelerator(cpu=True), lambda index: {})
    guard.training_begins(Skipped(cpu=True))
    step(guard, math.nan, number=1)  # else: DeepSpeed applied the step
    assert guard.refused


def test_on_a_device_without_float64_the_step_is_judged_in_float32(guard, monkeypatch):
    """An Apple GPU, of which the CPU plays the part: what goes there is float32, so the sums stay float32."""
    monkeypatch.setattr("orpo_dist.training.step_guard.widest_float", lambda device: torch.float32)
    report = guard.report(False, torch.device("cpu"))
    assert report.dtype == torch.float32
    guard.begin(report, [0])
    guard.count(torch.tensor(1.5, requires_grad=True))
    guard.judge(torch.tensor(0.5), 1)
    assert not guard.refused and guard.report(False, torch.device("cpu"))[1] == 1.5


def test_the_logged_loss_is_finite_again_after_a_refused_step(trained, chat_tokenizer):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            self.kept = model.lm_head.weight[0, 0].item()
            if state.global_step == 1:
                with torch.no_grad():
                    model.lm_head.weight[0, 0] = math.nan

        def on_step_end(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.lm_head.weight[0, 0] = self.kept

    trainer = trained(pairs(16, len(chat_tokenizer)), max_steps=4, callbacks=[Poison()])
    losses = [event["loss"] for event in trainer.state.log_history if "loss" in event]
    assert [math.isfinite(loss) for loss in losses] == [True, False, True, True]
