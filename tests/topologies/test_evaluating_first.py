"""evaluate() before train() and a second train() under sharding: done, or refused in one line."""

import pytest

from tests.launching.launch import run_worker
from tests.topologies.runs import CONFIG


def outcomes(setting, launcher, *calls):
    config = {**CONFIG, "per_device_train_batch_size": 2, "max_steps": 1, "eval_strategy": "no"}
    settings = {**setting, "folder": "", "config": config, "calls": calls}
    out = setting["folder"] / f"evaluating_first_{launcher}"
    return run_worker(settings, out, launcher, worker="evaluating_first").facts["outcomes"]


@pytest.mark.topology
def test_ddp_does_them_all(setting):
    assert outcomes(setting, "torchrun", "evaluate", "train", "evaluate", "train") == ["done"] * 4


@pytest.mark.topology
@pytest.mark.parametrize(("launcher", "name"), [("zero2", "ZeRO-2"), ("fsdp2", "FSDP2")])
def test_wrapped_with_the_optimizer(setting, launcher, name):
    first, train, after, again = outcomes(setting, launcher, "evaluate", "train", "evaluate", "train")
    assert first.startswith("UserError: evaluate() and predict() before train() are not possible with " + name)
    assert "eval_on_start=true" in first and "\n" not in first
    assert (train, after) == ("done", "done")
    assert again.startswith("UserError: train() after train() is not possible with " + name) and "\n" not in again


@pytest.mark.topology
def test_zero3_evaluates_and_then_does_not_train(setting):
    first, train, again = outcomes(setting, "zero3", "evaluate", "train", "evaluate")
    assert (first, again) == ("done", "done")
    assert train.startswith("UserError: train() after evaluate() or predict() is not possible with ZeRO-3")
