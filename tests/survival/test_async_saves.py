"""async_save in one process: what a run promises is the same. Killed runs: test_kills.py."""

import json
import os
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from orpo_dist import ORPOTrainer
from orpo_dist.errors import RunStopped, SaveError, UserError
from orpo_dist.run.checkpoint import STAGING, checkpoint_folders, step_of, verify
from orpo_dist.run.owner import OWNER_NAME, Owner
from orpo_dist.training.deferred_writes import DeferredWrites
from tests.trainer_runs import assert_same_weights, config, pairs, weights
from tests.training.resumed_runs import RUN, At, assert_same_history


@pytest.fixture
def make(tmp_path, chat_tokenizer, tiny_llama):
    rows = pairs(22, len(chat_tokenizer))

    def trainer(folder, *callbacks, adapter=False, **more):
        return ORPOTrainer(
            tiny_llama(len(chat_tokenizer)),
            config(tmp_path / folder, **{**RUN, "async_save": True, **more}),
            train_dataset=rows,
            eval_dataset=rows[:5],
            processing_class=chat_tokenizer,
            callbacks=list(callbacks),
            peft_config=LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear") if adapter else None,
        )

    return trainer


def complete(folder: Path) -> list[int]:
    return [step_of(path) for path in checkpoint_folders(folder)]


def slowly(monkeypatch, before_writing):
    """What is copied is written after `before_writing`."""
    write = DeferredWrites.write

    def slow(self):
        before_writing()
        write(self)

    monkeypatch.setattr(DeferredWrites, "write", slow)


class Seen(TrainerCallback):
    """The complete checkpoints at the end of each step."""

    def __init__(self, folder):
        self.folder, self.steps = folder, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.steps[state.global_step] = complete(self.folder)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_checkpoint_holds_the_same_bytes(make, tmp_path, adapter):
    for folder, asynchronous in (("now", False), ("later", True)):
        trainer = make(folder, adapter=adapter, async_save=asynchronous)
        trainer.train()
    names = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "metrics_0.pt"]
    names += ["adapter_model.safetensors" if adapter else "model.safetensors"]
    for step in (6, 7):
        now, later = (tmp_path / folder / f"checkpoint-{step}" for folder in ("now", "later"))
        assert verify(now).files.keys() == verify(later).files.keys()
        for name in names:
            assert (now / name).read_bytes() == (later / name).read_bytes(), name


def test_training_goes_on_and_the_next_save_waits(make, tmp_path, monkeypatch):
    go, seen = threading.Event(), Seen(tmp_path / "run")
    slowly(monkeypatch, lambda: go.wait(30) and time.sleep(0.2))
    make("run", seen, At(4, go.set), adapter=True, save_total_limit=None).train()
    assert seen.steps[3] == [] and seen.steps[4] in ([], [2])  # it is copied at 2 and may be written from 4 on
    assert seen.steps[5] in ([2], [2, 4])  # the save at 4 has waited for it
    assert complete(tmp_path / "run") == [2, 4, 6, 7]
    for folder in checkpoint_folders(tmp_path / "run"):
        verify(folder)


def test_what_was_taken_over_while_it_was_written_is_not_published(make, tmp_path, monkeypatch):
    def take_over():
        if complete(tmp_path / "run") == [2]:
            other = {**asdict(Owner.this_process()), "host": "n7", "machine": "another boot"}
            (tmp_path / "run" / OWNER_NAME).write_text(json.dumps(other))

    slowly(monkeypatch, take_over)
    with pytest.raises(UserError, match="taken over by process"):
        make("run", save_total_limit=None).train()
    assert complete(tmp_path / "run") == [2]
    assert (tmp_path / "run" / STAGING / "checkpoint-4").is_dir()  # which is the new owner's


def test_what_is_resumed_ends_the_same(make, tmp_path):
    whole = make("whole", adapter=True, async_save=False)
    whole.train()
    with pytest.raises(RunStopped) as end:
        make("run", At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)), adapter=True).train()
    assert (tmp_path / "run" / "checkpoint-5" / "complete.json").is_file() and end.value.step == 5
    resumed = make("run", adapter=True)
    resumed.train("auto")
    assert_same_weights(weights(resumed), weights(whole), tolerance=0)
    assert_same_history(resumed, whole)


@pytest.mark.parametrize("failing", [2, 7])
def test_a_failure_in_the_background_is_that_of_the_run(make, tmp_path, monkeypatch, failing):
    saves = []

    def full():
        saves.append(None)
        if (0, 2, 4, 6, 7)[len(saves)] == failing:
            raise OSError(28, "No space left on device")

    slowly(monkeypatch, full)
    trainer = make("run", adapter=True)
    with pytest.raises(SaveError, match=rf"Cannot save checkpoint-{failing} .*no space left on the device"):
        trainer.train()
    assert trainer.state.global_step <= min(failing + 2, 7)
    assert complete(tmp_path / "run") == {2: [], 7: [4, 6]}[failing]
    assert not list((tmp_path / "run" / "_saving").glob("*"))
    monkeypatch.undo()
    make("run", adapter=True).train("auto")
    assert complete(tmp_path / "run") == [6, 7]


def test_a_failure_elsewhere_leaves_the_save_in_flight_its_time(make, tmp_path, monkeypatch):
    def broken():
        raise ZeroDivisionError("a bug")

    slowly(monkeypatch, lambda: time.sleep(1))
    with pytest.raises(ZeroDivisionError):
        make("run", At(3, broken), adapter=True).train()
    verify(tmp_path / "run" / "checkpoint-2")


def test_the_best_model_is_loaded_when_it_is_there(make, monkeypatch):
    options = dict(eval_strategy="steps", eval_steps=1, save_steps=1, metric_for_best_model="loss")
    options |= dict(learning_rate=1e-3, max_steps=3, load_best_model_at_end=True)
    expected = make("whole", **options, async_save=False)
    expected.train()
    slowly(monkeypatch, lambda: time.sleep(0.3))
    trainer = make("run", **options)
    trainer.train()
    assert trainer.state.best_global_step == expected.state.best_global_step == 3  # that of the save in flight
    assert_same_weights(weights(trainer), weights(expected), tolerance=0)


def test_the_time_limit_reserves_what_writing_takes(make, monkeypatch):
    slowly(monkeypatch, lambda: time.sleep(0.5))
    trainer = make("run", adapter=True, save_steps=1)
    trainer.train()
    assert trainer._stop_requests._longest_save > 0.5
