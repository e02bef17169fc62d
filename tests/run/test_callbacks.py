"""log.jsonl, the last evaluation, and the time that counts as training."""

import json
import math

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from orpo_dist.run.callbacks import FinalEvaluation, RunLog


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def state_at(step: int, main_process: bool = True) -> TrainerState:
    return TrainerState(global_step=step, epoch=step / 4, is_world_process_zero=main_process)


def steps_in(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_new_run_starts_a_new_log_and_a_resumed_one_continues_it(args, tmp_path):
    path = tmp_path / "log.jsonl"
    for step in (1, 2, 3):
        RunLog(tmp_path).on_log(args, state_at(step), TrainerControl(), {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 3, "los')  # killed while writing
    RunLog(tmp_path).on_train_begin(args, state_at(2), TrainerControl())
    assert steps_in(path) == [1, 2]
    RunLog(tmp_path).on_train_begin(args, state_at(0), TrainerControl())
    assert steps_in(path) == []


def test_what_came_after_the_last_checkpoint_is_written_again(args, tmp_path):
    path = tmp_path / "log.jsonl"
    events = [{"loss": 1.0}, {"eval_loss": 1.0}, {"train_loss": 1.0}]
    for step in (3, 4):
        for event in events:
            RunLog(tmp_path).on_log(args, state_at(step), TrainerControl(), event)
    state = state_at(4)
    state.log_history = [{"step": 4, "loss": 1.0}]
    RunLog(tmp_path).on_train_begin(args, state, TrainerControl())
    assert steps_in(path) == [3, 3, 3, 4]
    RunLog(tmp_path).on_log(args, state_at(4), TrainerControl(), {"eval_loss": 1.0})
    state.log_history.append({"step": 4, "eval_loss": 1.0})
    RunLog(tmp_path).on_train_begin(args, state, TrainerControl())
    assert steps_in(path) == [3, 3, 3, 4, 4]


@pytest.mark.parametrize(("step", "due"), [(7, False), (8, True), (9, True)])
def test_a_run_resumed_after_its_last_step_still_owes_the_last_evaluation(args, step, due):
    state, control = state_at(step), TrainerControl()
    state.max_steps = 8
    FinalEvaluation().on_train_begin(args, state, control)
    assert control.should_evaluate is due
    state.log_history = [{"step": step, "eval_loss": 1.0}]
    FinalEvaluation().on_train_begin(args, state, control)
    assert control.should_evaluate is False


def test_a_log_line_that_cannot_be_written_is_warned_of_once(args, tmp_path, caplog):
    (tmp_path / "log.jsonl").mkdir()  # for root, too, a file that cannot be opened
    log = RunLog(tmp_path)
    for step in (1, 2):
        log.on_log(args, state_at(step), TrainerControl(), {"loss": 1.0})
    assert caplog.text.count("a line could not be written") == 1
    (tmp_path / "log.jsonl").rmdir()
    log.on_log(args, state_at(3), TrainerControl(), {"loss": 1.0})
    assert steps_in(tmp_path / "log.jsonl") == [3]


def test_only_the_main_process_writes(args, tmp_path):
    log = RunLog(tmp_path)
    log.on_train_begin(args, state_at(0, main_process=False), TrainerControl())
    log.on_log(args, state_at(1, main_process=False), TrainerControl(), {"loss": 1.0})
    assert not (tmp_path / "log.jsonl").exists()


def test_numbers_that_json_has_not(args, tmp_path):
    RunLog(tmp_path).on_log(args, state_at(1), TrainerControl(), {"loss": math.nan, "grad_norm": math.inf})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    event = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert (event["loss"], event["grad_norm"]) == ("nan", "inf")


def test_time_of_evaluations_and_saves_does_not_count(args, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("orpo_dist.run.callbacks.time.perf_counter", lambda: now[0])
    log, control = RunLog(tmp_path), TrainerControl()

    def after(seconds: float, event) -> None:
        now[0] += seconds
        event(args, state_at(0), control)

    after(5, log.on_train_begin)
    after(1, log.on_step_end)
    after(100, log.on_evaluate)
    after(2, log.on_step_end)
    after(1000, log.on_save)
    after(3, log.on_step_end)
    assert log.train_seconds == 6.0


@pytest.mark.parametrize(
    ("stopping", "evaluated", "evaluates"), [(True, 3, True), (True, 4, False), (False, 3, False), (True, None, True)]
)
def test_the_last_model_is_evaluated_once(args, stopping, evaluated, evaluates):
    callback, control = FinalEvaluation(), TrainerControl(should_training_stop=stopping)
    if evaluated is not None:
        callback.on_evaluate(args, state_at(evaluated), control)
    callback.on_epoch_end(args, state_at(4), control)
    assert control.should_evaluate is evaluates
