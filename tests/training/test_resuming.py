"""Stopping, resuming and refusing, in this process; tests/survival/ kills real ones."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from orpo_dist import ORPOTrainer
from orpo_dist.errors import NonFiniteRun, RunStopped, SaveError, UserError
from orpo_dist.run.resume import checkpoint_to_resume
from orpo_dist.run.stop import StopRequests
from orpo_dist.training.step_guard import StepGuard
from tests.trainer_runs import assert_same_weights, config, pairs, weights
from tests.training.resumed_runs import RUN, STEPS, At, assert_same_history


@pytest.fixture
def make(tmp_path, chat_tokenizer, tiny_llama):
    rows = pairs(22, len(chat_tokenizer))  # 3 steps per epoch, the last one smaller

    def trainer(folder="run", *callbacks, rows=rows, **more):
        return ORPOTrainer(
            tiny_llama(len(chat_tokenizer)),
            config(tmp_path / folder, **{**RUN, **more}),
            train_dataset=rows,
            eval_dataset=rows[:5],
            processing_class=chat_tokenizer,
            callbacks=list(callbacks),
            peft_config=LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"),
        )

    return trainer


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.fixture
def whole(make):
    trainer = make("whole", eval_strategy="epoch")
    trainer.train()
    return trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_after_the_step_and_the_run_resumes_to_the_same_end(make, whole, tmp_path, number):
    handlers = {other: signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    stopped = make("run", At(4, lambda: os.kill(os.getpid(), number)), eval_strategy="epoch")
    with pytest.raises(RunStopped) as end:
        stopped.train()
    for other, handler in handlers.items():
        assert signal.getsignal(other) is handler
    assert end.value.code == 75
    # The flag rides on the all-reduce of the next step.
    assert (end.value.reason, end.value.step) == (number.name, 5)
    assert checkpoints(tmp_path / "run") == ["checkpoint-4", "checkpoint-5"]
    assert (tmp_path / "run" / "checkpoint-5" / "complete.json").is_file()
    resumed = make("run", eval_strategy="epoch")
    resumed.train(resume_from_checkpoint="auto")
    assert_same_weights(weights(resumed), weights(whole), tolerance=0)
    assert_same_history(resumed, whole)


def test_a_stop_in_the_last_step_of_an_epoch_does_not_lose_its_evaluation(make, whole):
    with pytest.raises(RunStopped) as end:
        make("run", At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)), eval_strategy="epoch").train()
    assert end.value.step == 3
    resumed = make("run", eval_strategy="epoch")
    resumed.train(resume_from_checkpoint="auto")
    assert_same_weights(weights(resumed), weights(whole), tolerance=0)
    assert_same_history(resumed, whole)


class InEvaluation(TrainerCallback):
    """Does something after the first batch of the evaluation of a step, and counts the batches after that."""

    def __init__(self, step, action):
        self.step, self.action, self.batches = step, action, 0

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.batches += 1
            if self.batches == 1:
                self.action()


@pytest.mark.parametrize("step", [3, 6])  # 6 has a checkpoint of its own, from before the evaluation
def test_a_stop_in_an_evaluation_is_agreed_on_between_its_batches(make, tmp_path, step):
    changes = {"eval_strategy": "epoch", "per_device_eval_batch_size": 1}
    whole = make("whole", **changes)
    whole.train()
    inside = InEvaluation(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunStopped) as end:
        make("run", inside, **changes).train()
    assert inside.batches == 1  # of five
    assert (end.value.reason, end.value.step) == ("SIGTERM", step)
    assert end.value.checkpoint == str(tmp_path / "run" / f"checkpoint-{step}")
    resumed = make("run", **changes)
    resumed.train(resume_from_checkpoint="auto")
    assert_same_weights(weights(resumed), weights(whole), tolerance=0)
    assert_same_history(resumed, whole)


def test_a_stop_in_the_evaluation_before_the_first_step(make, tmp_path):
    inside = InEvaluation(0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunStopped, match="nothing to save yet"):
        make("run", inside, eval_on_start=True, per_device_eval_batch_size=1).train()
    assert inside.batches == 1 and checkpoints(tmp_path / "run") == []


def test_the_stop_file_stops_and_is_removed_at_the_next_start(make, tmp_path):
    file = tmp_path / "run" / "STOP"
    with pytest.raises(RunStopped, match="STOP") as end:
        make("run", At(1, file.touch)).train()
    assert end.value.step == 2
    assert file.exists()
    resumed = make("run")
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == STEPS
    assert not file.exists()


def test_the_time_limit_leaves_time_for_the_checkpoint(make, tmp_path, monkeypatch):
    started = time.monotonic()
    monkeypatch.setattr("orpo_dist.run.stop.PROCESS_STARTED", started)
    with pytest.raises(RunStopped, match="max_runtime of 8 s") as end:
        make(
            "run", *(At(step, lambda: time.sleep(0.8)) for step in range(1, 90)), max_steps=90, max_runtime="8s"
        ).train()
    assert end.value.checkpoint == str(tmp_path / "run" / f"checkpoint-{end.value.step}")
    assert time.monotonic() < started + 30  # not all of the 90 steps


def test_a_trainer_resumed_after_its_last_step_changes_nothing(make, tmp_path):
    first = make("run", lr_scheduler_type="constant")
    first.train()
    before = checkpoints(tmp_path / "run")
    for asked in (STEPS, STEPS, STEPS - 1):  # at last, max_steps was lowered since
        again = make("run", lr_scheduler_type="constant", max_steps=asked, allow_changed=True)
        result = again.train("auto")
        assert result.global_step == again.state.global_step == STEPS
        assert_same_weights(weights(again), weights(first), tolerance=0)
        assert checkpoints(tmp_path / "run") == before


def test_a_stop_in_the_last_step_finishes_the_run(make):
    trainer = make("run", At(STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert trainer.state.global_step == STEPS


# ---------------------------------------------------------------------- the same run, or not


def test_what_may_change_and_what_may_not(make, chat_tokenizer, caplog):
    make("run", max_steps=2).train()
    with pytest.raises(UserError) as refused:
        make("run", beta=0.2, learning_rate=1e-4, gradient_accumulation_steps=1).train("auto")
    told = str(refused.value)
    assert "beta: 0.1 -> 0.2" in told and "learning_rate: 0.001 -> 0.0001" in told and "global batch: 8 -> 4" in told
    with pytest.raises(UserError, match="content: "):
        make("run", rows=pairs(22, len(chat_tokenizer), seed=5)).train("auto")
    free = make("run", max_steps=3, save_steps=1, logging_steps=1, save_total_limit=5)
    free.train("auto")
    assert free.state.global_step == 3
    changed = make("run", beta=0.2, max_steps=4, allow_changed=True)
    changed.train("auto")
    assert changed.state.global_step == 4


def test_other_versions_are_a_warning_or_refused(make, tmp_path, caplog):
    make("run", max_steps=2).train()
    path = tmp_path / "run" / "checkpoint-2" / "complete.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprint"]["versions"]["torch"] = "1.0"
    del manifest["sha256"]  # of what is now changed; earlier versions wrote none
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"torch: 1\.0 -> "):
        make("run", max_steps=3, strict_versions=True).train("auto")
    make("run", max_steps=3).train("auto")
    assert "torch: 1.0 -> " in caplog.text


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(make, whole, tmp_path, capsys):
    with pytest.raises(RunStopped):
        make("run", At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)), eval_strategy="epoch").train()
    damaged = tmp_path / "run" / "checkpoint-5" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    resumed = make("run", eval_strategy="epoch")
    resumed.train("auto")
    told = capsys.readouterr().out
    assert "Skipping checkpoint-5: optimizer.pt has" in told
    assert_same_weights(weights(resumed), weights(whole), tolerance=0)


def test_a_flipped_byte_in_any_file_is_refused(make, whole, tmp_path, capsys):
    with pytest.raises(RunStopped):
        make("run", At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)), eval_strategy="epoch").train()
    newest = tmp_path / "run" / "checkpoint-5"
    names = [path for path in newest.rglob("*") if path.is_file() and path.name != "complete.json"]
    assert {"optimizer.pt", "adapter_model.safetensors", "metrics_0.pt"} <= {path.name for path in names}
    for path in names:
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(UserError, match=rf"checkpoint-5 is not a usable checkpoint: {re.escape(path.name)} is not"):
            checkpoint_to_resume(str(newest), newest.parent)
        path.write_bytes(content)
    content = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(content[:-200] + bytes([content[-200] ^ 128]) + content[-199:])
    with pytest.raises(UserError, match=r"optimizer\.pt is not what was written"):
        make("run", eval_strategy="epoch").train(str(newest))
    resumed = make("run", eval_strategy="epoch")
    resumed.train("auto")
    assert "Skipping checkpoint-5: optimizer.pt is not what was written" in capsys.readouterr().out
    assert_same_weights(weights(resumed), weights(whole), tolerance=0)
    assert_same_history(resumed, whole)
    assert checkpoints(tmp_path / "run") == ["checkpoint-5", "checkpoint-6", "checkpoint-7"]  # two complete ones


def test_a_damaged_best_checkpoint_is_not_loaded(make, tmp_path):
    def damage():
        best = Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors"
        content = best.read_bytes()
        best.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    options = dict(eval_strategy="steps", eval_steps=1, save_steps=1, metric_for_best_model="loss", learning_rate=10.0)
    trainer = make("run", At(5, damage), max_steps=5, load_best_model_at_end=True, **options)
    with pytest.raises(SaveError, match=r"the best checkpoint.*adapter_model\.safetensors is not what was written"):
        trainer.train()


def test_a_missing_rng_file_is_an_error(make, tmp_path):
    make("run", max_steps=2).train()
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / "rng_state.pth").unlink()
    with pytest.raises(UserError, match=r"rng_state\.pth is missing"):
        make("run").train(str(folder))
    with pytest.raises(UserError, match=r"None of the checkpoints.*rng_state\.pth is missing"):
        make("run").train("auto")


def test_a_checkpoint_without_optimizer_cannot_be_resumed(make):
    make("run", max_steps=2, save_only_model=True).train()
    with pytest.raises(UserError, match="save_only_model"):
        make("run").train("auto")


def test_the_best_checkpoint_is_known_by_its_final_name_and_kept(make, tmp_path):
    options = dict(eval_strategy="steps", eval_steps=1, save_steps=1, metric_for_best_model="loss", learning_rate=10.0)
    trainer = make("run", max_steps=5, load_best_model_at_end=True, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}")
    assert trainer.state.best_global_step < 4 and Path(best).is_dir()
    assert checkpoints(tmp_path / "run") == sorted({Path(best).name, "checkpoint-4", "checkpoint-5"})
    state = json.loads((tmp_path / "run" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


# ---------------------------------------------------------------------- numbers that go wrong


def spoil(monkeypatch, steps, value):
    """The loss of these optimizer steps becomes `value`, as an overflow would make it; its gradient stays finite."""
    compute = ORPOTrainer.compute_loss

    def spoilt(self, *args, **kwargs):
        guard = self._step_guard
        extra = value if self.state.global_step + 1 in steps else 0.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guard, "count", lambda loss: StepGuard.count(guard, loss + extra))
            return compute(self, *args, **kwargs)

    monkeypatch.setattr(ORPOTrainer, "compute_loss", spoilt)


@pytest.mark.parametrize("clipping", [1.0, 0.0])
def test_a_step_without_a_finite_loss_is_not_applied(make, tmp_path, monkeypatch, clipping):
    seen = {}

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
            tensors = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
            seen[state.global_step] = torch.cat([tensor.flatten() for tensor in tensors]), lr_scheduler.last_epoch

    spoil(monkeypatch, {3}, float("inf"))
    trainer = make("run", Weights(), max_grad_norm=clipping)
    trainer.train()
    assert torch.equal(seen[3][0], seen[2][0]) and seen[3][1] == seen[2][1]
    assert not torch.equal(seen[4][0], seen[3][0])
    assert trainer.state.global_step == STEPS
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "nonfinite_steps.jsonl").read_text().splitlines()]
    assert (event["step"], event["loss"]) == (3, "inf")
    step_3 = list(trainer.get_train_dataloader().batch_sampler.global_batches())[2]
    assert sorted(pair["index"] for pair in event["pairs"]) == sorted(step_3)
    assert event["pairs"][0]["prompt_tokens"] > 0 and event["pairs"][0]["prompt"]


def test_too_many_of_them_end_the_run_with_the_name_of_the_file(make, monkeypatch):
    spoil(monkeypatch, {2, 4, 5, 6}, float("nan"))
    trainer = make("run", max_nonfinite_steps=3)
    with pytest.raises(NonFiniteRun, match=r"3 steps in a row.*nonfinite_steps\.jsonl"):
        trainer.train()
    assert trainer.state.global_step == 5


def test_a_loss_spike_is_logged(make, tmp_path, monkeypatch):
    spoil(monkeypatch, {25}, 50.0)
    make("run", max_steps=30, save_strategy="no", logging_steps=100).train()
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "loss_spikes.jsonl").read_text().splitlines()]
    assert event["step"] == 25 and event["loss"] > 90 and event["usual_loss"] < 10
    assert event["pairs"]


def test_out_of_memory_names_the_longest_pairs_and_the_option(make, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(ORPOTrainer, "compute_loss", full)
    with pytest.raises(UserError) as refused:
        make("run").train()
    told = str(refused.value)
    assert "max_length" in told and "per_device_train_batch_size" in told and "Tried to allocate" in told
    assert "tokens" in told


# ---------------------------------------------------------------------- disks


def test_what_cannot_be_saved_is_named_and_the_earlier_checkpoint_stays(make, tmp_path):
    blocked = tmp_path / "run" / "_saving"

    def block():
        blocked.rmdir()
        blocked.write_text("in the way")

    with pytest.raises(SaveError, match=r"Cannot save checkpoint-4.*checkpoint-2 is whole"):
        make("run", At(3, block)).train()
    blocked.unlink()
    resumed = make("run")
    resumed.train("auto")
    assert resumed.state.global_step == STEPS


def test_the_flag_of_one_run_does_not_stop_the_next(make):
    trainer = make("run", At(1, lambda: os.kill(os.getpid(), signal.SIGUSR1)))
    with pytest.raises(RunStopped):
        trainer.train()
    trainer.train("auto")
    assert trainer.state.global_step == STEPS
    assert isinstance(trainer._stop_requests, StopRequests)
