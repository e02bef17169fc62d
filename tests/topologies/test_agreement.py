"""Ranks that see different things decide alike and go on together: tests/launching/disagreeing.py."""

import json

import pytest

from tests.launching.disagreeing import OUTLIER
from tests.launching.launch import run_worker
from tests.topologies.runs import CONFIG

CASES = (
    "an_objection",
    "a_value",
    "an_error_of_the_first_rank",
    "a_step_together",
    "a_checkpoint_that_one_rank_cannot_write",
    "a_long_last_act",
    "a_last_act_that_fails",
    "a_model_that_one_rank_cannot_pack",
    "a_check_that_fails_on_one_rank",
    "a_spike_in_a_step_with_a_filler",
)


@pytest.fixture(scope="module")
def seen(setting):
    config = {**CONFIG, "eval_strategy": "no", "per_device_train_batch_size": 2, "max_steps": -1, "num_train_epochs": 1}
    settings = {**setting, "folder": "", "config": config, "cases": CASES}
    return run_worker(settings, setting["folder"] / "agreement", "torchrun", worker="disagreeing").facts


@pytest.mark.topology
def test_an_objection_of_any_rank_is_that_of_all(seen):
    assert seen["an_objection"] == [["", "no (on rank 1 of 2)", "no 0"]] * 2
    assert seen["a_value"] == [10, 10]


@pytest.mark.topology
def test_an_error_of_the_first_rank_ends_the_others(seen):
    own, told = seen["an_error_of_the_first_rank"]
    assert own == "ZeroDivisionError: division by zero"
    assert told == "RuntimeError: Rank 0 failed: ZeroDivisionError: division by zero"


@pytest.mark.topology
def test_a_failure_of_one_rank_is_that_of_all(seen):
    for each, first, _, again in seen["a_step_together"]:
        assert (each, first, again) == ([0, 1], "of 0", [10, 11])
    told, own = (facts[2] for facts in seen["a_step_together"])
    assert own == "ZeroDivisionError: division by zero"
    assert told == "RuntimeError: Rank 1 failed: ZeroDivisionError: division by zero"


@pytest.mark.topology
def test_a_checkpoint_that_one_rank_cannot_write_beside_the_training_ends_all(seen):
    (told, step, names), of_1 = seen["a_checkpoint_that_one_rank_cannot_write"]
    assert of_1 == [told, step, names]
    assert told.startswith("SaveError: Cannot save checkpoint-2") and "no space left on the device" in told
    assert step in (3, 4) and names == ["checkpoint-1"]


@pytest.mark.topology
def test_the_others_wait_for_a_last_act_and_hear_of_its_end(seen):
    assert all(float(end.split()[2]) >= 1.4 for end in seen["a_long_last_act"])
    own, told = seen["a_last_act_that_fails"]
    assert own == "ZeroDivisionError: division by zero"
    assert told.endswith("failed: ZeroDivisionError: division by zero") and told.startswith("RuntimeError")


@pytest.mark.topology
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("a_model_that_one_rank_cannot_pack", "chunked attention"),
        ("a_check_that_fails_on_one_rank", "hidden states differ"),
    ],
)
def test_all_ranks_fall_back_to_the_padded_layout(seen, case, reason):
    (packed, steps, weights, said), (_, _, weights_of_1, _) = seen[case]
    assert (packed, seen[case][1][0], steps) == (False, False, 2) and weights == weights_of_1
    (line,) = [line for line in said if line.startswith("Padded layout")]
    assert reason in line and "(on rank 1 of 2)" in line


@pytest.mark.topology
def test_a_spike_in_a_step_that_one_rank_filled_up(seen, setting):
    (packed, steps, weights, said), (_, steps_of_1, weights_of_1, _) = seen["a_spike_in_a_step_with_a_filler"]
    assert packed and (steps, steps_of_1) == (42, 42) and weights == weights_of_1
    assert any("Loss spike at step 21" in line for line in said)
    (event,) = map(json.loads, (setting["folder"] / "agreement.spike" / "loss_spikes.jsonl").read_text().splitlines())
    assert [pair["prompt_tokens"] for pair in event["pairs"]] == [len(OUTLIER["prompt_ids"])]


@pytest.mark.topology
def test_without_a_gpu_launched_processes_train_together(setting, monkeypatch):
    """Not told to use the CPU, each of them would train on its own, in one folder."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = {**CONFIG, "max_steps": 1, "eval_strategy": "no"}
    del config["use_cpu"]
    settings = {**setting, "folder": "", "config": config}
    assert run_worker(settings, setting["folder"] / "no_gpu", "torchrun").facts["world_size"] == 2
