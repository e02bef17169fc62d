"""Logs and summaries of a run."""

import json
import math

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from orpo_dist.run.callbacks import FinalEvaluation, RunLog
from orpo_dist.run.machine import versions
from orpo_dist.run.summary import RunSummary, evaluation_at, pairs_seen, without_prefix


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def state_at(step: int, main_process: bool = True) -> TrainerState:
    return TrainerState(global_step=step, epoch=step / 4, is_world_process_zero=main_process)


def steps_in(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("steps", "drop_last", "seen"),
    [(0, False, 0), (2, False, 8), (3, False, 10), (4, False, 14), (6, False, 20), (2, True, 8), (3, True, 12)],
)
def test_pairs_seen_counts_the_small_last_batch(steps, drop_last, seen):
    # 10 pairs in batches of 4: 4, 4, 2 per epoch; without the last one 4, 4.
    assert pairs_seen(steps, pairs=10, global_batch_size=4, drop_last=drop_last) == seen


def test_pairs_seen_with_a_batch_larger_than_the_data():
    assert pairs_seen(3, pairs=5, global_batch_size=8, drop_last=False) == 15


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


def test_evaluation_of_a_step():
    state = state_at(4)
    state.log_history = [
        {"step": 0, "eval_loss": 3.0, "eval_runtime": 1.0},
        {"step": 4, "loss": 2.0},
        {"step": 4, "eval_loss": 1.0, "eval_rewards/margins": 0.5, "epoch": 1.0},
    ]
    assert evaluation_at(state, 0) == {"loss": 3.0}
    assert evaluation_at(state, 4) == {"loss": 1.0, "rewards/margins": 0.5}
    assert evaluation_at(state, 2) is None


def test_prefix_and_speed_are_left_out():
    metrics = {"eval_loss": 1, "eval_samples_per_second": 2.0, "eval_runtime": 3.0, "epoch": 1.0, "eval_nll_loss": 0.5}
    assert without_prefix(metrics) == {"loss": 1.0, "nll_loss": 0.5}


def test_table_and_file(tmp_path):
    values = dict.fromkeys(RunSummary.__annotations__)
    summary = RunSummary(
        **values | {"eval_before": {"loss": 2.0}, "eval_after": {"loss": math.nan}, "peak_memory_gib": [1.0]}
    )
    assert summary.table().splitlines()[1].split() == ["loss", "2.0000", "nan"]
    summary.save(tmp_path)
    assert json.loads((tmp_path / "run_summary.json").read_text())["eval_after"] == {"loss": "nan"}
    assert RunSummary(**values).table() == ""


def test_versions_name_what_is_installed():
    found = versions()
    assert {"python", "orpo_dist", "torch", "transformers", "peft"} <= set(found)
    assert all(found.values())
