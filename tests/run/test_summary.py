"""Logs and summaries of a run."""

import json
import math

import pytest
from transformers import TrainerState

from orpo_dist.run.summary import RunSummary, evaluation_at, pairs_seen, without_prefix


def state_at(step: int, main_process: bool = True) -> TrainerState:
    return TrainerState(global_step=step, epoch=step / 4, is_world_process_zero=main_process)


@pytest.mark.parametrize(
    ("steps", "drop_last", "seen"),
    [(0, False, 0), (2, False, 8), (3, False, 10), (4, False, 14), (6, False, 20), (2, True, 8), (3, True, 12)],
)
def test_pairs_seen_counts_the_small_last_batch(steps, drop_last, seen):
    # 10 pairs in batches of 4: 4, 4, 2 per epoch; without the last one 4, 4.
    assert pairs_seen(steps, pairs=10, global_batch_size=4, drop_last=drop_last) == seen


def test_pairs_seen_with_a_batch_larger_than_the_data():
    assert pairs_seen(3, pairs=5, global_batch_size=8, drop_last=False) == 15


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
