"""backend="local": the processes that are started, their errors, and the search for a batch that fits."""

import os
import sys
from pathlib import Path

import pytest

from orpo_dist.autotrain import local as autotrain_launch
from orpo_dist.autotrain.local import Attempt, attempt_of, config_of, smaller_batches
from orpo_dist.autotrain.setup import set_up
from orpo_dist.cluster.ends import End
from orpo_dist.cluster.files import accelerate_config
from orpo_dist.cluster.processes import Placement, launcher_command
from orpo_dist.errors import RunStopped, TrainingFailed, UserError
from tests.autotrain.options import params, recipe


@pytest.mark.parametrize(
    ("backend", "quantised", "name"),
    [
        (None, False, "ddp"),
        ("ddp", True, "ddp"),
        ("deepspeed", True, "zero2"),
        ("zero3", False, "zero3"),
        ("zero3", True, "zero3_qlora"),
    ],
)
def test_the_accelerate_config_of_a_backend(backend, quantised, name):
    path = accelerate_config(config_of(backend, {"load_in_4bit": quantised}))
    assert path.name == f"{name}.yaml" and path.is_file()


def test_accelerate_understands_the_command():
    from accelerate.commands.launch import launch_command_parser

    config = config_of("deepspeed", {})
    command = launcher_command(config, accelerate_config(config), Placement(processes=4), "r.yaml", [])
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    parsed = launch_command_parser().parse_args(command[3:])
    assert (parsed.num_processes, parsed.main_process_port) == (4, 0)
    assert Path(parsed.config_file).name == "zero2.yaml"
    assert (parsed.module, parsed.training_script) == (True, "orpo_dist.cli")
    assert parsed.training_script_args == ["train", "r.yaml"]


def two_gpus(monkeypatch, outcomes):
    """Two GPUs, and processes that end as told; returns the recipes they are started with."""
    started, outcomes = [], iter(outcomes)

    def start(recipe, environment, config, processes):
        started.append({**recipe, "config": config, "processes": processes, "environment": environment})
        return next(outcomes)

    monkeypatch.setattr(autotrain_launch, "gpu_count", lambda: 2)
    monkeypatch.setattr(autotrain_launch, "_start", start)
    return started


def test_as_many_processes_as_gpus(monkeypatch):
    started = two_gpus(monkeypatch, [Attempt(0, False)])
    autotrain_launch.run(set_up(params(token="t")), "deepspeed")
    assert (started[0]["processes"], started[0]["config"]) == (2, "zero2")
    assert started[0]["environment"] == {"HF_TOKEN": "t"}
    assert "auto_find_batch_size" not in started[0]  # the trainer searches in one process only


def test_out_of_memory_keeps_the_global_batch(monkeypatch, capsys):
    started = two_gpus(monkeypatch, [Attempt(1, True), Attempt(1, True), Attempt(0, False)])
    autotrain_launch.run(set_up(params(auto_find_batch_size=True, batch_size=6, gradient_accumulation=2)), "ddp")
    sizes = [(r["per_device_train_batch_size"], r["gradient_accumulation_steps"]) for r in started]
    assert sizes == [(6, 2), (3, 4), (1, 12)]
    assert "batch_size=3, gradient_accumulation=4 (the same global batch)" in capsys.readouterr().err


@pytest.mark.parametrize("attempt", [Attempt(1, False), Attempt(1, True)])
def test_other_failures_are_not_tried_again(attempt, monkeypatch):
    started = two_gpus(monkeypatch, [attempt])
    with pytest.raises(TrainingFailed):
        autotrain_launch.run(set_up(params(auto_find_batch_size=not attempt.out_of_memory)), None)
    assert len(started) == 1


def test_out_of_memory_with_one_pair():
    with pytest.raises(UserError, match="Out of memory with one pair per device"):
        smaller_batches(recipe(batch_size=1))


def test_inside_a_launcher_no_other_is_started(monkeypatch):
    trained = []
    started = two_gpus(monkeypatch, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("orpo_dist.train.train", trained.append)
    autotrain_launch.run(set_up(params()), "ddp")
    assert not started and trained[0].data.dataset_name == "rows.jsonl"


def test_one_process_trains_here_with_the_environment_of_the_run(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("orpo_dist.train.train", lambda recipe: seen.update(token=os.environ.get("HF_TOKEN")))
    autotrain_launch.run(set_up(params(token="t")), "deepspeed")
    assert seen == {"token": "t"} and "HF_TOKEN" not in os.environ
    assert "distributed_backend=deepspeed needs several GPUs" in capsys.readouterr().err


def test_a_stop_of_the_processes_is_a_stop_here(monkeypatch):
    stop = RunStopped("SIGTERM", 7, "runs/p/checkpoint-7", printed=True)
    started = two_gpus(monkeypatch, [Attempt(75, False, stop)])
    with pytest.raises(RunStopped) as caught:
        autotrain_launch.run(set_up(params(auto_find_batch_size=True)), "ddp")
    assert caught.value is stop and len(started) == 1


def test_what_the_processes_wrote_about_their_ends():
    assert attempt_of(0, []) == Attempt(0, False)
    assert attempt_of(1, []) == Attempt(1, False)  # killed: nothing is written
    assert attempt_of(2, [End(), End(out_of_memory=True)]) == Attempt(2, True)
    stopped = attempt_of(75, [End(reason="SIGTERM"), End(False, "SIGINT", 4, "p/checkpoint-4")]).stopped
    assert (stopped.reason, stopped.step, stopped.checkpoint) == ("SIGINT", 4, "p/checkpoint-4")
    assert stopped.code == 75 and stopped.printed
